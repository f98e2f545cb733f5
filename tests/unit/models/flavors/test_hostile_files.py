"""Model files that are no files, that ask for all memory, or that never end: refused within seconds."""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost

from pipeline.common import forkserver as forks
from pipeline.errors import ModelError, RefusedForSafety
from pipeline.models.flavors import read_model, xgboost_probe
from pipeline.models.registry import resolve
from pipeline.settings import Settings
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.examples import choose

SECONDS = 20.0
"""Limit for one refusal, on a machine that does other work, too."""
IMPORTS = 32 << 20
"""Less than a process with numpy and xgboost takes: a smaller figure is not of the process that read the model."""
MEMORY = 1 << 30
MUTANTS = choose(3, of=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(2)
    matrix = rng.normal(size=(300, 4)).astype("f4")
    data = xgboost.DMatrix(matrix, matrix.sum(axis=1) + rng.normal(size=300) > 0)
    booster = xgboost.train({"nthread": 1, "objective": "binary:logistic", "max_depth": 3}, data, 3)
    folder = tmp_path_factory.mktemp("trained")
    booster.save_model(folder / "m.ubj")
    booster.save_model(folder / "m.json")
    return folder


# A process of a few megabytes between this one and the child. Linux counts the memory of the process that starts a
# program as memory of the program, and this process may have held a gibibyte of other tests.
MEASURE = """#!{python} -IS
import os, resource, subprocess, sys
code = subprocess.run([{python!r}, *sys.argv[1:]]).returncode
with open({found!r}, "a") as file:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=file)
if code < 0:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are first loaded in a process that was started for it."""
    monkeypatch.setattr(forks, "is_running", lambda: False)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, alone: None) -> Callable[[], list[int]]:
    """The largest resident memory of each process that read a model so far, in bytes."""
    found, program = tmp_path / "children", tmp_path / "python"
    program.write_text(MEASURE.format(python=sys.executable, found=str(found)))
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    return lambda: [int(line) * 1024 for line in found.read_text().splitlines()]


def refusal(path: Path | str) -> ModelError:
    started = time.monotonic()
    with pytest.raises(ModelError) as caught:
        resolve(ModelRef(str(path)))
    assert time.monotonic() - started < SECONDS
    error = caught.value
    assert error.where
    assert error.expected
    assert error.next_step
    return error


@pytest.mark.fault(100)
class TestSpecialFiles:
    def test_fifo_is_refused_without_waiting_for_a_writer(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "m.ubj")
        (tmp_path / "link.ubj").symlink_to("m.ubj")
        for name in ("m.ubj", "link.ubj"):
            assert refusal(tmp_path / name).found == "a FIFO"

    def test_endless_device_is_refused_and_not_read(self, tmp_path: Path) -> None:
        (tmp_path / "link.ubj").symlink_to("/dev/zero")
        for path in ("/dev/zero", "/dev/random", tmp_path / "link.ubj"):
            assert refusal(path).found == "a character device"

    def test_file_above_the_limit_is_refused_and_not_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "m.ubj"
        with path.open("wb") as file:
            file.truncate(64 << 30)
        error = refusal(path)
        assert error.message == "the model file is too large"
        assert error.found == "64.0 GiB"
        assert "max_model_size" in error.next_step
        path.write_bytes(bytes(1001))
        with pytest.raises(ModelError, match="too large"):
            read_model(str(path), limit=1000)
        assert len(read_model(str(path), limit=1001)) == 1001
        monkeypatch.setenv("PIPELINE_MAX_MODEL_SIZE", "1000")
        assert Settings.load().max_model_size == "1000"

    def test_folder_is_named_as_such(self, tmp_path: Path) -> None:
        (tmp_path / "model.ubj").touch()
        assert refusal(tmp_path).message == "the model is a folder"


def change_tree(trained: Path, change: Callable[[dict[str, Any]], None]) -> bytes:
    model = json.loads((trained / "m.json").read_bytes())
    change(model["learner"])
    return json.dumps(model).encode()


def trees_of(learner: dict[str, Any]) -> list[dict[str, Any]]:
    return learner["gradient_booster"]["model"]["trees"]


def own_child(learner: dict[str, Any]) -> None:
    trees_of(learner)[1]["left_children"][0] = 0
    trees_of(learner)[1]["right_children"][0] = 1


def two_parents(learner: dict[str, Any]) -> None:
    tree = trees_of(learner)[1]
    first, *_, last = (node for node, child in enumerate(tree["left_children"]) if child > 0 and node > 0)
    tree["left_children"][last], tree["right_children"][last] = first, first + 1


def child_outside(learner: dict[str, Any]) -> None:
    tree = trees_of(learner)[0]
    tree["left_children"][0] = len(tree["left_children"]) + 7
    tree["right_children"][0] = len(tree["left_children"]) + 8


def unknown_feature(learner: dict[str, Any]) -> None:
    trees_of(learner)[0]["split_indices"][0] = 1_000_000


def unknown_output(learner: dict[str, Any]) -> None:
    learner["gradient_booster"]["model"]["tree_info"][1] = 9


def distant_sibling(learner: dict[str, Any]) -> None:
    trees_of(learner)[0]["right_children"][0] += 2


@pytest.mark.fault(102)
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (own_child, "tree 1: a child outside the nodes 1 to"),
        (two_parents, "tree 1: a node with two parents: the tree leads back to itself"),
        (child_outside, "tree 0: a child outside the nodes 1 to"),
        (unknown_feature, "tree 0: a split on a feature outside 0 to 3"),
        (unknown_output, "a tree for an output outside 0 to 0"),
        (distant_sibling, "tree 0: a right child that is not next to the left child"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_tree_that_leads_nowhere_is_refused(trained: Path, tmp_path: Path, change: Any, found: str) -> None:
    (tmp_path / "m.json").write_bytes(change_tree(trained, change))
    error = refusal(tmp_path / "m.json")
    assert error.message in ("the trees of the model are damaged", "xgboost cannot read the model")
    assert error.found.startswith(found) or error.message == "xgboost cannot read the model"


def many_features(learner: dict[str, Any]) -> None:
    learner["learner_model_param"]["num_feature"] = "2147483647"


def many_classes(learner: dict[str, Any]) -> None:
    learner["learner_model_param"]["num_class"] = "1000000000"
    learner["objective"] = {"name": "multi:softprob", "softmax_multiclass_param": {"num_class": "1000000000"}}


def many_targets(learner: dict[str, Any]) -> None:
    learner["learner_model_param"]["num_target"] = "1000000000"


def ubj(marker: str, count: int) -> bytes:
    """An object with a learner that claims ``count`` values, and has none of them."""
    head = b"{L" + struct.pack(">q", 7) + b"learner"
    return head + b"[$" + marker.encode() + b"#L" + struct.pack(">q", count)


BOMBS: dict[str, Callable[[Path], bytes]] = {
    "features.json": lambda trained: change_tree(trained, many_features),
    "classes.json": lambda trained: change_tree(trained, many_classes),
    "targets.json": lambda trained: change_tree(trained, many_targets),
    "floats.ubj": lambda _: ubj("d", 1 << 30),
    "bytes.ubj": lambda _: ubj("U", 1 << 33),
    "text.ubj": lambda _: b"{L" + struct.pack(">q", 7) + b"learnerSL" + struct.pack(">q", 1 << 33),
    "key.ubj": lambda _: b"{L" + struct.pack(">q", 7) + b"learner{L" + struct.pack(">q", 1 << 33),
}


@pytest.mark.fault(101)
@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_within_a_gibibyte(
    name: str, trained: Path, tmp_path: Path, children: Callable[[], list[int]]
) -> None:
    (tmp_path / name).write_bytes(BOMBS[name](trained))
    refusal(tmp_path / name)
    (memory,) = children()
    assert IMPORTS < memory < MEMORY


@pytest.mark.fault(101)
def test_bomb_is_refused_in_a_fork(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "is_running", lambda: True)
    (tmp_path / "m.json").write_bytes(change_tree(trained, many_features))
    assert "memory" in refusal(tmp_path / "m.json").message


def spin(_: object) -> None:
    while True:
        pass


@pytest.mark.fault(102)
def test_child_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    monkeypatch.setattr(forks, "is_running", lambda: True)
    monkeypatch.setattr(xgboost_probe, "_answer", spin)
    limits = xgboost_probe.Limits(memory=1 << 30, cpu_seconds=1)
    monkeypatch.setattr(xgboost_probe.Limits, "for_file", staticmethod(lambda nbytes: limits))
    with pytest.raises(ModelError, match="takes too long") as caught:
        xgboost_probe.probe((trained / "m.ubj").read_bytes(), where="m.ubj")
    assert caught.value.found == "more than 1 s of processor time"


def test_large_model_is_within_its_limits(tmp_path: Path, alone: None) -> None:
    """A model of some megabytes as JSON: the form that takes most memory per byte."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(3000, 8)).astype("f4")
    params = {"nthread": 1, "max_depth": 0, "max_leaves": 2000, "grow_policy": "lossguide", "min_child_weight": 0}
    booster = xgboost.train(params, xgboost.DMatrix(matrix, rng.normal(size=3000)), 20)
    booster.save_model(tmp_path / "m.json")
    assert (tmp_path / "m.json").stat().st_size > 3 << 20
    assert resolve(ModelRef(str(tmp_path / "m.json"))).trees == 20


@pytest.mark.fault(42)
def test_flipped_bits_crash_nothing(trained: Path, tmp_path: Path, children: Callable[[], list[int]]) -> None:
    """Whatever bit of a file is flipped: a version or a refusal, in seconds and a gibibyte, in a process of its own."""
    data = (trained / "m.ubj").read_bytes()
    chosen = random.Random(12)
    path = tmp_path / "m.ubj"
    for _ in range(MUTANTS):
        mutant = bytearray(data)
        mutant[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        path.write_bytes(mutant)
        started = time.monotonic()
        with suppress(ModelError, RefusedForSafety):
            resolve(ModelRef(str(path)))
        assert time.monotonic() - started < SECONDS
    assert IMPORTS < max(children()) < MEMORY
