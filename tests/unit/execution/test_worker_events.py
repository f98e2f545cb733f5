from __future__ import annotations

from pipeline.execution.worker_events import ExecutionTracker, LostExecution, MemoryRanOut, Started, WorkerLeft


def test_only_what_executed_where_the_worker_died_is_told() -> None:
    ledger = ExecutionTracker()
    for key, worker in (("a", "w1"), ("b", "w2"), ("c", "w1")):
        assert ledger.learn(Started(key, worker), now=1.0) == ()
    ledger.ended("c")
    assert ledger.learn(WorkerLeft("w1", False), now=2.0) == (LostExecution("a", "w1", "crash"),)
    assert set(ledger.executing) == {"b"}
    # What is repeated elsewhere is told again.
    ledger.learn(Started("a", "w3"), now=3.0)
    assert ledger.learn(WorkerLeft("w3", False), now=4.0) == (LostExecution("a", "w3", "crash"),)


def test_why_a_worker_left() -> None:
    for facts, recycle, is_expected, cause in (
        ([], False, False, "crash"),
        ([], False, True, "left"),
        ([MemoryRanOut("w")], False, False, "memory"),
        ([MemoryRanOut("other")], False, False, "crash"),
        ([MemoryRanOut("w")], True, False, "recycled"),
    ):
        ledger = ExecutionTracker()
        ledger.learn(Started("a", "w"), now=0.0)
        for fact in facts:
            ledger.learn(fact, now=0.0)
        if recycle:
            ledger.will_recycle("w")
        assert [death.cause for death in ledger.learn(WorkerLeft("w", is_expected), now=1.0)] == [cause]


def test_a_deadline_counts_from_the_execution() -> None:
    ledger = ExecutionTracker()
    ledger.learn(Started("a", "w1"), now=10.0)
    ledger.learn(Started("b", "w2"), now=14.0)
    assert ledger.overdue(now=16.0, limit=5.0) == ("a",)
    assert ledger.overdue(now=16.0, limit=None) == ()
    assert ledger.busy_workers() == {"w1", "w2"}


def test_on_a_worker_of_one_thread_the_next_task_tells_that_the_one_before_has_ended() -> None:
    ledger = ExecutionTracker()
    ledger.learn(Started("innocent", "w", threads=1), now=0.0)
    ledger.learn(Started("elsewhere", "v", threads=1), now=0.0)
    ledger.learn(Started("guilty", "w", threads=1), now=1.0)
    assert ledger.learn(WorkerLeft("w", False), now=2.0) == (LostExecution("guilty", "w", "crash"),)
    assert set(ledger.executing) == {"elsewhere"}


def test_of_several_threads_nothing_is_concluded() -> None:
    ledger = ExecutionTracker()
    for key in ("a", "b", "c"):
        ledger.learn(Started(key, "w", threads=2), now=0.0)
    assert {death.key for death in ledger.learn(WorkerLeft("w", False), now=1.0)} == {"a", "b", "c"}
