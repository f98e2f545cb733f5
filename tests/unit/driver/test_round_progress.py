"""Progress of a round: what callbacks are told, and what other processes can read."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.common.rows import RowCounts
from pipeline.driver.round_progress import LOCAL_SECONDS, RoundProgress
from pipeline.events import AttemptOutcome, Callback, PartitionEnded, ProgressMade, RoundStarted, RunningPartition
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.progress_file import MAX_RUNNING, read_progress
from pipeline.testing.fake_clock import FakeClock
from pipeline.testing.jobs import small_job


class Kept(Callback):
    def __init__(self) -> None:
        self.events: list[ProgressMade] = []

    def on_progress(self, event: ProgressMade) -> None:
        self.events.append(event)


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    small = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    return JobDirectory.create(tmp_path / "jobs", small.plan, job="small-1")


def part(name: str, rows_done: int, seconds: float = 5.0) -> RunningPartition:
    return RunningPartition(name, "w", 100, rows_done, seconds, 1.0)


def started(job: JobDirectory) -> tuple[RoundProgress, Kept, FakeClock]:
    kept, clock = Kept(), FakeClock(50.0)
    progress = RoundProgress(job, (kept,), epoch=3, clock=clock)
    progress.start(RoundStarted(job.id, 1, partitions=4, done=1, rows=400, rows_done=100))
    return progress, kept, clock


def test_rows_inside_partitions_are_added_to_completed_ones(job: JobDirectory) -> None:
    progress, kept, _ = started(job)
    progress.advanced([part("00001", 20), part("00002", 30, seconds=9.0)])
    done = PartitionEnded(job.id, 1, "00002", AttemptOutcome.DONE, RowCounts(100, 100, 0, 0))
    progress.ended(done)
    progress.advanced([part("00001", 40)])
    first, second = kept.events
    assert (first.rows_done, first.done) == (150, 1)
    assert [running.partition for running in first.running] == ["00002", "00001"]
    assert (second.rows_done, second.done, second.rows) == (240, 2, 400)


def test_several_drivers_of_a_round_are_added_up(job: JobDirectory) -> None:
    progress, kept, _ = started(job)
    progress.advanced([part("a/00001", 20)], group="a")
    progress.advanced([part("b/00001", 30)], group="b")
    assert kept.events[-1].rows_done == 150


def test_other_processes_read_it_every_other_second(job: JobDirectory) -> None:
    progress, kept, clock = started(job)
    progress.advanced([part("00001", 20)])
    assert read_progress(job.store) is None
    clock.now += LOCAL_SECONDS
    progress.advanced([part("00001", 40)])
    clock.now += LOCAL_SECONDS
    progress.advanced([part("00001", 60)])
    record = read_progress(job.store, epoch=3)
    assert record is not None
    assert record.progress == kept.events[-1]
    assert (record.rows_per_second, record.seconds_left) == (10.0, 24.0)
    assert read_progress(job.store, epoch=4) is None


def test_the_file_stays_small(job: JobDirectory) -> None:
    progress, _, clock = started(job)
    clock.now += LOCAL_SECONDS
    progress.advanced([part(f"{number:05d}", 0) for number in range(500)])
    record = read_progress(job.store)
    assert record is not None
    assert (record.running_count, len(record.progress.running)) == (500, MAX_RUNNING)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"running": [{}]}', b"\xff"])
def test_a_damaged_file_is_as_none(job: JobDirectory, content: bytes) -> None:
    job.store.replace("progress.json", content)
    assert read_progress(job.store) is None


def test_a_write_that_fails_is_skipped(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pipeline.driver.round_progress.write_progress", fail)
    progress, kept, clock = started(job)
    clock.now += LOCAL_SECONDS
    progress.advanced([part("00001", 20)])
    assert len(kept.events) == 1
