"""Contract of transactional sinks: a process that dies at any operation, or a second driver there, costs no row.

A sink describes itself with a `SinkCase`. Each function publishes small jobs to its target, in all modes of the case::

    CASE = SinkCase("mine", fields=…, read=…, seed=…, reset=…, adapter=MySink, modes=("error", "append"))

    @pytest.mark.parametrize("world", worlds(CASE), ids=str)
    def test_crashes(world, tmp_path):
        assert sweep_crashes(world, tmp_path) > 3

"Readers" are `SinkCase.read`: they see the rows of before or the new ones, whatever happens.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import ConflictError, Fenced, StorageError
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.manifest import Manifest
from pipeline.sinks.transactional import TransactionalSink
from pipeline.testing.jobs import OUTPUT_SCHEMA, SmallJob, open_retry, small_job, write_receipts

Fields = dict[str, Any]
MODES = ("error", "append", "overwrite", "replace", "merge")
_EXISTING = {0: -1.0, 1: -1.0, 3: -1.0, 1000: -2.0, 1001: -2.0}
"""Score by id of the rows that exist before the job."""
_WHERE, _LIMIT = "id < 500", 500
_BAD_EVERY = 7


@dataclass(frozen=True)
class SinkCase:
    """A sink under test."""

    name: str
    fields: Callable[[Path], Fields]
    """Fields of ``sink`` for a target of its own below a folder, without ``mode``, ``key`` and ``where``."""
    read: Callable[[Fields], pa.Table]
    """Return the columns ``id`` and ``p`` of the rows that readers see; no rows if there is no target."""
    seed: Callable[[Fields, pa.Table], object]
    """Create the target with these rows, by other means than the sink."""
    reset: Callable[[Fields], object]
    """Remove the target with everything that publishing leaves in it."""
    adapter: Callable[[], TransactionalSink[Any]]
    modes: tuple[str, ...] = MODES
    impatient: Callable[[], TransactionalSink[Any]] | None = None
    """Adapter that fails at once where it would have to wait for another publisher. Default: ``adapter``."""


@dataclass(frozen=True)
class SinkWorld:
    """A case in one mode, with or without rows in the target."""

    case: SinkCase
    mode: str
    exists: bool
    repairs: bool = False
    """True: the job is published, and the publication of a retry is what crashes."""

    def __str__(self) -> str:
        return "-".join(
            [self.case.name, self.mode, "existing" if self.exists else "new", *(["retry"] if self.repairs else [])]
        )

    def expected(self, rows: pa.Table) -> dict[int, list[float]]:
        """Return the rows that readers must see in the end, as scores by id."""
        own = _scores(rows)
        before = {key: [value] for key, value in _EXISTING.items()} if self.exists else {}
        if self.mode == "append":
            return {key: sorted([*before.get(key, []), *own.get(key, [])]) for key in before | own}
        if self.mode == "replace":
            before = {key: value for key, value in before.items() if key >= _LIMIT}
        return own if self.mode in ("error", "overwrite") else before | own


def worlds(*cases: SinkCase, repairs: bool = False) -> list[SinkWorld]:
    """Return all worlds of the cases: each mode with a new target, and with one that has rows."""
    return [
        SinkWorld(case, mode, exists, repairs)
        for case in cases
        for mode in case.modes
        for exists in ((False,) if mode == "error" else (False, True))
    ]


@dataclass
class _Stage:
    """A committed job, and its target."""

    world: SinkWorld
    job: SmallJob
    directory: JobDirectory
    manifests: list[Manifest]
    fields: Fields
    healed: pa.Table = field(default_factory=OUTPUT_SCHEMA.empty_table)

    @staticmethod
    def make(world: SinkWorld, folder: Path) -> _Stage:
        fields = world.case.fields(folder)
        options = {"key": ["id"]} if world.mode == "merge" else {"where": _WHERE} if world.mode == "replace" else {}
        job = small_job(
            folder / "in", sink={**fields, **options}, mode=world.mode, bad_every=_BAD_EVERY if world.repairs else 0
        )
        directory = JobDirectory.create(folder / "jobs", job.plan, job="small-1", options=JobOptions(fsync=False))
        write_receipts(directory, job)
        stage = _Stage(world, job, directory, [_commit(directory)], fields)
        if world.repairs:
            healthy = replace(job, bad_every=0)
            open_retry(directory)
            write_receipts(directory, healthy)
            stage.manifests.append(_commit(directory))
            stage.healed = healthy.expected
        else:
            stage.healed = job.expected
        return stage

    def begin(self) -> None:
        """Put target and job directory into the state before the publication under test."""
        self.world.case.reset(self.fields)
        shutil.rmtree(Path(self.directory.root) / layout.PUBLICATIONS, ignore_errors=True)
        if self.world.exists:
            ids = pa.array(_EXISTING.keys(), pa.int64())
            values = pa.array(_EXISTING.values(), pa.float32())
            self.world.case.seed(self.fields, pa.table([ids, values], schema=OUTPUT_SCHEMA))
        if self.world.repairs:
            self.world.case.adapter().publish(self.manifests[0], self.directory)

    def rows(self) -> dict[int, list[float]]:
        return _scores(self.world.case.read(self.fields))

    def check_readers(self, before: dict[int, list[float]], *, point: int) -> None:
        seen = self.rows()
        assert seen in (before, self.world.expected(self.healed)), f"readers see a part of the rows after {point}"

    def check_resumed(self, *, point: int) -> None:
        """Publish again, as a resume does, and once more."""
        manifest, case = self.manifests[-1], self.world.case
        case.adapter().publish(manifest, self.directory)
        assert self.rows() == self.world.expected(self.healed), f"other rows after a resume from operation {point}"
        again = case.adapter().publish(manifest, self.directory)
        assert not again.is_new
        assert again.rows == manifest.rows.output
        found = case.adapter().read_published(manifest, self.directory)
        assert found is not None
        assert not case.adapter().leftovers(self.directory)
        # The target knows by itself, should the record be lost.
        shutil.rmtree(Path(self.directory.root) / layout.PUBLICATIONS)
        assert not case.adapter().publish(manifest, self.directory).is_new
        assert self.rows() == self.world.expected(self.healed), f"doubled rows after operation {point}"
        case.adapter().verify(manifest, self.directory)


def sweep_crashes(world: SinkWorld, folder: Path, *, first: int = 1, step: int = 1) -> int:
    """Kill the publishing process at each operation in turn, publish again, compare. Return the number of operations.

    :param first: first operation at which to kill; then each ``step``-th.
    """
    stage = _Stage.make(world, folder)
    for point in itertools.count(first, step):
        stage.begin()
        before = stage.rows()
        is_dead = _publish_and_die(stage, at=point)
        stage.check_readers(before, point=point)
        stage.check_resumed(point=point)
        if not is_dead:
            return point - 1
    raise AssertionError


def sweep_two_drivers(world: SinkWorld, folder: Path, *, first: int = 1, step: int = 1) -> int:
    """Let another driver publish at each operation of one in turn. Return the number of operations."""
    stage = _Stage.make(world, folder)
    impatient = world.case.impatient or world.case.adapter
    for point in itertools.count(first, step):
        stage.begin()

        def publish_beside() -> None:
            # Where the first one holds a lock, the second gives up.
            with suppress(ConflictError, StorageError):
                impatient().publish(stage.manifests[-1], stage.directory)

        adapter = impatient()
        is_reached = _interrupt(adapter, at=point, action=publish_beside)
        with suppress(StorageError):
            adapter.publish(stage.manifests[-1], stage.directory)
        stage.check_resumed(point=point)
        if not is_reached():
            return point - 1
    raise AssertionError


def check_fenced(world: SinkWorld, folder: Path) -> None:
    """Let the lease be lost before the commit: nothing changes for readers."""
    stage = _Stage.make(world, folder)
    stage.begin()
    before = stage.rows()

    def lost() -> None:
        raise Fenced("another driver has taken over")

    try:
        world.case.adapter().publish(stage.manifests[-1], stage.directory, check_lease=lost)
    except Fenced:
        pass
    else:
        raise AssertionError("a driver without a lease has published")
    assert stage.rows() == before
    stage.check_resumed(point=0)


def check_lost_rows(world: SinkWorld, folder: Path) -> None:
    """Change the target behind the job's back: `verify` must say so."""
    stage = _Stage.make(world, folder)
    stage.begin()
    stage.check_resumed(point=0)
    stage.world.case.reset(stage.fields)
    try:
        world.case.adapter().verify(stage.manifests[-1], stage.directory)
    except (ConflictError, StorageError):
        return
    raise AssertionError("verify does not see that the rows are gone")


def _publish_and_die(stage: _Stage, *, at: int) -> bool:
    """Publish in a forked process that kills itself at an operation. Return False if it came to its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, of which the child uses none
        child = os.fork()
    if not child:
        try:
            adapter = stage.world.case.adapter()
            _interrupt(adapter, at=at, action=_die)
            adapter.publish(stage.manifests[-1], stage.directory)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "publishing failed"
    return os.WIFSIGNALED(status)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt(adapter: TransactionalSink[Any], *, at: int, action: Callable[[], object]) -> Callable[[], bool]:
    """Let ``adapter`` call ``action`` at its ``at``-th operation. Return a function that tells if it came to it."""
    counter: Iterator[int] = itertools.count(1)
    done: list[int] = []

    def reached(step: str) -> None:
        if next(counter) == at:
            done.append(at)
            action()

    adapter.reached = reached  # type: ignore[method-assign]
    return lambda: bool(done)


def _commit(directory: JobDirectory) -> Manifest:
    return directory.manifests.commit(directory.manifests.prepare(directory.ledger())).manifest


def _scores(rows: pa.Table) -> dict[int, list[float]]:
    """Return the scores of each id, sorted."""
    scores: dict[int, list[float]] = {}
    for key, value in zip(rows["id"].to_pylist(), rows["p"].to_pylist(), strict=True):
        scores.setdefault(key, []).append(value)
    return {key: sorted(values) for key, values in sorted(scores.items())}
