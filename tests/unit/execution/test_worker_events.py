"""Tasks that execute, and the blame for a lost worker."""

from __future__ import annotations

import pytest

from pipeline.execution.worker_events import (
    ClusterEvent,
    ExecutionTracker,
    LossCause,
    LostExecution,
    MemoryRanOut,
    Started,
    WorkerLeft,
)


@pytest.fixture
def tracker() -> ExecutionTracker:
    return ExecutionTracker()


class TestLostExecutions:
    def test_only_tasks_that_execute_on_the_worker_are_lost(self, tracker: ExecutionTracker) -> None:
        """Tasks that ended, or run elsewhere, are not; a task that Dask reran is lost again."""
        for key, worker in (("a", "w1"), ("b", "w2"), ("c", "w1")):
            assert tracker.record(Started(key, worker), now=1.0) == ()
        tracker.remove("c")
        assert tracker.record(WorkerLeft("w1", False), now=2.0) == (
            LostExecution("a", "w1", LossCause.CRASH, since=1.0),
        )
        assert set(tracker.executing) == {"b"}
        tracker.record(Started("a", "w3"), now=3.0)
        assert tracker.record(WorkerLeft("w3", False), now=4.0) == (
            LostExecution("a", "w3", LossCause.CRASH, since=3.0),
        )

    @pytest.mark.parametrize(
        ("before", "is_restarted", "is_expected", "cause"),
        [
            ([], False, False, LossCause.CRASH),
            ([], False, True, LossCause.LEFT),
            ([MemoryRanOut("w")], False, False, LossCause.MEMORY),
            ([MemoryRanOut("other")], False, False, LossCause.CRASH),
            ([MemoryRanOut("w")], True, False, LossCause.RESTARTED),
        ],
    )
    def test_cause(
        self,
        tracker: ExecutionTracker,
        before: list[ClusterEvent],
        is_restarted: bool,
        is_expected: bool,
        cause: LossCause,
    ) -> None:
        """A restart by the driver explains the loss, whatever the nanny says."""
        tracker.record(Started("a", "w"), now=0.0)
        for event in before:
            tracker.record(event, now=0.0)
        if is_restarted:
            tracker.expect_restart("w")
        assert [lost.cause for lost in tracker.record(WorkerLeft("w", is_expected), now=1.0)] == [cause]

    def test_next_task_on_a_worker_of_one_thread_ends_the_one_before(self, tracker: ExecutionTracker) -> None:
        """Its result may arrive later: it is not to blame for the crash."""
        tracker.record(Started("innocent", "w", threads=1), now=0.0)
        tracker.record(Started("elsewhere", "v", threads=1), now=0.0)
        tracker.record(Started("guilty", "w", threads=1), now=1.0)
        assert tracker.record(WorkerLeft("w", False), now=2.0) == (
            LostExecution("guilty", "w", LossCause.CRASH, since=1.0),
        )
        assert set(tracker.executing) == {"elsewhere"}

    def test_all_tasks_on_a_worker_of_several_threads_are_lost(self, tracker: ExecutionTracker) -> None:
        """A start says nothing about the tasks before."""
        for key in ("a", "b", "c"):
            tracker.record(Started(key, "w", threads=2), now=0.0)
        assert {lost.key for lost in tracker.record(WorkerLeft("w", False), now=1.0)} == {"a", "b", "c"}


class TestOverdue:
    def test_deadline_counts_from_the_start_of_the_task(self, tracker: ExecutionTracker) -> None:
        """Waiting does not count. Without a limit nothing is overdue."""
        tracker.record(Started("a", "w1"), now=10.0)
        tracker.record(Started("b", "w2"), now=14.0)
        assert tracker.overdue(now=16.0, limit=5.0) == ("a",)
        assert tracker.overdue(now=16.0, limit=None) == ()
        assert tracker.busy_workers() == {"w1", "w2"}
