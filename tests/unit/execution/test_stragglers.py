"""Decisions about stragglers, from measurements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.events import SplitReason
from pipeline.execution.stragglers import (
    WINDOW,
    Action,
    Ask,
    Backup,
    PaceHistory,
    Reassign,
    RunningAttempt,
    SplitAmong,
    StragglerPolicy,
    choose_actions,
    limit,
)
from pipeline.scoring.progress import ProgressSnapshot

SLOW_ONLY = StragglerPolicy(share_after=1e9)
"""Nothing is split for idle workers."""
SHARING = StragglerPolicy()


def history_of(*seconds: float, workers: int = 4) -> PaceHistory:
    """Return the history of partitions of one unit of work."""
    history = PaceHistory()
    for number, value in enumerate(seconds):
        history = history.with_sample(f"w{number % workers}", seconds=value, work=1.0)
    return history


EVEN = history_of(10, 10, 10, 10, 10)


def attempt(seconds: float, **fields: Any) -> RunningAttempt:
    defaults = {"key": "k", "work": 1.0, "rows": 100_000, "worker": "slow", "seconds": seconds}
    return RunningAttempt(**{**defaults, **fields})


def answered(
    rows_done: int, seconds: float, *, batches: int = 10, since: float = 0.1, stalled: float = 0.5
) -> dict[str, Any]:
    """Return the fields of a snapshot.

    :param stalled: share of the time; by default the worker is slow.
    """
    snapshot = ProgressSnapshot(rows_done, batches, seconds, since, stalled * seconds)
    return {"snapshot": snapshot, "snapshot_age": 0.5}


def choose(
    *attempts: RunningAttempt,
    idle: str = "w1 w2",
    history: PaceHistory = EVEN,
    policy: StragglerPolicy = SLOW_ONLY,
) -> tuple[Action, ...]:
    return choose_actions(attempts, idle=idle.split(), history=history, policy=policy)


def slow_split(*workers: str, remaining: float) -> SplitAmong:
    return SplitAmong("k", workers, remaining, SplitReason.SLOW)


CLASSES = {"cpu-1": "cpu", "cpu-2": "cpu", "gpu-1": "H200", "gpu-2": "H200"}
MIXED = PaceHistory(
    tuple((worker, 10.0 if "cpu" in worker else 1.0) for worker in CLASSES for _ in range(3)), classes=CLASSES
)
"""A partition takes ten seconds on a CPU and one on a GPU."""


def shared(*workers: str, remaining: float, key: str = "k", expensive_pace: float = 0.0) -> SplitAmong:
    return SplitAmong(key, workers, pytest.approx(remaining), SplitReason.IDLE_WORKERS, expensive_pace)


class TestSplitForIdleWorkers:
    def test_own_worker_gets_a_part(self) -> None:
        """An attempt that is not slow is asked after a second, and then shared."""
        assert choose(attempt(0.9), policy=SHARING) == ()
        assert choose(attempt(1.1), policy=SHARING) == (Ask("k"),)
        normal = attempt(4.5, **answered(40_000, 4.0))
        assert choose(normal, policy=SHARING) == (shared("slow", "w1", "w2", remaining=5.5),)

    def test_needs_no_history(self) -> None:
        """The pace of the attempt itself is enough."""
        normal = attempt(4.5, **answered(40_000, 4.0))
        assert choose(normal, idle="w1", history=PaceHistory(), policy=SHARING)

    @pytest.mark.parametrize(
        "fields",
        [
            answered(70_000, 7.0),
            {**answered(0, 4.0), "snapshot_age": 0.2},
            {**answered(50, 4.0), "rows": 100},
            {**answered(40_000, 4.0), "attempt_count": 2},
            {**answered(40_000, 4.0), "split_requested": 0.5},
        ],
        ids=["ends soon", "no batch", "small", "has a backup", "is asked already"],
    )
    def test_not_worth_it(self, fields: dict[str, Any]) -> None:
        """Too little would be saved, or the attempt is being split."""
        assert choose(attempt(7.1, **fields), policy=SHARING) == ()

    def test_attempts_divide_the_idle_workers(self) -> None:
        """Equal attempts get equally many helpers."""
        attempts = [attempt(4.5, key=name, **{**answered(40_000, 4.0), "worker": name}) for name in ("a", "b")]
        actions = choose(*attempts, idle="w1 w2 w3 w4", policy=SHARING)
        workers = [action.workers for action in actions if isinstance(action, SplitAmong)]
        assert workers == [("a", "w1", "w3"), ("b", "w2", "w4")]

    def test_helpers_go_where_most_remains(self) -> None:
        """An attempt near its end gets none."""
        near_end = attempt(9.0, key="near end", **{**answered(70_000, 8.0), "worker": "a"})
        far = attempt(9.0, key="far", **{**answered(20_000, 8.0, stalled=0.0), "worker": "b"})
        (action,) = choose(near_end, far, idle="w1 w2 w3", policy=SHARING)
        assert action == shared("b", "w1", "w2", "w3", key="far", remaining=31.5, expensive_pace=40.0)

    def test_waits_for_attempts_asked_together(self) -> None:
        """The first to answer would get all helpers."""
        first = attempt(4.5, key="a", **{**answered(40_000, 4.0), "worker": "a"})
        second = attempt(4.5, key="b", worker="b", unanswered=0.1)
        assert choose(first, second, policy=SHARING) == ()
        late = replace(second, unanswered=1.1)
        assert choose(first, late, policy=SHARING) == (shared("a", "w1", "w2", key="a", remaining=5.5),)

    def test_attempt_without_a_batch_is_asked_again_soon(self) -> None:
        """After 0.3 s instead of 3 s."""
        started = attempt(1.4, **{**answered(0, 1.0, batches=0), "snapshot_age": 0.2})
        assert choose(started, idle="w1", policy=SHARING) == ()
        assert choose(replace(started, snapshot_age=0.4), idle="w1", policy=SHARING) == (Ask("k"),)


class TestExpensiveRows:
    expensive = attempt(20, **answered(10_000, 20, stalled=0.1))

    def test_worker_that_is_not_slow_gets_a_part(self) -> None:
        """The pace of the expensive rows is part of the action."""
        expected = shared("slow", "w1", "w2", remaining=179.5, expensive_pace=200.0)
        assert choose(self.expensive, policy=SHARING) == (expected,)

    def test_stalled_worker_gets_no_part(self) -> None:
        """Its process did not get to run."""
        stalled = replace(self.expensive, **answered(10_000, 20))
        assert choose(stalled, policy=SHARING) == (slow_split("w1", "w2", remaining=180.0),)

    def test_worker_that_was_slow_before_gets_no_part(self) -> None:
        """Its last partitions were slow as well."""
        was_slow = PaceHistory((*EVEN.samples, ("slow", 20.0), ("slow", 20.0)))
        (action,) = choose(self.expensive, history=was_slow, policy=SHARING)
        assert isinstance(action, SplitAmong)
        assert action.reason is SplitReason.SLOW


class TestLimit:
    def test_attempt_within_the_limit_is_not_asked(self) -> None:
        """1.5 × the expected seconds are always granted."""
        assert choose(attempt(14.9), idle="w1") == ()
        assert choose(attempt(15.1), idle="w1") == (Ask("k"),)

    def test_grows_with_work_and_spread(self) -> None:
        """One slow sample does not move it."""
        assert limit(attempt(0, work=2.0), history=EVEN, policy=SLOW_ONLY) == 30.0
        wide = history_of(6, 8, 10, 12, 14)
        assert limit(attempt(0), history=wide, policy=SLOW_ONLY) == pytest.approx(10 + 4 * 1.4826 * 2)
        assert limit(attempt(0), history=history_of(10, 10, 10, 10, 9999), policy=SLOW_ONLY) == 15.0
        assert limit(attempt(0, work=0.01), history=EVEN, policy=SLOW_ONLY) == pytest.approx(3.1)

    def test_needs_samples_and_idle_workers(self) -> None:
        """Three partitions must have ended."""
        assert choose(attempt(999), idle="w1", history=history_of(10, 10)) == ()
        assert choose(attempt(999), idle="") == ()

    def test_follows_when_all_attempts_are_slow(self) -> None:
        """Running attempts beyond the median raise the expectation."""
        few = history_of(10, 10, 10)
        slow = [attempt(20, key=str(number), worker=f"s{number}") for number in range(4)]
        assert choose(*slow, idle="w1", history=few) == ()
        assert choose(*slow[:1], idle="w1", history=few) == (Ask("0"),)


class TestAsk:
    def test_worker_that_does_not_answer_is_asked_once_and_then_frozen(self) -> None:
        """After 3 s it gets a backup."""
        assert choose(attempt(20, unanswered=1.0), idle="w1") == ()
        assert choose(attempt(20, unanswered=3.1), idle="w1") == (Backup("k", ("w1",), 20),)

    def test_stale_snapshot_is_asked_for_again(self) -> None:
        """After 3 s."""
        slow = attempt(20, **answered(10_000, 20))
        assert choose(replace(slow, snapshot_age=4.0), idle="w1") == (Ask("k"),)


class TestSlowWorker:
    def test_idle_workers_share_the_rest(self) -> None:
        """All of them."""
        slow = attempt(20, **answered(10_000, 20))
        assert choose(slow, idle="w1 w2 w3") == (slow_split("w1", "w2", "w3", remaining=180.0),)

    def test_attempt_near_its_end_is_left_alone(self) -> None:
        """Too little would be saved."""
        assert choose(attempt(40, **answered(95_000, 40))) == ()

    def test_requested_split_that_does_not_come_gets_a_backup(self) -> None:
        """Two batches and the answer timeout are waited for."""
        slow = attempt(30, **answered(10_000, 20))
        assert choose(replace(slow, split_requested=6.9), idle="w1") == ()
        (action,) = choose(replace(slow, split_requested=7.1), idle="w1")
        assert isinstance(action, Backup)

    def test_distant_batch_boundary_gets_a_backup_or_a_split_of_the_whole(self) -> None:
        """With one batch in 400 s, the next boundary is as far away."""
        slow = attempt(400, **answered(30_000, 400, batches=1))
        (backup,) = choose(slow, idle="w1")
        assert isinstance(backup, Backup)
        (split,) = choose(slow)
        assert isinstance(split, SplitAmong)
        assert split.reason is SplitReason.FROZEN


class TestFrozenWorker:
    frozen = attempt(20, unanswered=5.0)

    def test_partition_is_split_as_a_whole(self) -> None:
        """The driver splits it."""
        (action,) = choose(self.frozen)
        assert action == SplitAmong("k", ("w1", "w2"), 20, SplitReason.FROZEN)
        assert not action.is_by_attempt

    def test_small_partition_gets_a_backup(self) -> None:
        """Parts would have fewer than 512 rows."""
        assert choose(replace(self.frozen, rows=900)) == (Backup("k", ("w1",), 20),)

    def test_attempt_without_progress_is_treated_alike(self) -> None:
        """It answers, but its last batch ended long ago."""
        stuck = attempt(30, **answered(40_000, 30, since=12.0, stalled=0.0))
        advancing = replace(stuck, **answered(40_000, 30, since=3.0, stalled=0.0))
        assert choose(advancing, idle="w1") == ()
        (split,) = choose(stuck, idle="w1")
        assert isinstance(split, SplitAmong)
        assert split.reason is SplitReason.SLOW
        (backup,) = choose(replace(stuck, split_requested=10.0), idle="w1")
        assert isinstance(backup, Backup)


class TestHelpers:
    def test_own_worker_is_no_helper(self) -> None:
        """Not even with an idle thread."""
        assert choose(attempt(999, worker="w1"), idle="w1") == ()

    def test_partition_with_a_backup_gets_nothing_more(self) -> None:
        """A partition gets one backup."""
        assert choose(attempt(999, unanswered=9.0, attempt_count=2), idle="w1") == ()

    def test_slowest_attempt_comes_first(self) -> None:
        """Each idle thread helps one attempt."""
        first = attempt(400, key="a", unanswered=9.0)
        second = attempt(500, key="b", unanswered=9.0, worker="slower")
        assert choose(first, second, idle="w1") == (Backup("b", ("w1",), 500),)

    def test_fastest_idle_worker_helps(self) -> None:
        """By its last partitions."""
        mixed = PaceHistory((("w1", 10.0), ("w2", 4.0), ("w1", 10.0), ("w2", 4.0), ("w3", 10.0)))
        small = attempt(99, rows=900, unanswered=9.0)
        assert choose(small, idle="w1 w2 w3", history=mixed) == (Backup("k", ("w2",), 99),)

    def test_worker_that_became_slow_is_no_helper(self) -> None:
        """The median of all is still 10 s, but this worker took 60 s for its last partitions."""
        slow = PaceHistory((*EVEN.samples, ("w9", 60.0), ("w9", 60.0), ("w9", 60.0)))
        assert choose(attempt(20, unanswered=9.0), idle="w9", history=slow) == ()


class TestReassign:
    def test_attempt_that_has_not_started_after_five_seconds(self) -> None:
        """While other workers are idle."""
        assert choose(attempt(4.9, worker=""), idle="w1", history=PaceHistory()) == ()
        assert choose(attempt(5.1, worker=""), idle="w1", history=PaceHistory()) == (Reassign("k", ("w1",)),)


class TestPaceHistory:
    def test_holds_the_last_samples_only(self) -> None:
        """Older partitions say nothing about now."""
        history = history_of(*[10.0] * WINDOW, *[50.0] * WINDOW)
        assert history.typical() == 50.0
        assert len(history.samples) == WINDOW


@given(
    st.lists(st.tuples(st.floats(0.01, 1e4), st.floats(0, 1e5), st.integers(0, 10**6), st.booleans()), max_size=8),
    st.lists(st.sampled_from(["w0", "w1", "w2", "w3"]), max_size=6),
    st.lists(st.floats(0.01, 1e4), max_size=12),
)
def test_actions_use_each_idle_thread_once_and_never_the_own_worker(
    figures: list[tuple[float, float, int, bool]], idle: list[str], seconds: list[float]
) -> None:
    attempts = [
        attempt(
            elapsed, key=str(number), work=work, rows=rows, worker=f"w{number % 5}", unanswered=9.0 if frozen else None
        )
        for number, (work, elapsed, rows, frozen) in enumerate(figures)
    ]
    remaining = list(idle)
    for action in choose_actions(attempts, idle=idle, history=history_of(*seconds), policy=SLOW_ONLY):
        if isinstance(action, Ask):
            continue
        assert attempts[int(action.key)].worker not in action.workers
        for name in action.workers:
            remaining.remove(name)


class TestClassesOfWorkers:
    def test_each_has_its_own_expected_time(self) -> None:
        """A CPU that takes what CPUs take is no straggler, however fast a GPU is; a slow GPU is one."""
        assert limit(attempt(0, worker="cpu-1"), history=MIXED, policy=SLOW_ONLY) == 15.0
        assert limit(attempt(0, worker="gpu-1"), history=MIXED, policy=SLOW_ONLY) == 4.0
        assert choose(attempt(12, worker="cpu-1"), idle="gpu-1", history=MIXED) == ()
        assert choose(attempt(12, worker="gpu-1"), idle="gpu-2", history=MIXED) == (Ask("k"),)

    def test_without_classes_the_cpu_would_look_slow(self) -> None:
        merged = PaceHistory((*MIXED.samples[:3], *MIXED.samples[6:]))
        assert choose(attempt(12, worker="cpu-1"), idle="gpu-1", history=merged) == (Ask("k"),)

    def test_running_partitions_of_another_class_do_not_count(self) -> None:
        others = [attempt(40, key=f"o{number}", worker="cpu-2") for number in range(9)]
        slow = attempt(5, worker="gpu-1", unanswered=9.0)
        (action,) = choose(slow, *others, idle="gpu-2", history=MIXED)
        assert action == Backup("k", ("gpu-2",), 5)

    def test_too_few_partitions_of_a_class_are_no_expected_time(self) -> None:
        few = PaceHistory(MIXED.samples[:6] + MIXED.samples[-1:], classes=CLASSES)
        assert choose(attempt(99, worker="gpu-1"), idle="cpu-1", history=few) == ()

    def test_backup_is_on_the_fastest_class(self) -> None:
        frozen = attempt(30, worker="cpu-1", unanswered=9.0, rows=600)
        assert choose(frozen, idle="cpu-2 gpu-1", history=MIXED) == (Backup("k", ("gpu-1",), 30),)

    def test_frozen_partition_is_split_among_the_fastest_class(self) -> None:
        frozen = attempt(300, worker="cpu-1", unanswered=9.0, work=100.0)
        history = replace(MIXED, samples=tuple((worker, pace / 10) for worker, pace in MIXED.samples))
        (action,) = choose(frozen, idle="cpu-2 gpu-1 gpu-2", history=history)
        assert isinstance(action, SplitAmong)
        assert set(action.workers) == {"gpu-1", "gpu-2"}

    def test_gpu_does_all_of_the_rest_of_a_cpu(self) -> None:
        """Half each would leave the CPU busy for five seconds more."""
        slow = attempt(4, worker="cpu-1", **answered(40_000, 4.0, stalled=0.0))
        assert choose(slow, idle="gpu-1", history=MIXED, policy=SHARING) == (shared("gpu-1", remaining=5.5),)

    def test_cpu_is_no_help_for_a_gpu(self) -> None:
        """A part of a half would take five times as long as the whole."""
        running = attempt(4, worker="gpu-1", work=10.0, **answered(40_000, 4.0, stalled=0.0))
        assert choose(running, idle="cpu-1", history=MIXED, policy=SHARING) == ()
        assert choose(running, idle="gpu-2", history=MIXED, policy=SHARING) == (
            shared("gpu-1", "gpu-2", remaining=5.5),
        )
        assert choose(running, idle="cpu-1 gpu-2 cpu-2", history=MIXED, policy=SHARING) == (
            shared("gpu-1", "gpu-2", remaining=5.5),
        )

    def test_class_without_ended_partitions_is_no_help(self) -> None:
        unknown = PaceHistory(MIXED.samples[6:], classes=CLASSES)
        running = attempt(4, worker="gpu-1", work=10.0, **answered(40_000, 4.0, stalled=0.0))
        assert choose(running, idle="cpu-1", history=unknown, policy=SHARING) == ()

    def test_history_of_one_class_outlasts_many_partitions_of_another(self) -> None:
        history = MIXED
        for _ in range(3 * WINDOW):
            history = history.with_sample("gpu-1", seconds=1.0, work=1.0)
        assert history.typical(worker="cpu-1") == 10.0
        assert len(history.samples) == WINDOW + 6
