"""A job (directory, lease, receipts, manifest, output, report) that fails at every storage operation in turn.

At the k-th operation, for every k, the process dies, or the storage fails once or for good, or the operation is done
but its reply is lost; the power is cut at every step. The next run ends with exactly the expected rows, and until then
a reader finds what was published before, or all of the new, and never a mixture.

Kinds of faults take turns: per commit each operation of each mode meets one kind of every three, and with
``HYPOTHESIS_PROFILE=long`` all of them.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.common.checksum import checksum_bytes
from pipeline.common.digest import digest_bytes
from pipeline.errors import PipelineError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.sinks.lock import sink_lock
from pipeline.sinks.parquet import layout, swap
from pipeline.sinks.parquet.sink import ParquetSink
from pipeline.storage.store import open_store
from pipeline.testing.examples import IS_LONG
from pipeline.testing.jobs import SmallJob, drive, read_output, small_job
from pipeline.testing.memory_store import MemoryDisk, MemoryStore
from pipeline.testing.stores import Crash, Faults, FaultyStore, MakeError, disk_full, faulty_os, io_error

JOB = "sweep-1"
OLD_ROWS = (4,)
NEW_ROWS = (7, 5)


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of fsyncs take minutes; they are still counted, and still fail."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def survived() -> suppress:
    """Suppress the errors that end a process at a fault."""
    return suppress(Crash, PipelineError, OSError)


class World:
    """A lake, an output that may be there before, and a job that publishes over it."""

    def __init__(self, folder: Path, *, mode: str, sink: str = "", **sink_fields: object) -> None:
        self.folder = folder
        self.mode = mode
        self.sink = sink or str(folder / "out")
        self.old = small_job(folder / "old", sink=self.sink, rows=OLD_ROWS)
        self.new = small_job(folder / "lake", sink=self.sink, mode=mode, rows=NEW_ROWS, start=100, **sink_fields)
        self.saved = folder / "saved"
        if mode != "error":
            self.run(self.old, "old-1")
            if os.path.isdir(self.sink):
                shutil.copytree(self.sink, self.saved)

    def reset(self) -> None:
        """Back to before the job."""
        shutil.rmtree(self.folder / "jobs", ignore_errors=True)
        for place in (Path(self.sink), *self.folder.glob(".*")):
            shutil.rmtree(place, ignore_errors=True)
        if self.saved.exists():
            shutil.copytree(self.saved, self.sink)

    @property
    def jobs(self) -> str:
        """Root of the job directories."""
        return str(self.folder / "jobs")

    def run(self, job: SmallJob, name: str, *, faults: Faults | None = None, is_reply_lost: bool = False) -> None:
        """From nothing, or from where it was, to the end. ``faults`` strike at the verbs of the stores."""

        def opened(path: str, *, private: bool = False) -> Any:
            return FaultyStore(open_store(path, private=private), faults or Faults(), is_reply_lost=is_reply_lost)

        store = opened(f"{self.jobs}/{name}", private=True)
        directory = JobDirectory.open_or_create(self.jobs, job.plan, job=name, store=store)
        drive(job, directory, sink=ParquetSink(opened))

    @property
    def before(self) -> pa.Table | None:
        return None if self.mode == "error" else self.old.expected

    @property
    def after(self) -> pa.Table:
        if self.mode != "append":
            return self.new.expected
        return pa.concat_tables([self.old.expected, self.new.expected]).combine_chunks()

    def naive(self) -> pa.Table | None:
        """Return the rows that a reader of the folder finds; None when there is nothing."""
        if not os.path.isdir(self.sink) or not os.listdir(self.sink):
            return None
        return read_output(self.sink).sort_by("id")

    def by_manifest(self) -> pa.Table | None:
        """Return the rows that the manifest leads to; its checksums must hold."""
        place = Path(self.sink) / layout.MANIFEST
        if not place.exists():
            return None
        state = layout.SinkState.from_json(place.read_bytes(), where="")
        for file in state.files:
            assert checksum_bytes((place.parent / file.name).read_bytes()) == file.checksum
        tables = [pq.read_table(place.parent / file.name, use_threads=False) for file in state.files]
        return pa.concat_tables(tables).combine_chunks().sort_by("id")

    def is_success(self) -> bool:
        """Return True if there is a ``_SUCCESS`` of the manifest."""
        place = Path(self.sink)
        if not (place / layout.SUCCESS).exists():
            return False
        text = json.loads((place / layout.SUCCESS).read_text())
        return bool(text["manifest_sha256"] == digest_bytes((place / layout.MANIFEST).read_bytes()))

    def check_half(self, *, is_atomic: bool) -> None:
        """After a fault: old or new, never a mixture."""
        allowed = (self.before, self.after)
        assert self.by_manifest() in allowed
        if is_atomic or self.is_success():
            assert self.naive() in allowed

    def check_done(self) -> None:
        """At the end: the expected rows, once, for every kind of reader, and no litter."""
        assert self.naive() == self.after
        assert self.by_manifest() == self.after
        assert self.is_success()
        self.check_job(JobDirectory.open(f"{self.jobs}/{JOB}"))
        with sink_lock(Path(self.sink), job="next", timeout=0):
            pass  # as whoever publishes next: a lock file whose removal failed is taken, and removed
        assert [name for name in os.listdir(self.folder) if name.startswith(".")] == []
        assert [name for name in os.listdir(self.sink) if name.startswith(".") and not name.endswith(".tmp")] == []

    def check_job(self, directory: JobDirectory) -> None:
        """One commit, a report that adds up, and the status of a job that ended well."""
        assert directory.status() is Status.SUCCEEDED
        assert directory.manifests.numbers() == [1]
        report = directory.read_report()
        assert report is not None
        assert report["rows"] == {"in": sum(NEW_ROWS), "out": sum(NEW_ROWS), "rejected": 0, "filtered": 0}


class ObjectWorld(World):
    """The same where there are no links and renames: job directory and sink are on an object store."""

    def __init__(self, folder: Path, *, mode: str) -> None:
        self.fs = fsspec.filesystem("memory")
        self.fs.store.clear()
        super().__init__(folder, mode=mode, sink="memory://sweep/out")
        self.kept = {name: self.fs.cat_file(name) for name in self.fs.find("/") if name.startswith("/sweep/out")}

    @property
    def jobs(self) -> str:
        return "memory://sweep/jobs"

    def reset(self) -> None:
        self.fs.store.clear()
        for name, content in self.kept.items():
            self.fs.pipe_file(name, content)

    def naive(self) -> pa.Table | None:
        return read_output(self.sink).sort_by("id") if self.fs.glob("/sweep/out/*.parquet") else None

    def by_manifest(self) -> pa.Table | None:
        store = open_store(self.sink)
        state = layout.read_state(store)
        if state is None:
            return None
        contents = [store.read(file.name) for file in state.files]
        assert [checksum_bytes(content) for content in contents] == [file.checksum for file in state.files]
        tables = [pq.read_table(io.BytesIO(content), use_threads=False) for content in contents]
        return pa.concat_tables(tables).replace_schema_metadata(None).combine_chunks().sort_by("id")

    def is_success(self) -> bool:
        store = open_store(self.sink)
        if not store.exists(layout.SUCCESS):
            return False
        text = json.loads(store.read(layout.SUCCESS))
        return bool(text["manifest_sha256"] == digest_bytes(store.read(layout.MANIFEST)))

    def check_done(self) -> None:
        assert self.naive() == self.after
        assert self.by_manifest() == self.after
        assert self.is_success()
        self.check_job(JobDirectory.open(f"{self.jobs}/{JOB}"))


def turns(number: int, *, of: int) -> itertools.count[int]:
    """The operations at which kind ``number`` of ``of`` kinds of faults strikes: those of its turn, or all of them."""
    return itertools.count() if IS_LONG else itertools.count(number % of, of)


def turns_of(mode: str, fault: str) -> itertools.count[int]:
    """The operations of a mode at which a kind of fault strikes: every third, and another third in each mode."""
    return turns(list(VERB_FAULTS).index(fault) + MODES.index(mode), of=3)


def sweep(
    here: World,
    strike: Callable[[World, Faults], None],
    *,
    fault: MakeError,
    is_permanent: bool,
    is_atomic: bool,
    steps: Iterable[int],
) -> int:
    """Fail at each of the operations ``steps`` until a run meets none; the number of operations, or some more."""
    for step in steps:
        here.reset()
        faults = Faults(step, fault=fault, is_permanent=is_permanent)
        strike(here, faults)
        here.check_half(is_atomic=is_atomic)
        here.run(here.new, JOB)
        here.check_done()
        if not faults.has_failed:
            return step
    raise AssertionError("no run met no fault")


def strike_store(world: World, faults: Faults) -> None:
    with survived():
        world.run(world.new, JOB, faults=faults)


def lose_reply(world: World, faults: Faults) -> None:
    with survived():
        world.run(world.new, JOB, faults=faults, is_reply_lost=True)


def strike_os(world: World, faults: Faults) -> None:
    with survived(), faulty_os(faults):
        world.run(world.new, JOB)


FAULTS = {"crash": (Crash, False), "once": (io_error, False), "for good": (disk_full, True)}
"""Fault at an operation: the process dies, it fails, it and all that follow fail."""
VERB_FAULTS = {
    **{name: (strike_store, *fault) for name, fault in FAULTS.items()},
    "reply lost": (lose_reply, io_error, False),
    "reply lost, then death": (lose_reply, Crash, False),
    "reply lost, then nothing works": (lose_reply, io_error, True),
}
"""The same for verbs, which also may be done without anybody learning of it."""
MODES = ["error", "overwrite", "append"]


@pytest.mark.parametrize("fault", VERB_FAULTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.fault(3, 9, 30, 33)
def test_every_verb(tmp_path: Path, mode: str, fault: str) -> None:
    strike, kind, is_permanent = VERB_FAULTS[fault]
    world = World(tmp_path, mode=mode)
    assert (
        sweep(
            world,
            strike,
            fault=kind,
            is_permanent=is_permanent,
            is_atomic=mode != "append",
            steps=turns_of(mode, fault),
        )
        > 40
    )


@pytest.mark.parametrize("fault", VERB_FAULTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.fault(3, 9, 30, 33)
def test_every_verb_on_an_object_store(tmp_path: Path, mode: str, fault: str) -> None:
    strike, kind, is_permanent = VERB_FAULTS[fault]
    world = ObjectWorld(tmp_path, mode=mode)
    assert (
        sweep(world, strike, fault=kind, is_permanent=is_permanent, is_atomic=False, steps=turns_of(mode, fault)) > 40
    )


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.fault(9, 30)
def test_every_system_call(tmp_path: Path, mode: str, fault: str) -> None:
    kind, is_permanent = FAULTS[fault]
    world = World(tmp_path, mode=mode)
    assert (
        sweep(
            world,
            strike_os,
            fault=kind,
            is_permanent=is_permanent,
            is_atomic=mode != "append",
            steps=turns_of(mode, fault),
        )
        > 100
    )


@pytest.mark.parametrize("mode", ["error", "overwrite"])
@pytest.mark.fault(9)
def test_every_system_call_where_folders_cannot_be_swapped(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "rename_exchange", lambda *_: errno.EINVAL)
    monkeypatch.setattr(os.path, "ismount", lambda *_: True)
    steps = turns(MODES.index(mode), of=2)
    world = World(tmp_path, mode=mode)
    assert sweep(world, strike_os, fault=Crash, is_permanent=False, is_atomic=False, steps=steps) > 100


@pytest.mark.parametrize("mode", ["overwrite", "append"])
@pytest.mark.fault(9)
def test_every_system_call_of_merging(tmp_path: Path, mode: str) -> None:
    world = World(tmp_path, mode=mode, target_file_size="1 MiB")
    steps = turns(MODES.index(mode), of=2)
    assert sweep(world, strike_os, fault=Crash, is_permanent=False, is_atomic=mode != "append", steps=steps) > 100


SURVIVORS = {
    "nothing that was not synced": lambda name: False,
    "everything": lambda name: True,
    "some of it": lambda name: zlib.crc32(name.encode()) % 2 == 0,
}


@pytest.mark.parametrize("survivors", SURVIVORS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.fault(9, 31)
def test_a_power_cut_at_every_step(tmp_path: Path, mode: str, survivors: str) -> None:
    """On a file system that keeps no more than was synced. What a job of yesterday published stays."""
    old = small_job(tmp_path / "old", sink="memory://model/out", rows=OLD_ROWS)
    new = small_job(tmp_path / "lake", sink="memory://model/out", mode=mode, rows=NEW_ROWS, start=100)
    before = old.expected if mode != "error" else None
    after = pa.concat_tables([old.expected, new.expected]).combine_chunks() if mode == "append" else new.expected
    published = MemoryDisk()
    if mode != "error":
        run_on(published, old, "old-1")
    for steps in turns(list(SURVIVORS).index(survivors) + MODES.index(mode), of=3):
        disk = deepcopy(published)
        disk.steps_left = steps
        with survived():
            run_on(disk, new, JOB)
        is_struck = disk.is_dark
        disk.restart(survives=SURVIVORS[survivors])
        assert rows_on(disk) in (before, after)
        run_on(disk, new, JOB)
        assert rows_on(disk) == after
        if not is_struck:
            break
    assert steps > 100


def run_on(disk: MemoryDisk, job: SmallJob, name: str) -> None:
    store: Any = MemoryStore(disk, f"jobs/{name}")
    directory = JobDirectory.open_or_create("jobs", job.plan, job=name, store=store)
    drive(job, directory, sink=ParquetSink(lambda path: MemoryStore(disk, "out")))


def rows_on(disk: MemoryDisk) -> pa.Table | None:
    """Return the rows that a reader of the manifest finds."""
    store = MemoryStore(disk, "out")
    if not store.exists(layout.MANIFEST):
        return None
    state = layout.SinkState.from_json(store.read(layout.MANIFEST), where="")
    tables = [pq.read_table(io.BytesIO(store.read(file.name)), use_threads=False) for file in state.files]
    return pa.concat_tables(tables).replace_schema_metadata(None).combine_chunks().sort_by("id")
