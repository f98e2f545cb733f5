"""A job from its directory to its published output, dying at every storage operation in turn, then run again.

Whatever the operation: the next run ends with exactly the expected rows, and until then a reader finds what was
published before, or all of the new, and never a mixture.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.checkpoint import JobDirectory
from pipeline.digest import digest_bytes
from pipeline.errors import PipelineError
from pipeline.files import open_store
from pipeline.sinks import layout, swap
from pipeline.sinks.parquet import ParquetSink
from pipeline.testing.jobs import SmallJob, read_output, small_job, write_receipts
from pipeline.testing.stores import Crash, Fault, Faults, FaultyStore, disk_full, faulty_os, io_error

JOB = "sweep-1"
OLD_ROWS = (4,)
NEW_ROWS = (7, 5)


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of fsyncs take minutes; they are still counted, and still fail."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def survived() -> suppress:
    """What ends a process that meets a fault."""
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

    def run(self, job: SmallJob, name: str, *, faults: Faults | None = None) -> None:
        """From nothing, or from where it was, to the end. ``faults`` strike at the verbs of the stores."""

        def opened(path: str, *, private: bool = False) -> FaultyStore:
            store = open_store(path, private=private)
            return FaultyStore(store, faults or Faults())

        store = opened(str(self.folder / "jobs" / name), private=True)
        directory = JobDirectory.open_or_create(self.folder / "jobs", job.plan, job=name, store=store)  # type: ignore[arg-type]
        receipts = write_receipts(directory, job)
        manifest = directory.commit_manifest(directory.next_manifest(receipts)).manifest
        ParquetSink(opened).publish(manifest, directory)  # type: ignore[arg-type]

    @property
    def before(self) -> pa.Table | None:
        return None if self.mode == "error" else self.old.expected

    @property
    def after(self) -> pa.Table:
        if self.mode != "append":
            return self.new.expected
        return pa.concat_tables([self.old.expected, self.new.expected]).combine_chunks()

    def naive(self) -> pa.Table | None:
        """What a reader of the folder finds; None when there is nothing."""
        if not os.path.isdir(self.sink) or not os.listdir(self.sink):
            return None
        return read_output(self.sink).sort_by("id")

    def by_manifest(self) -> pa.Table | None:
        """What a reader finds who goes through the manifest; its checksums must hold."""
        place = Path(self.sink) / layout.MANIFEST
        if not place.exists():
            return None
        state = layout.SinkState.from_json(place.read_bytes(), where="")
        for file in state.files:
            assert digest_bytes((place.parent / file.name).read_bytes()) == file.sha256
        tables = [pq.read_table(place.parent / file.name) for file in state.files]
        return pa.concat_tables(tables).combine_chunks().sort_by("id")

    def is_success(self) -> bool:
        """Whether there is a ``_SUCCESS`` that is of the manifest."""
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
        assert [name for name in os.listdir(self.folder) if name.startswith(".")] == []
        assert [name for name in os.listdir(self.sink) if name.startswith(".") and not name.endswith(".tmp")] == []


def sweep(
    tmp_path: Path,
    strike: Callable[[World, Faults], None],
    *,
    fault: Fault,
    is_permanent: bool,
    is_atomic: bool,
    **world: object,
) -> int:
    """Fail at operation 0, 1, 2 … until a run meets none; the number of operations."""
    step = 0
    here = World(tmp_path, **world)  # type: ignore[arg-type]
    while True:
        here.reset()
        faults = Faults(step, fault=fault, is_permanent=is_permanent)
        strike(here, faults)
        here.check_half(is_atomic=is_atomic)
        here.run(here.new, JOB)
        here.check_done()
        if not faults.has_failed:
            return step
        step += 1


def strike_store(world: World, faults: Faults) -> None:
    with survived():
        world.run(world.new, JOB, faults=faults)


def strike_os(world: World, faults: Faults) -> None:
    with survived(), faulty_os(faults):
        world.run(world.new, JOB)


FAULTS = {"crash": (Crash, False), "once": (io_error, False), "for good": (disk_full, True)}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", ["error", "overwrite", "append"])
@pytest.mark.fault(9, 30)
def test_every_verb(tmp_path: Path, mode: str, fault: str) -> None:
    kind, is_permanent = FAULTS[fault]
    steps = sweep(tmp_path, strike_store, fault=kind, is_permanent=is_permanent, is_atomic=mode != "append", mode=mode)
    assert steps > 20


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", ["error", "overwrite", "append"])
@pytest.mark.fault(9, 30)
def test_every_system_call(tmp_path: Path, mode: str, fault: str) -> None:
    kind, is_permanent = FAULTS[fault]
    steps = sweep(tmp_path, strike_os, fault=kind, is_permanent=is_permanent, is_atomic=mode != "append", mode=mode)
    assert steps > 60


@pytest.mark.parametrize("mode", ["error", "overwrite"])
@pytest.mark.fault(9)
def test_every_system_call_where_folders_cannot_be_swapped(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "rename_exchange", lambda *_: errno.EINVAL)
    monkeypatch.setattr(os.path, "ismount", lambda *_: True)
    assert sweep(tmp_path, strike_os, fault=Crash, is_permanent=False, is_atomic=False, mode=mode) > 60


@pytest.mark.parametrize("mode", ["overwrite", "append"])
@pytest.mark.fault(9)
def test_every_system_call_of_merging(tmp_path: Path, mode: str) -> None:
    steps = sweep(
        tmp_path,
        strike_os,
        fault=Crash,
        is_permanent=False,
        is_atomic=mode != "append",
        mode=mode,
        target_file_size="1 MiB",
    )
    assert steps > 60


@pytest.mark.parametrize("is_reply_lost", [False, True])
@pytest.mark.parametrize("mode", ["error", "overwrite", "append"])
@pytest.mark.fault(9, 33)
def test_every_verb_on_an_object_store(tmp_path: Path, mode: str, is_reply_lost: bool) -> None:
    """Publishing to a store without links and renames: the end is right, whichever reply is lost."""
    step = 0
    while True:
        url = f"memory://sweep-{mode}-{is_reply_lost}-{step}/out"
        world = World(tmp_path / str(step), mode=mode, sink=url)
        faults = Faults(step)

        def opened(path: str, *, struck: Faults = faults) -> FaultyStore:
            return FaultyStore(open_store(path), struck, is_reply_lost=is_reply_lost)

        directory = JobDirectory.open_or_create(world.folder / "jobs", world.new.plan, job=JOB)
        manifest = directory.next_manifest(write_receipts(directory, world.new))
        with survived():
            ParquetSink(opened).publish(manifest, directory)  # type: ignore[arg-type]
        world.run(world.new, JOB)
        assert read_output(url).sort_by("id") == world.after
        state = layout.read_state(open_store(url))
        assert state is not None
        assert sum(file.rows for file in state.files) == world.after.num_rows
        if not faults.has_failed:
            break
        step += 1
    assert step > 6
