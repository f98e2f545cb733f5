"""The model registry under crashes at every storage operation, and under many processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.registry.file_registry import BuiltInRegistry, VersionMetadata
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.examples import choose
from pipeline.testing.memory_store import MemoryDisk, MemoryStore
from pipeline.testing.oracle import train_model
from pipeline.testing.s3 import S3
from pipeline.testing.stores import Crash, Faults, FaultyStore, MakeError, disk_full, io_error

PROCESSES, ROUNDS = choose(4, of=8), choose(2, of=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("registered")
    return [train_model(folder / f"m{number}.ubj", rounds=2 + number).read_bytes() for number in range(2)]


Verb = Callable[[BuiltInRegistry, list[bytes]], object]


def register(registry: BuiltInRegistry, models: list[bytes]) -> None:
    made = registry.register("churn", models[1], VersionMetadata({"auc": 0.9}))
    registry.set_alias("churn", "champion", made.record.version)


def set_alias(registry: BuiltInRegistry, models: list[bytes]) -> None:
    registry.set_alias("churn", "challenger", 1)
    registry.set_alias("churn", "challenger", None)


def remove(registry: BuiltInRegistry, models: list[bytes]) -> None:
    number = registry.register("churn", models[1], VersionMetadata()).record.version
    registry.remove("churn", number)


def begin(registry: BuiltInRegistry, models: list[bytes]) -> None:
    registry.register("churn", models[0], VersionMetadata())
    registry.set_alias("churn", "champion", 1)


def assert_readable(registry: BuiltInRegistry) -> None:
    """Check that earlier versions still exist, and that no visible version is incomplete."""
    assert registry.names() == ["churn"]
    summary = registry.summary("churn")
    assert [*summary.versions, *summary.removed] == list(range(1, len(summary.versions) + len(summary.removed) + 1))
    assert registry.lookup(ModelRef("models:/churn/1")).version == 1
    assert registry.lookup(ModelRef("models:/churn@champion")).version in summary.versions
    assert [checked for checked in registry.verify() if not checked.ok] == []


def assert_ended(registry: BuiltInRegistry, verb: Verb) -> None:
    summary = registry.summary("churn")
    if verb is remove:
        assert summary.versions == (1,)
        files = registry.store.list("churn/files")
        assert [name[:64] for name in files] == [registry.version("churn", 1).digest]
    elif verb is register:
        assert summary.versions == (1, 2), "a registration that is repeated makes no second version"
        assert summary.aliases == {"champion": 2}
        assert registry.version("churn", 2).metrics == {"auc": 0.9}
    else:
        assert summary.aliases == {"champion": 1}


@pytest.mark.parametrize("verb", [register, set_alias, remove])
@pytest.mark.parametrize("survives", [True, False], ids=["names-survive", "names-lost"])
def test_the_power_goes_at_every_step(verb: Verb, survives: bool, models: list[bytes]) -> None:
    step = 0
    while True:
        disk = MemoryDisk()
        begin(BuiltInRegistry("", store=MemoryStore(disk, "models")), models)
        disk.steps_left = step
        with suppress(Crash):
            verb(BuiltInRegistry("", store=MemoryStore(disk, "models")), models)
        has_ended = not disk.is_dark
        disk.restart(survives=lambda name: survives)
        registry = BuiltInRegistry("", store=MemoryStore(disk, "models"))
        assert_readable(registry)
        verb(registry, models)
        assert_readable(registry)
        assert_ended(registry, verb)
        if has_ended:
            break
        step += 1
    assert step > 10


@pytest.mark.parametrize("verb", [register, set_alias, remove])
@pytest.mark.parametrize("fault", [io_error, disk_full], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("is_reply_lost", [False, True], ids=["refused", "reply-lost"])
def test_the_store_fails_at_every_verb(verb: Verb, fault: MakeError, is_reply_lost: bool, models: list[bytes]) -> None:
    number = 0
    while True:
        store = MemoryStore(MemoryDisk(), "models")
        begin(BuiltInRegistry("", store=store), models)
        faults = Faults(number, fault=fault)
        with suppress(PipelineError, OSError):
            verb(BuiltInRegistry("", store=FaultyStore(store, faults, is_reply_lost=is_reply_lost)), models)
        registry = BuiltInRegistry("", store=store)
        assert_readable(registry)
        verb(registry, models)
        assert_readable(registry)
        assert_ended(registry, verb)
        if not faults.has_failed:
            break
        number += 1
    assert number > 5


def test_an_alias_set_while_its_version_is_removed(models: list[bytes]) -> None:
    """Whatever the moment: afterwards no alias points to a version that is gone."""
    taken_back = refused = 0
    for moment in range(40):
        disk = MemoryDisk()
        registry = BuiltInRegistry("", store=MemoryStore(disk, "models"))
        begin(registry, models)
        registry.register("churn", models[1], VersionMetadata())
        ended = False

        def meanwhile(registry: BuiltInRegistry = registry) -> None:
            registry.remove("churn", 2)

        racing = _Racing(registry.store, moment, meanwhile)
        try:
            BuiltInRegistry("", store=racing).set_alias("churn", "champion", 2)  # type: ignore[arg-type]
        except PipelineError as error:
            taken_back += "taken" in str(error) or error.kind == "ConflictError"
        refused += racing.failed
        ended = not racing.is_done
        assert_readable(registry)
        if ended:
            break
    assert ended, "no moment was left out"
    assert taken_back
    assert refused


class _Racing:
    """A store in which something else happens before its n-th verb."""

    def __init__(self, store: object, moment: int, meanwhile: Callable[[], None]) -> None:
        self.store, self.left, self.meanwhile = store, moment, meanwhile
        self.is_done = False
        self.failed = 0

    def __getattr__(self, name: str) -> object:
        verb = getattr(self.store, name)
        if not callable(verb) or name == "url":
            return verb

        def counted(*arguments: object) -> object:
            if self.left == 0 and not self.is_done:
                self.is_done = True
                try:
                    self.meanwhile()
                except PipelineError:
                    self.failed += 1
            self.left -= 1
            return verb(*arguments)

        return counted


WRITER = """
import json, sys
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.registry.file_registry import BuiltInRegistry, VersionMetadata

root, me, rounds, facts, model = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5]
data = open(model, "rb").read()
# Every model is other bytes of the same trees; what they are was found out before.
flavor.probe = lambda data, where="": facts
registry = BuiltInRegistry(root)
print("ready", flush=True)
sys.stdin.readline()
for number in range(rounds):
    own = registry.register("churn", data + b" " * (1 + me * rounds + number), VersionMetadata({"writer": me})).record
    shared = registry.register("churn", data + b" " * (10_000 + number), VersionMetadata()).record
    registry.set_alias("churn", "champion", own.version, reason=f"{me}-{number}")
    print(json.dumps([own.version, shared.version]), flush=True)
"""


def race(root: str, model: Path, facts: dict[str, object], environment: dict[str, str]) -> list[list[list[int]]]:
    """Versions that each process was given: per process, per round, its own and the shared one."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, root, str(me), str(ROUNDS), json.dumps(facts), str(model)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        found.append([json.loads(line) for line in out.splitlines()])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "s3"])
def test_many_processes_at_once(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = train_model(tmp_path / "m.json", rounds=2)
    flavor.inspect("m", model.read_bytes())
    facts = flavor._facts[flavor.digest_bytes(model.read_bytes())]
    server: S3 | None = request.getfixturevalue("s3") if place == "s3" else None
    root = server.url("raced") if server else str(tmp_path / "models")
    found = race(root, model, facts, server.environment if server else {})

    registry = BuiltInRegistry(root)
    own = sorted(version for rounds in found for version, _ in rounds)
    shared = [{rounds[number][1] for rounds in found} for number in range(ROUNDS)]
    assert [len(one) for one in shared] == [1] * ROUNDS, "the same bytes are one version, whoever registers them"
    expected = PROCESSES * ROUNDS + ROUNDS
    assert registry.summary("churn").versions == tuple(range(1, expected + 1)), "numbers are dense, none is lost"
    assert sorted([*own, *(version for one in shared for version in one)]) == list(range(1, expected + 1))
    writers = [registry.version("churn", version).metrics["writer"] for version in own]
    assert all(writers.count(me) == ROUNDS for me in range(PROCESSES))
    history = registry.history("churn", "champion")
    assert [move.number for move in history] == list(range(1, PROCESSES * ROUNDS + 1)), "no move is lost"
    assert {move.reason for move in history} == {f"{me}-{n}" for me in range(PROCESSES) for n in range(ROUNDS)}
    assert [checked for checked in registry.verify() if not checked.ok] == []
