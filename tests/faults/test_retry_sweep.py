"""A retry that dies at every storage operation in turn and runs again: the output is repaired, row for row.

Until then a reader finds the output as it was before the retry, or repaired, and never a mixture; and what others
published to the same folder stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
import pytest
from test_commit_sweep import FAULTS, JOB, MODES, SURVIVORS, World, rows_on, run_on, survived, turns, turns_of

from pipeline.driver.retry import RetryRequest, open_retry
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.settings import Settings
from pipeline.sinks.parquet import layout, swap
from pipeline.sinks.parquet.sink import ParquetSink
from pipeline.storage.store import open_store
from pipeline.testing.jobs import SmallJob, drive, read_output, small_job
from pipeline.testing.memory_store import MemoryDisk, MemoryStore
from pipeline.testing.stores import Crash, Faults, FaultyStore, faulty_os

pytestmark = [pytest.mark.slow, pytest.mark.fault(9)]
SETTINGS = Settings.load(workers=1, threads=1, memory_limit="1 GiB")


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of fsyncs take minutes; they are still counted, and still fail."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Repairing(World):
    """A job that published with warnings, perhaps beside another one's output, and what makes its bad rows good."""

    def __init__(self, folder: Path, *, mode: str, sink: str = "", **sink_fields: object) -> None:
        super().__init__(folder, mode=mode, sink=sink, **sink_fields)
        self.bad = replace(self.new, bad_every=4)
        self.run(self.bad, JOB)
        shutil.rmtree(self.saved, ignore_errors=True)
        self.saved_jobs = folder / "saved-jobs"
        shutil.copytree(folder / "jobs", self.saved_jobs)
        if os.path.isdir(self.sink):
            shutil.copytree(self.sink, self.saved)

    def reset(self) -> None:
        super().reset()
        shutil.copytree(self.saved_jobs, self.folder / "jobs")

    @property
    def before(self) -> pa.Table:
        return self._with_old(self.bad)

    @property
    def after(self) -> pa.Table:
        return self._with_old(self.new)

    def _with_old(self, job: SmallJob) -> pa.Table:
        tables = [self.old.expected, job.expected] if self.mode == "append" else [job.expected]
        return pa.concat_tables(tables).combine_chunks().sort_by("id")

    def repair(self, *, faults: Faults | None = None, is_reply_lost: bool = False) -> None:
        """Run a driver of ``retry`` from the job's present state to its end."""

        def opened(path: str, *, private: bool = False) -> FaultyStore:
            return FaultyStore(open_store(path, private=private), faults or Faults(), is_reply_lost=is_reply_lost)

        store = opened(str(self.folder / "jobs" / JOB), private=True)
        directory = JobDirectory.open(store.root, store=store)  # type: ignore[arg-type]
        open_retry(directory, RetryRequest(), epoch=2, settings=SETTINGS)
        drive(self.new, directory, sink=ParquetSink(opened))  # type: ignore[arg-type]

    def check_job(self, directory: JobDirectory) -> None:
        """A second commit, in which nothing is rejected any more."""
        assert directory.status() is Status.SUCCEEDED
        manifest = directory.manifests.last()
        assert manifest is not None
        assert (manifest.rows.rejected, manifest.rejects) == (0, ())
        assert directory.is_ended


def sweep(
    tmp_path: Path,
    strike: Callable[[Repairing, Faults], None],
    *,
    fault: str,
    is_atomic: bool,
    steps: Iterable[int],
    **world: object,
) -> int:
    """Fail at each of the operations ``steps`` until a retry meets none; the number of operations, or some more."""
    here = Repairing(tmp_path, **world)  # type: ignore[arg-type]
    kind, is_permanent = FAULTS[fault]
    for step in steps:
        here.reset()
        faults = Faults(step, fault=kind, is_permanent=is_permanent)
        strike(here, faults)
        here.check_half(is_atomic=is_atomic)
        here.repair()
        here.check_done()
        if not faults.has_failed:
            return step
    raise AssertionError("no retry met no fault")


def strike_store(world: Repairing, faults: Faults) -> None:
    with survived():
        world.repair(faults=faults)


def strike_os(world: Repairing, faults: Faults) -> None:
    with survived(), faulty_os(faults):
        world.repair()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_verb(tmp_path: Path, mode: str, fault: str) -> None:
    steps = turns_of(mode, fault)
    assert sweep(tmp_path, strike_store, fault=fault, is_atomic=mode != "append", steps=steps, mode=mode) > 30


@pytest.mark.parametrize("mode", MODES)
def test_every_system_call(tmp_path: Path, mode: str) -> None:
    steps = turns(MODES.index(mode), of=2)
    assert sweep(tmp_path, strike_os, fault="crash", is_atomic=mode != "append", steps=steps, mode=mode) > 60


def test_every_system_call_where_folders_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "rename_exchange", lambda *_: 22)
    assert sweep(tmp_path, strike_os, fault="crash", is_atomic=False, steps=turns(0, of=2), mode="error") > 60


def test_every_system_call_of_merging(tmp_path: Path) -> None:
    fields = {"mode": "overwrite", "target_file_size": "1 MiB"}
    assert sweep(tmp_path, strike_os, fault="crash", is_atomic=True, steps=turns(1, of=2), **fields) > 60


@pytest.mark.parametrize("is_reply_lost", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_verb_on_an_object_store(tmp_path: Path, mode: str, is_reply_lost: bool) -> None:
    """Job directory on a local disk, output on a store without links and renames; replies of either may be lost."""
    url = f"memory://repair-{mode}-{is_reply_lost}/out"
    world = Repairing(tmp_path, mode=mode, sink=url)
    objects = fsspec.filesystem("memory")
    published = {name: objects.cat_file(name) for name in objects.find(url)}
    for step in turns(MODES.index(mode) + is_reply_lost, of=2):
        world.reset()
        objects.rm(url, recursive=True)
        for name, content in published.items():
            objects.pipe_file(name, content)
        faults = Faults(step)
        with survived():
            world.repair(faults=faults, is_reply_lost=is_reply_lost)
        assert world_by_manifest(url) in (world.before, world.after)
        world.repair()
        assert read_output(url).sort_by("id") == world.after
        state = layout.read_state(open_store(url))
        assert state is not None
        assert [one.manifest for one in state.publications if one.job == JOB] == [2]
        assert open_store(url).read(layout.SUCCESS) == layout.success_text(state)
        if not faults.has_failed:
            break
    assert step > 30


def world_by_manifest(url: str) -> pa.Table:
    """Return the rows that the manifest leads to."""
    import io

    import pyarrow.parquet as pq

    store = open_store(url)
    state = layout.read_state(store)
    assert state is not None
    tables = [pq.read_table(io.BytesIO(store.read(file.name)), use_threads=False) for file in state.files]
    return pa.concat_tables(tables).replace_schema_metadata(None).combine_chunks().sort_by("id")


def test_overwritten_output_is_not_restored(tmp_path: Path) -> None:
    world = Repairing(tmp_path, mode="overwrite")
    other = small_job(tmp_path / "other", sink=world.sink, mode="overwrite", rows=(3,), start=900)
    world.run(other, "other-1")
    with pytest.raises(Exception, match="cannot repair the output"):
        world.repair()
    assert world.naive() == other.expected


def test_later_appends_stay(tmp_path: Path) -> None:
    world = Repairing(tmp_path, mode="error")
    other = small_job(tmp_path / "other", sink=world.sink, mode="append", rows=(3,), start=900)
    world.run(other, "other-1")
    with suppress(Crash):
        world.repair()
    expected = pa.concat_tables([world.new.expected, other.expected]).combine_chunks().sort_by("id")
    assert world.naive() == expected
    assert world.by_manifest() == expected
    assert world.is_success()


def test_a_stray_file_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    world = Repairing(tmp_path, mode="error")
    (Path(world.sink) / "README.txt").write_text("mine")
    world.repair()
    assert (Path(world.sink) / "README.txt").read_text() == "mine"
    assert world.naive() == world.after


@pytest.mark.parametrize("survivors", SURVIVORS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.fault(31)
def test_a_power_cut_at_every_step(tmp_path: Path, mode: str, survivors: str) -> None:
    """On a file system that keeps no more than was synced: the retry is done or undone, and a second one ends it."""
    sink = "memory://model/out"
    old = small_job(tmp_path / "old", sink=sink, rows=(4,))
    new = small_job(tmp_path / "lake", sink=sink, mode=mode, rows=(7, 5), start=100)
    bad = replace(new, bad_every=4)
    others = [old.expected] if mode == "append" else []
    before, after = (pa.concat_tables([*others, one.expected]).combine_chunks() for one in (bad, new))
    published = MemoryDisk()
    if mode != "error":
        run_on(published, old, "old-1")
    run_on(published, bad, JOB)
    assert rows_on(published) == before
    for steps in turns(list(SURVIVORS).index(survivors) + MODES.index(mode), of=3):
        disk = deepcopy(published)
        disk.steps_left = steps
        with survived():
            repair_on(disk, new)
        is_struck = disk.is_dark
        disk.restart(survives=SURVIVORS[survivors])
        assert rows_on(disk) in (before, after)
        repair_on(disk, new)
        assert rows_on(disk) == after
        if not is_struck:
            break
    assert steps > 100


def repair_on(disk: MemoryDisk, job: SmallJob) -> None:
    """A driver of ``retry``, from where the job is to its end."""
    store: Any = MemoryStore(disk, f"jobs/{JOB}")
    directory = JobDirectory.open("jobs", store=store)
    open_retry(directory, RetryRequest(), epoch=2, settings=SETTINGS)
    drive(job, directory, sink=ParquetSink(lambda path: cast(Any, MemoryStore(disk, "out"))))
