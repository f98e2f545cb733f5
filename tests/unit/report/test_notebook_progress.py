"""The live card of a job in a notebook."""

from __future__ import annotations

import pytest

from pipeline.common.rows import RowCounts
from pipeline.common.step_output import MessageCount
from pipeline.events import (
    AttemptOutcome,
    ClusterReady,
    JobEnded,
    PartitionEnded,
    ProgressMade,
    RoundStarted,
    RunningPartition,
    StatusChanged,
    StepMessage,
)
from pipeline.report.notebook_progress import NotebookProgress
from pipeline.testing.fake_clock import FakeClock


class Cell:
    """A cell whose output is replaced."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def update(self, content: dict[str, str]) -> None:
        self.shown.append(content)

    @property
    def html(self) -> str:
        return self.shown[-1]["text/html"]

    @property
    def text(self) -> str:
        return self.shown[-1]["text/plain"]


@pytest.fixture
def cell() -> Cell:
    return Cell()


def started(cell: Cell) -> tuple[NotebookProgress, FakeClock]:
    clock = FakeClock(100.0)
    progress = NotebookProgress(cell.update, clock=clock)
    progress.on_status(StatusChanged("j-1", "PROVISIONING", "RUNNING"))
    progress.on_round(RoundStarted("j-1", 0, partitions=2, done=0, rows=1000, rows_done=0))
    return progress, clock


def test_it_begins_before_the_job_has_an_id(cell: Cell) -> None:
    NotebookProgress(cell.update, clock=FakeClock(0.0))
    assert cell.text.startswith("planning")


def test_rows_inside_partitions_fill_the_bar(cell: Cell) -> None:
    progress, clock = started(cell)
    clock.now += 5.0
    running = (RunningPartition("00000", "w", 500, 250, 5.0, 0.0),)
    progress.on_progress(ProgressMade("j-1", 0, 1000, 250, 2, 0, running))
    assert "250 of 1,000 rows (25%), 0 rejected" in cell.html
    assert "width:25.0%" in cell.html
    assert "running: 00000 50%" in cell.html
    assert "50 rows/s, 15.0 s left" in cell.html
    assert cell.text == "scoring: 25%, 0/2 partitions, 250 rows, 50 rows/s, 0 rejected, 15.0 s left"


def test_updates_come_twice_a_second(cell: Cell) -> None:
    progress, clock = started(cell)
    before = len(cell.shown)
    for rows in range(20):
        clock.now += 0.125
        progress.on_progress(ProgressMade("j-1", 0, 1000, rows, 2, 0))
    assert len(cell.shown) - before == 5


def test_retries_stay_in_the_card(cell: Cell) -> None:
    progress, clock = started(cell)
    clock.now += 1.0
    progress.on_partition(PartitionEnded("j-1", 0, "00001", AttemptOutcome.RETRY, reason="<storage> failed"))
    assert "partition 00001: retry: &lt;storage&gt; failed" in cell.html


def test_prints_of_steps_are_shown_once_with_a_count(cell: Cell) -> None:
    progress, clock = started(cell)
    clock.now += 1.0
    progress.on_message(StepMessage("j-1", "00001", "w", "f:build", "print", "f.py:9", "3 rows"))
    assert "f:build prints (f.py:9): 3 rows" in cell.html
    assert "times" not in cell.html
    clock.now += 1.0
    counts = (MessageCount("f:build", "print", "f.py:9", "3 rows", 1200),)
    progress.on_partition(PartitionEnded("j-1", 0, "00001", AttemptOutcome.DONE, messages=counts))
    assert cell.html.count("3 rows") == 1
    assert "(1,200 times)" in cell.html


def test_the_end_is_one_line(cell: Cell) -> None:
    progress, clock = started(cell)
    progress.on_cluster(ClusterReady("j-1", 2, 1, "http://127.0.0.1:8787/status"))
    clock.now += 9.0
    progress.on_end(JobEnded("j-1", "FAILED", RowCounts(), "out", "jobs/j-1"))
    assert cell.text == "FAILED  j-1"
    assert "FAILED  j-1  (9.00 s)" in cell.html
