"""Progress: the counts, and the times at which a line is written."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from pipeline.common.rows import RowCounts
from pipeline.common.units import plural
from pipeline.events import (
    Callback,
    ClusterReady,
    PartitionEnded,
    ProgressMade,
    RoundStarted,
    RunningPartition,
    StatusChanged,
)
from pipeline.report.progress import JobWatch, LiveProgress, PlainProgress, Tally, make_progress, show_progress
from pipeline.testing.fake_clock import FakeClock


def ended(rows: int, *, rejected: int = 0, outcome: str = "done", reason: str = "") -> PartitionEnded:
    counts = RowCounts(rows, rows - rejected, rejected, 0)
    return PartitionEnded("j", 0, "00000", outcome, counts, reason=reason)


def test_a_tally_counts_what_was_done_in_this_run_for_its_rate() -> None:
    tally = Tally(phase="scoring")
    tally.begin(RoundStarted("j", 0, partitions=4, done=1, rows=4000, rows_done=1000), now=10.0)
    tally.add(ended(1000, rejected=5), now=20.0)
    assert tally.rate(20.0) == 100.0
    assert tally.remaining(20.0) == 20.0
    assert tally.line(20.0) == "scoring: 50%, 2/4 partitions, 2,000 rows, 100 rows/s, 5 rejected, 20.0 s left"


def test_a_split_adds_a_partition_and_a_retry_is_counted() -> None:
    tally = Tally()
    tally.begin(RoundStarted("j", 0, partitions=1, done=0, rows=100, rows_done=0), now=0.0)
    for event in (ended(0, outcome="retry"), ended(0, outcome="split"), ended(50), ended(50)):
        tally.add(event, now=1.0)
    assert (tally.done, tally.partitions, tally.retries, tally.rows_done) == (2, 2, 1, 100)
    assert tally.line(1.0).endswith("1 retry")


def test_progress_without_rows_has_no_rate_and_no_end() -> None:
    tally = Tally()
    tally.begin(RoundStarted("j", 0, partitions=1, done=0, rows=100, rows_done=0), now=5.0)
    assert tally.remaining(5.0) is None
    assert tally.remaining(9.0) is None
    assert Tally().line(0.0).startswith("planned: 100%")


def advanced(rows_done: int, *inside: int) -> ProgressMade:
    running = tuple(RunningPartition(f"{number:05d}", "w", 1000, rows, 9.0, 1.0) for number, rows in enumerate(inside))
    return ProgressMade("j", 0, 4000, rows_done, 4, 0, running)


def test_the_rate_is_that_of_the_last_batches_without_the_start() -> None:
    tally = Tally(phase="scoring")
    tally.begin(RoundStarted("j", 0, partitions=4, done=0, rows=4000, rows_done=0), now=0.0)
    tally.update(advanced(0, 0), now=20.0)
    assert tally.remaining(20.0) is None
    tally.update(advanced(100, 100), now=30.0)  # the first batch: 30 s, most of them to load the model
    tally.update(advanced(300, 300), now=32.0)
    assert tally.rate(32.0) == 100.0
    assert tally.remaining(32.0) == 37.0
    assert tally.line(32.0) == "scoring: 8%, 0/4 partitions, 300 rows, 100 rows/s, 0 rejected, 37.0 s left"


def test_old_batches_leave_the_rate() -> None:
    tally = Tally()
    tally.begin(RoundStarted("j", 0, partitions=4, done=0, rows=4000, rows_done=0), now=0.0)
    for second in range(60):
        tally.update(advanced(second * 50, second * 50), now=float(second))
    for second in range(60, 100):
        tally.update(advanced(3000 + second, 3000 + second), now=float(second))
    assert tally.rate(100.0) == pytest.approx(1.0, rel=0.1)


def test_a_finished_partition_counts_once() -> None:
    tally = Tally()
    tally.begin(RoundStarted("j", 0, partitions=4, done=0, rows=4000, rows_done=0), now=0.0)
    tally.update(advanced(1500, 900, 600), now=1.0)
    tally.add(ended(1000), now=2.0)
    assert (tally.rows_done, tally.rows_inside, tally.rows_scored) == (1000, 600, 1600)
    assert [part.partition for part in tally.running] == ["00001"]


def test_reports_at_one_time_make_one_rate() -> None:
    tally = Tally()
    tally.begin(RoundStarted("j", 0, partitions=4, done=0, rows=4000, rows_done=0), now=0.0)
    for now in (5.0, 5.01, 10.0, 10.01):
        tally.add(ended(1000), now=now)
    assert tally.rate(10.01) == pytest.approx(400.0, rel=0.01)


def plain(partitions: int, rows: int) -> tuple[PlainProgress, FakeClock, io.StringIO]:
    clock, stream = FakeClock(100.0), io.StringIO()
    progress = PlainProgress(stream=stream, clock=clock)
    reason = "driver 1 on host starts: 2 workers with 1 thread each, at most 5 min 00 s"
    progress.on_status(StatusChanged("j", "PLANNED", "PROVISIONING", reason))
    progress.on_cluster(ClusterReady("j", 2, 2, "http://127.0.0.1:41093/status"))
    progress.on_status(StatusChanged("j", "PROVISIONING", "RUNNING", "workers are there: 8 partitions"))
    progress.on_round(RoundStarted("j", 0, partitions, 0, rows, 0))
    counts = f"{plural(rows, 'row')} in {plural(partitions, 'partition')}"
    assert stream.getvalue() == (
        "starting workers (j): 2 workers with 1 thread each, at most 5 min 00 s\n"
        f"dashboard: http://127.0.0.1:41093/status\nscoring: {counts}\n"
    )
    stream.seek(0)
    stream.truncate()
    return progress, clock, stream


def test_plain_lines_come_about_every_tenth() -> None:
    progress, _, stream = plain(200, 20_000)
    for _ in range(200):
        progress.on_partition(ended(100))
    lines = stream.getvalue().splitlines()
    assert 9 <= len(lines) <= 11
    assert "200/200" in lines[-1]


def test_plain_lines_come_every_ten_seconds() -> None:
    progress, clock, stream = plain(1000, 100_000)
    for _ in range(50):
        clock.now += 1.0
        progress.on_partition(ended(100))
    assert len(stream.getvalue().splitlines()) == 5


def test_plain_lines_come_inside_a_partition() -> None:
    progress, clock, stream = plain(1, 1000)
    clock.now += 11.0
    progress.on_progress(ProgressMade("j", 0, 1000, 10, 1, 0, (RunningPartition("00000", "w", 1000, 10, 9.0, 1.0),)))
    assert stream.getvalue().startswith("scoring: 1%, 0/1 partition, 10 rows")


def test_plain_line_reports_each_retry() -> None:
    progress, _, stream = plain(1000, 100_000)
    progress.on_partition(ended(0, outcome="retry", reason="the storage failed"))
    assert stream.getvalue() == "partition 00000: retry after attempt 1: the storage failed\n"


def test_the_end_is_left_to_the_summary() -> None:
    progress, _, stream = plain(1, 1)
    progress.on_status(StatusChanged("j", "PUBLISHING", "SUCCEEDED"))
    assert stream.getvalue() == ""


@pytest.fixture
def live() -> Iterator[tuple[LiveProgress, io.StringIO]]:
    stream = io.StringIO()
    progress = LiveProgress(Console(file=stream, force_terminal=True, width=160), clock=FakeClock(100.0))
    yield progress, stream
    progress.stop()


def test_a_live_display_draws_and_goes(live: tuple[LiveProgress, io.StringIO]) -> None:
    progress, stream = live
    progress.on_status(StatusChanged("j", "PROVISIONING", "RUNNING"))
    progress.on_round(RoundStarted("j", 0, 2, 0, 200, 0))
    progress.on_partition(ended(100, rejected=3))
    progress.on_partition(ended(0, outcome="retry", reason="[weird] markup"))
    progress.on_status(StatusChanged("j", "RUNNING", "FAILED"))
    shown = stream.getvalue()
    assert "1/2 partitions" in shown
    assert "3 rejected" in shown
    assert "[weird] markup" in shown
    progress.on_cluster(ClusterReady("j", 2, 2, "http://127.0.0.1:41093/status"))
    assert "dashboard: http://127.0.0.1:41093/status\r\n" in stream.getvalue().replace("\n", "\r\n")
    progress.stop()
    progress.stop()


def test_log_lines_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("tests.progress")
    logger.addHandler(handler)
    progress = LiveProgress(Console(file=stream, force_terminal=True, width=160), clock=FakeClock(100.0))
    try:
        progress.start()
        assert handler.stream is not stream
        logger.warning("a line")
        progress.stop()
        assert handler.stream is stream
        # The bar is erased before the line is written, and drawn anew below it.
        assert re.search(r"\x1b\[2K\s*a line", stream.getvalue())
    finally:
        logger.removeHandler(handler)


def test_stderr_without_terminal_gets_lines() -> None:
    assert isinstance(make_progress(), PlainProgress)
    assert type(make_progress(quiet=True)) is Callback
    with show_progress() as callbacks:
        assert [type(callback) for callback in callbacks] == [PlainProgress]


def test_a_live_display_is_gone_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    shown: list[Callback] = []

    def fail() -> None:
        with show_progress() as callbacks:
            shown.extend(callbacks)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    (progress,) = shown
    assert isinstance(progress, LiveProgress)
    assert progress._progress.live.is_started is False


def test_a_watch_remembers_the_job() -> None:
    watch = JobWatch()
    watch.on_round(RoundStarted("churn-1", 0, 1, 0, 1, 0))
    assert watch.job == "churn-1"
