"""The dispatcher with stragglers on a fake cluster: asked, backed up, split, reassigned, and abandoned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.execution.attempts import Attempt, InFlight
from pipeline.execution.health import ClusterHealth, DispatchPolicy
from pipeline.execution.protocols import SplitResult
from pipeline.execution.rebalancing import StragglerMitigator, WorkerProbe
from pipeline.execution.stragglers import StragglerPolicy
from pipeline.execution.worker_events import ExecutionTracker, Started
from pipeline.plan.plan import Partition
from pipeline.scoring import progress
from pipeline.scoring.progress import ProgressSnapshot
from pipeline.testing.fake_clock import FakeClock
from pipeline.testing.fake_cluster import (
    NEVER,
    DispatcherRun,
    FakeCluster,
    FakeFuture,
    FakeListener,
    FakeReceipt,
    make_partitions,
)

SLOW_ONLY = StragglerPolicy(share_after=1e9)
"""Nothing is split for idle workers."""
TOO_FEW = 900
"""Rows too few for a split of the whole partition: only a backup can help."""


class Stragglers(DispatcherRun):
    """Five partitions on the workers ``a``, ``b`` and ``c`` of one thread."""

    def __init__(self, *, rows: int = 10_000, stragglers: StragglerPolicy = SLOW_ONLY, **options: Any) -> None:
        cluster = FakeCluster("a", "b", "c", default=NEVER)
        partitions = make_partitions(*(f"p{number}" for number in range(5)), rows=rows)
        super().__init__(cluster, partitions, stragglers=stragglers, **options)

    def start_slow(self, *, seconds: float = 100.0) -> None:
        """Let four partitions take 10 s, and ``p4`` run on ``a`` for ``seconds``."""
        self.start()
        for number in range(4):
            self.cluster.start_task(f"p{number}", "bc"[number % 2])
        self.cluster.start_task("p4", "a")
        self.step()
        self.clock.now = 10.0
        for number in range(4):
            self.cluster.finish(f"p{number}")
        self.step()
        self.clock.now = seconds
        self.step(3)

    @property
    def backups(self) -> list[FakeFuture]:
        return [future for key, future in self.cluster.futures.items() if "~" in key]

    def actions(self) -> list[tuple[str, str | None, bool, bool]]:
        return [
            (mitigation.action, mitigation.split_reason, mitigation.is_over, mitigation.won)
            for mitigation in self.listener.mitigations
        ]


@pytest.fixture
def slow() -> Stragglers:
    """Its slow worker answers, but has too few rows to split."""
    run = Stragglers(rows=TOO_FEW)
    run.cluster.progress = {"a": ProgressSnapshot(0, 0, 99.0), "b": None, "c": None}
    return run


class TestBackup:
    def test_backup_that_ends_first_cancels_the_original(self, slow: Stragglers) -> None:
        """The slow worker is asked to drop its attempt, and the seconds saved are reported."""
        slow.start_slow()
        (backup,) = slow.backups
        assert backup.workers in (("b",), ("c",))
        slow.cluster.finish(backup.key)
        slow.end()
        assert slow.cluster.futures["p4"].is_cancelled
        assert slow.cluster.calls_of("request_drop") == [(("p4",), "a")]
        assert slow.actions() == [("backup", None, False, False), ("backup", None, True, True)]
        assert {mitigation.worker for mitigation in slow.listener.mitigations} == {"a"}
        assert slow.listener.mitigations[1].seconds_won > 0
        assert len(slow.receipts) == 5

    @pytest.mark.parametrize(("silent", "helper"), [("b", "c"), ("c", "b")])
    def test_worker_without_heartbeats_is_no_helper(self, slow: Stragglers, silent: str, helper: str) -> None:
        """A frozen worker must not get the backup."""
        slow.cluster.last_heartbeat[silent] = 995.0
        slow.start_slow()
        (backup,) = slow.backups
        assert backup.workers == (helper,)

    def test_original_that_ends_first_drops_the_backup(self, slow: Stragglers) -> None:
        """Nothing was won."""
        slow.start_slow()
        (backup,) = slow.backups
        slow.cluster.start_task(backup.key, backup.workers[0])
        slow.step()
        slow.cluster.finish("p4")
        slow.end()
        assert backup.is_cancelled
        assert slow.cluster.calls_of("request_drop") == [((backup.key,), backup.workers[0])]
        assert slow.actions() == [("backup", None, False, False), ("backup", None, True, False)]
        assert len(slow.receipts) == 5

    def test_failed_backup_leaves_the_original_alone(self, slow: Stragglers) -> None:
        """No third attempt is submitted."""
        slow.start_slow()
        slow.cluster.finish(slow.backups[0].key, OSError("the network"))
        slow.step()
        assert slow.listener.outcomes("p4") == ["retry"]
        assert not slow.cluster.futures["p4"].is_cancelled
        slow.cluster.finish("p4")
        slow.end()
        assert len(slow.receipts) == 5

    def test_failed_original_leaves_the_backup_alone(self, slow: Stragglers) -> None:
        """No third attempt is submitted."""
        slow.start_slow()
        slow.cluster.finish("p4", OSError("the network"))
        slow.step()
        assert slow.listener.outcomes("p4") == ["retry"]
        slow.cluster.finish(slow.backups[0].key)
        slow.end()
        assert len(slow.receipts) == 5
        assert len([key for key in slow.cluster.futures if key.startswith("p4")]) == 2

    def test_backup_whose_worker_crashes_is_cancelled(self, slow: Stragglers) -> None:
        """It may run on no other worker."""
        slow.start_slow()
        (backup,) = slow.backups
        slow.cluster.start_task(backup.key, backup.workers[0])
        slow.cluster.lose_worker(backup.workers[0])
        slow.step()
        assert backup.is_cancelled
        slow.cluster.finish("p4")
        slow.end()
        assert len(slow.receipts) == 5


class TestBackupOfCrashingPartition:
    def test_no_second_backup_after_worker_crash(self, slow: Stragglers) -> None:
        """The rows are blamed, whichever attempt had them: a second backup might end another worker."""
        slow.start_slow()
        (backup,) = slow.backups
        slow.cluster.start_task(backup.key, backup.workers[0])
        slow.cluster.lose_worker(backup.workers[0])
        slow.step()
        slow.step(3, seconds=60.0)
        assert slow.backups == [backup]

    def test_crashes_of_original_and_backup_isolate_the_partition(self, slow: Stragglers) -> None:
        """Both crashes count for one partition."""
        slow.start_slow()
        (backup,) = slow.backups
        slow.cluster.start_task(backup.key, backup.workers[0])
        slow.cluster.lose_worker(backup.workers[0])
        slow.step()
        slow.cluster.lose_worker("a")
        slow.step(2)
        assert slow.tasks.isolated == ["p4"]
        slow.cluster.finish("p4!")
        slow.end()
        assert len(slow.receipts) == 5


def split(partition: Partition, receipt: Any, *, parts: int = 2) -> SplitResult:
    if receipt is None:
        receipt = FakeReceipt(partition.id, tuple(f"{partition.id}.{number}" for number in range(parts)))
        return SplitResult(receipt, tuple(make_partitions(*receipt.splits)))
    first: Any = FakeReceipt(receipt.splits[0])
    return SplitResult(receipt, tuple(make_partitions(*receipt.splits)), first)


class TestSplit:
    def test_slow_worker_leaves_the_rest_to_idle_workers(self) -> None:
        """The attempt is asked to stop, and its first part is done when it does."""
        run = Stragglers(split=split)
        run.cluster.progress = {"a": ProgressSnapshot(2000, 99, 99.0, stalled_seconds=60.0)}
        run.start_slow()
        assert run.cluster.calls_of("request_split") == [(("p4", 2), "a")]
        run.cluster.finish("p4", FakeReceipt("p4", ("p4.0", "p4.1", "p4.2")))
        run.step(2)
        assert "p4.0" not in run.cluster.futures, "the first part is done"
        assert set(run.cluster.futures["p4.1"].workers) == {"b", "c"}
        for key in ("p4.1", "p4.2"):
            run.cluster.finish(key)
        run.end()
        assert run.listener.outcomes("p4") == ["split", "done", "done", "done"]
        assert run.actions() == [("split", "slow", False, False), ("split", "slow", True, True)]

    def test_idle_workers_share_what_is_not_slow(self) -> None:
        """The worker of the attempt gets a part as well."""
        run = Stragglers(split=split, stragglers=StragglerPolicy())
        run.cluster.progress = {"a": ProgressSnapshot(7000, 99, 9.0)}
        run.start_slow(seconds=12.0)
        assert run.cluster.calls_of("request_split") == [(("p4", 3), "a")]
        run.cluster.finish("p4", FakeReceipt("p4", ("p4.0", "p4.1", "p4.2", "p4.3")))
        run.step(2)
        assert set(run.cluster.futures["p4.1"].workers) == {"a", "b", "c"}
        for number in (1, 2, 3):
            run.cluster.finish(f"p4.{number}")
        run.end()
        (result,) = [result for result in run.listener.results if result.outcome == "split"]
        assert (result.split_reason, result.reason) == ("idle_workers", "other workers were idle")
        assert [action[:2] for action in run.actions()] == [("split", "idle_workers")] * 2

    def test_frozen_worker_loses_all_of_the_partition(self) -> None:
        """The driver splits the partition, and a late receipt of the frozen attempt is ignored."""
        run = Stragglers(split=split)
        run.start_slow()
        assert run.cluster.calls_of("progress_of") == [(("p4",), "a")]
        run.step(2, seconds=2.0)
        assert run.cluster.futures["p4"].is_cancelled
        run.step()
        run.cluster.finish("p4")
        for key in ("p4.0", "p4.1"):
            run.cluster.finish(key)
        run.end()
        assert [action[:2] for action in run.actions()] == [("split", "frozen")] * 2
        assert [name for name in run.done if name.startswith("p4")] == ["p4", "p4.0", "p4.1"]

    def test_partition_too_small_to_split_keeps_running(self) -> None:
        """The split is tried once."""
        tried: list[int] = []

        def too_small(partition: Partition, receipt: Any, *, parts: int = 2) -> None:
            tried.append(parts)

        run = Stragglers(split=too_small)
        run.start_slow()
        run.step(2, seconds=2.0)
        run.step(5, seconds=10.0)
        assert tried == [2]
        run.cluster.finish("p4")
        run.end()
        assert run.actions() == [("split", "frozen", False, False), ("split", "frozen", True, False)]

    def test_helper_is_promised_to_one_attempt_only(self) -> None:
        """A worker that waits for the rest of one attempt counts as busy."""
        run = Stragglers(split=split, stragglers=StragglerPolicy())
        run.cluster.progress = {name: ProgressSnapshot(3000, 99, 3.0) for name in "abc"}
        run.start()
        run.cluster.start_task("p0", "a")
        run.cluster.start_task("p1", "b")
        run.step()
        for number in (2, 3, 4):
            run.cluster.finish(f"p{number}")
        run.step()
        run.step(3, seconds=1.0)
        assert len(run.cluster.calls_of("request_split")) == 1
        run.step(2, seconds=1.0)
        assert len(run.cluster.calls_of("request_split")) == 1


class TestReassign:
    def test_task_that_does_not_start_goes_to_an_idle_worker(self) -> None:
        """It is cancelled and submitted again."""
        run = Stragglers()
        run.start()
        for number in range(4):
            run.cluster.finish(f"p{number}")
        run.step()
        run.step(seconds=5.5)
        (again,) = run.backups
        assert run.cluster.futures["p4"].is_cancelled
        run.cluster.finish(again.key)
        run.end()
        assert run.actions() == [("reassign", None, False, False)]

    def test_task_that_had_started_in_that_moment_keeps_its_worker_busy(self) -> None:
        """Else the worker looks idle, and the partition is moved there again and again."""
        run = Stragglers()
        run.start()
        for number in range(4):
            run.cluster.finish(f"p{number}")
        run.step()
        run.step(seconds=5.5)
        run.cluster.start_task("p4", "b")
        run.step()
        assert run.cluster.calls_of("request_drop") == [(("p4",), "b")]
        run.step(20, seconds=1.0)
        assert [future.workers for future in run.backups].count(("b",)) <= 1, "nothing more is moved there"

    def test_start_of_another_jobs_task_is_ignored(self) -> None:
        """All dispatchers on a cluster get all events."""
        run = Stragglers()
        run.start()
        run.cluster.start_task("another", "b")
        run.step()
        assert run.cluster.calls_of("request_drop") == []


class TestBlockedWorkers:
    @pytest.fixture
    def clock(self) -> FakeClock:
        return FakeClock(100.0)

    @pytest.fixture
    def tracker(self) -> ExecutionTracker:
        return ExecutionTracker()

    @pytest.fixture
    def mitigator(self, clock: FakeClock, tracker: ExecutionTracker) -> StragglerMitigator:
        cluster, drop = FakeCluster("a", "b", "c", default=NEVER), _ignore
        return StragglerMitigator(
            InFlight(cluster, tracker, drop, clock),
            tracker,
            ClusterHealth(cluster, DispatchPolicy(), clock),
            WorkerProbe(cluster, drop, background=drop),
            FakeListener(),
            clock,
        )

    def test_worker_held_by_an_abandoned_attempt_is_restarted_when_needed(
        self, mitigator: StragglerMitigator, tracker: ExecutionTracker, clock: FakeClock
    ) -> None:
        """Only after a minute, once, if no other task executes there, and if a partition waits for a worker."""
        mitigator.abandon("p0", worker="a")
        mitigator.abandon("p1", worker="b")
        tracker.record(Started("other", "b"), now=clock.now)
        clock.now = 150.0
        mitigator.abandon("p2", worker="c")
        clock.now = 170.0
        assert mitigator.take_blocked_workers() == set(), "no partition waits"
        clock.now = 100.0
        mitigator.flight.start([Attempt(*make_partitions("p9"))], ["p9"])
        clock.now = 106.0
        assert mitigator.take_blocked_workers() == set(), "the attempt may yet end"
        clock.now = 170.0
        assert mitigator.take_blocked_workers() == {"a"}
        clock.now = 171.0
        assert mitigator.take_blocked_workers() == set()
        mitigator.task_started("c")
        clock.now = 999.0
        assert mitigator.take_blocked_workers() == set(), "c is free, b is busy"


def _ignore(item: object) -> None:
    pass


class TestWorkerProbe:
    @pytest.mark.parametrize("function", [progress.progress_of, progress.request_split, progress.request_drop])
    def test_functions_are_importable_on_workers(self, function: Callable[..., Any]) -> None:
        """A call into a worker pickles its function by name."""
        assert getattr(progress, function.__name__) is function

    def test_frozen_worker_puts_no_answer(self) -> None:
        """An error of the call is no answer."""
        answers: list[Any] = []
        cluster = FakeCluster("a", "b")
        cluster.progress = {"b": None}
        probe = WorkerProbe(cluster, answers.append, background=lambda call: call())
        probe.ask("k", worker="a")
        assert answers == []
        probe.ask("k", worker="b")
        assert [(answer.key, answer.snapshot.rows_done) for answer in answers] == [("k", 0)]
