"""The dispatcher on a fake cluster, turn by turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline.devices.inventory import Gpu
from pipeline.errors import InfrastructureError, NoWorkers, SchedulerLost, SchedulerUnresponsive, SchemaDrift
from pipeline.execution.health import DispatchPolicy
from pipeline.execution.placement import Placement
from pipeline.execution.protocols import SplitResult
from pipeline.execution.stragglers import StragglerPolicy
from pipeline.execution.worker_events import LossCause, SharedClusterState
from pipeline.jobs.cancellation import Stop, StopReason
from pipeline.plan.plan import Partition
from pipeline.testing.fake_cluster import NEVER, DispatcherRun, FakeCluster, FakeReceipt, make_partitions

HUGE = 10**6


def numbered(count: int) -> list[Partition]:
    return make_partitions(*(f"{number:05d}" for number in range(count)))


def run_of(cluster: FakeCluster, partitions: int = 2, **options: Any) -> DispatcherRun:
    return DispatcherRun(cluster, numbered(partitions), **options)


class TestWindow:
    def test_all_partitions_are_done_with_two_per_thread_in_flight(self) -> None:
        """Twice as many tasks as threads keep workers busy; futures are released."""
        cluster = FakeCluster("w", threads=3)
        run = run_of(cluster, 20)
        run.receipts += run.dispatcher.run(run.partitions)
        assert run.done == [f"{number:05d}" for number in range(20)]
        assert max(len(keys) for keys in cluster.submitted) == 6
        assert all(future.is_released for future in cluster.futures.values())

    def test_turns_submit_no_more_than_the_window(self) -> None:
        """Running tasks count."""
        cluster = FakeCluster("w", threads=2, default=NEVER)
        run = run_of(cluster, 9)
        run.start()
        run.step(5)
        assert len(cluster.futures) == 4
        cluster.finish("00000")
        run.step(2)
        assert len(cluster.futures) == 5


class TestProgressInsidePartitions:
    def started(self) -> tuple[FakeCluster, DispatcherRun]:
        """A partition of 1,000 rows that runs on each of two workers."""
        cluster = FakeCluster("a", "b", default=NEVER)
        run = DispatcherRun(cluster, make_partitions("00000", "00001", rows=1000))
        run.start()
        for key, worker in (("00000", "a"), ("00001", "b")):
            cluster.start_task(key, worker)
        run.step(2)
        return cluster, run

    def test_rows_of_finished_batches_are_reported(self) -> None:
        cluster, run = self.started()
        cluster.advance_task("00001", 400)
        run.step(seconds=3.0)
        (first, second) = run.listener.running[-1]
        assert (first.partition, first.rows, first.rows_done, first.quiet_seconds) == ("00000", 1000, 0, 3.0)
        assert (second.partition, second.worker, second.rows_done, second.quiet_seconds) == ("00001", "b", 400, 0.0)

    def test_reports_come_once_a_second(self) -> None:
        cluster, run = self.started()
        before = len(run.listener.running)
        for rows in range(12):
            cluster.advance_task("00000", rows)
            run.step(seconds=0.25)
        assert len(run.listener.running) - before == 3

    def test_a_warning_of_a_step_is_told_once_and_only_by_its_job(self) -> None:
        cluster, run = self.started()
        for key, worker in (("00000", "a"), ("00001", "b"), ("task of another job", "a")):
            cluster.warn(key, f"features.py:9: UserWarning: old{' job' if ' ' in key else ''}", worker=worker)
        run.step()
        (line,) = run.listener.messages
        assert (line.step, line.place, line.text) == ("f:build", "features.py:9", "features.py:9: UserWarning: old")

    def test_late_reports_and_ended_partitions_are_left_out(self) -> None:
        cluster, run = self.started()
        cluster.finish("00000")
        cluster.advance_task("00000", 900)
        run.step(2, seconds=1.0)
        assert [part.partition for part in run.listener.running[-1]] == ["00001"]


class TestPlacementOnGpus:
    NEEDED = Placement({"GPU": 1}, {"g1": Gpu("GPU-1", "H200", 1, 0), "g2": Gpu("GPU-2", "H200", 1, 1)})

    def cluster(self, **options: Any) -> FakeCluster:
        """Two workers with a GPU and one without, four threads each."""
        cluster = FakeCluster("g1", "g2", "c", threads=4, **options)
        cluster.resources = {"g1": {"GPU": 4}, "g2": {"GPU": 4}, "c": {"CPU": 4}}
        return cluster

    def test_every_card_gets_partitions_at_once(self) -> None:
        """The first submission fills the threads of both cards, twice; those of the CPU do not count."""
        cluster = self.cluster(default=NEVER)
        run = run_of(cluster, 40, placement=self.NEEDED)
        run.start()
        assert [len(keys) for keys in cluster.submitted] == [16]
        assert {tuple(future.resources.items()) for future in cluster.futures.values()} == {(("GPU", 1),)}

    def test_without_resources_all_workers_take_from_one_queue(self) -> None:
        cluster = self.cluster(default=NEVER)
        run = run_of(cluster, 40, placement=Placement(gpus=self.NEEDED.gpus))
        run.start()
        assert [len(keys) for keys in cluster.submitted] == [24]
        assert not any(future.resources for future in cluster.futures.values())

    def test_isolated_partition_asks_for_no_gpu(self) -> None:
        cluster = self.cluster(default=NEVER)
        run = run_of(cluster, 1, placement=self.NEEDED)
        run.start()
        for worker in ("g1", "g2"):
            cluster.start_task("00000", worker)
            cluster.lose_worker(worker)
        run.step(2)
        assert run.tasks.isolated == ["00000"]
        assert not cluster.futures["00000!"].resources

    def test_backup_is_on_a_card(self) -> None:
        """The idle worker without a GPU is no helper, since it may not take the partition."""
        cluster = self.cluster(default=NEVER)
        run = run_of(cluster, 12, placement=self.NEEDED, stragglers=StragglerPolicy(share_after=HUGE))
        run.start()
        for number in range(12):
            cluster.start_task(f"{number:05d}", "g1" if number % 2 else "g2")
        run.step(seconds=1.0)
        for number in range(11):
            cluster.finish(f"{number:05d}")
        run.step(2, seconds=1.0)
        # Asked, no answer: frozen. Then the other card helps.
        run.step(9, seconds=1.0)
        backup = cluster.futures["00011~2"]
        assert backup.workers == ("g2",)
        assert backup.resources == {"GPU": 1}

    def test_no_card_left_ends_the_run_with_its_own_message(self) -> None:
        """Workers without a GPU do not count."""
        cluster = self.cluster(default=NEVER)
        run = run_of(cluster, 1, placement=self.NEEDED, policy=DispatchPolicy(no_workers_timeout=30))
        run.start()
        del cluster.workers["g1"], cluster.workers["g2"]
        with pytest.raises(NoWorkers, match="no worker with a GPU is left") as error:
            run.step(40, seconds=1.0)
        assert error.value.exit_code == 75
        assert error.value.found.endswith(", and 1 worker without")
        assert "resume with --device auto" in error.value.next_step


class TestRetry:
    def test_retry_follows_its_delay_and_is_counted(self) -> None:
        """The second attempt is submitted half a second after the failure of the first."""
        cluster = FakeCluster("w", threads=2, outcomes={"00001": [OSError("lost")]})
        run = run_of(cluster)
        run.start()
        run.step(3)
        assert run.done == ["00000"]
        run.step(2, seconds=0.5)
        run.end()
        assert run.done == ["00000", "00001"]
        assert run.dispatcher.retries == 1
        attempts = [(result.attempt, result.outcome) for result in run.listener.results if result.receipt is None]
        assert attempts == [(1, "retry")]
        assert run.listener.outcomes("00001") == ["retry", "done"]


class TestEndOfRun:
    def test_failure_starts_no_more_partitions(self) -> None:
        """Receipts of running partitions are kept; the first failure is raised."""
        cluster = FakeCluster("w", outcomes={"00000": [SchemaDrift("bad file")]})
        run = run_of(cluster, 9)
        with pytest.raises(SchemaDrift):
            run.receipts.extend(run.dispatcher.run(run.partitions))
        assert cluster.submitted == [["00000", "00001"]]
        assert run.listener.outcomes("00001") == ["done"]

    def test_stop_request_starts_no_more_partitions(self) -> None:
        """Running partitions end."""
        stop = Stop()
        cluster = FakeCluster("w")
        run = run_of(cluster, 9, stop=stop)
        for receipt in run.dispatcher.run(run.partitions):
            run.receipts.append(receipt)
            stop.request(StopReason.SIGNAL, signal_number=2)
        assert len(cluster.submitted) == 1
        assert set(run.done) <= {"00000", "00001"}


class TestClusterHealth:
    def test_lost_scheduler_ends_the_run(self) -> None:
        """A closed client is noticed in the next turn."""
        cluster = FakeCluster("w", default=NEVER)
        run = run_of(cluster, 1)
        cluster.status = "closed"
        with pytest.raises(SchedulerLost):
            list(run.dispatcher.run(run.partitions))

    def test_silent_scheduler_ends_the_run_after_the_limit(self) -> None:
        """``scheduler_timeout`` counts from the last answer."""
        cluster = FakeCluster("w", default=NEVER)
        run = run_of(cluster, 1, policy=DispatchPolicy(scheduler_timeout=30))
        cluster.answers = False
        run.start()
        run.step(30, seconds=1.0)
        with pytest.raises(SchedulerUnresponsive):
            run.step(seconds=1.0)

    @pytest.mark.fault(64)
    def test_scheduler_that_is_too_busy_to_answer_is_alive_while_tasks_end(self) -> None:
        """Results come through the scheduler: they prove that it works."""
        cluster = FakeCluster("w", default=NEVER)
        run = run_of(cluster, 6, policy=DispatchPolicy(scheduler_timeout=30, stall_timeout=HUGE))
        run.start()
        run.step()
        cluster.answers = False
        for number in range(5):
            run.step(20, seconds=1.0)
            cluster.finish(f"{number:05d}")
        run.step(30, seconds=1.0)
        with pytest.raises(SchedulerUnresponsive, match="does not answer"):
            run.step(3, seconds=1.0)
        assert len(run.done) == 5

    @pytest.mark.fault(65)
    def test_workers_of_a_shared_cluster_are_not_restarted(self, caplog: pytest.LogCaptureFixture) -> None:
        """The log says once which worker is paused, and how to allow a restart."""
        cluster = FakeCluster("w", default=NEVER)
        cluster.workers["w"] = "paused"
        policy = DispatchPolicy(stall_timeout=HUGE, no_workers_timeout=HUGE, may_restart=False)
        run = run_of(cluster, 1, policy=policy)
        run.start()
        run.step(40, seconds=1.0)
        assert cluster.restarted == []
        assert caplog.text.count("restart-workers: true") == 1

    @pytest.mark.fault(65)
    def test_stall_of_a_shared_cluster_ends_the_run_without_a_restart(self) -> None:
        """Nothing executes, and nothing may be restarted: waiting longer is of no use."""
        cluster = FakeCluster("w", default=NEVER)
        run = run_of(cluster, 1, policy=DispatchPolicy(stall_timeout=50, may_restart=False))
        run.start()
        with pytest.raises(InfrastructureError, match="nothing executes"):
            run.step(60, seconds=1.0)
        assert cluster.restarted == []

    def test_missing_workers_end_the_run_after_the_limit(self) -> None:
        """``no_workers_timeout`` counts from the last answer with a worker."""
        cluster = FakeCluster("w", default=NEVER)
        run = run_of(cluster, 1, policy=DispatchPolicy(no_workers_timeout=30))
        cluster.workers.clear()
        run.start()
        run.step(30, seconds=1.0)
        with pytest.raises(NoWorkers):
            run.step(5, seconds=1.0)

    def test_paused_idle_worker_is_restarted(self) -> None:
        """A worker paused for its memory would stay paused when no task executes on it."""
        cluster = FakeCluster("w", default=NEVER)
        cluster.workers["w"] = "paused"
        run = run_of(cluster, 1, policy=DispatchPolicy(stall_timeout=HUGE, no_workers_timeout=HUGE))
        run.start()
        run.step(20, seconds=1.0)
        assert cluster.restarted == ["w"]
        assert run.listener.results == []

    def test_paused_busy_worker_is_not_restarted(self) -> None:
        """It may run on when the task has ended."""
        cluster = FakeCluster("w", default=NEVER)
        cluster.workers["w"] = "paused"
        run = run_of(cluster, 1)
        run.start()
        cluster.start_task("00000", "w")
        run.step(60, seconds=1.0)
        assert cluster.restarted == []

    def test_stall_restarts_all_workers_and_then_fails(self) -> None:
        """Two restarts of workers that execute nothing are enough."""
        cluster = FakeCluster("w", default=NEVER)
        run = run_of(cluster, 1, policy=DispatchPolicy(stall_timeout=50))
        run.start()
        with pytest.raises(InfrastructureError, match="nothing executes"):
            run.step(200, seconds=1.0)
        assert cluster.restarted == ["w", "w"]


class TestWorkerCrash:
    def test_partition_is_isolated_after_two_crashes(self) -> None:
        """Only the partition that was executing is blamed; the one waiting on the same worker is not."""
        cluster = FakeCluster("w", threads=2, outcomes={"00000": [NEVER]})
        run = run_of(cluster)
        run.start()
        for worker in ("w", "v"):
            cluster.start_task("00000", worker)
            cluster.lose_worker(worker)
        run.end()
        assert run.tasks.isolated == ["00000"]
        assert cluster.futures["00000"].is_cancelled
        assert run.done == ["00000", "00001"]
        assert run.listener.outcomes("00000") == ["retry", "retry", "done"]

    def test_worker_that_announced_its_end_isolates_nothing(self) -> None:
        """Lifetime and retirement are no crashes."""
        cluster = FakeCluster("w", threads=2, outcomes={"00000": [NEVER]})
        run = run_of(cluster)
        run.start()
        for _ in range(5):
            cluster.start_task("00000", "w")
            cluster.lose_worker("w", is_expected=True)
        run.step(3)
        assert run.done == ["00001"]
        assert run.tasks.isolated == []
        assert not cluster.futures["00000"].is_cancelled


@dataclass
class FakeSupply:
    """A source of workers that a test plays."""

    causes: dict[str, LossCause | None] = field(default_factory=dict)
    """Cause of the loss of each worker; None: not known yet."""
    error: Exception | None = None
    demands: list[int] = field(default_factory=list)

    def set_demand(self, owner: int, partitions: int, /) -> None:
        self.demands.append(partitions)

    def expects_workers(self) -> bool:
        if self.error is not None:
            raise self.error
        return True

    def loss_cause(self, worker: str, /) -> LossCause | None:
        return self.causes.get(worker)


class TestSupply:
    def run(self, supply: FakeSupply, **options: Any) -> DispatcherRun:
        cluster = FakeCluster("w", threads=2, outcomes={"00000": [NEVER]})
        return run_of(cluster, shared_state=SharedClusterState(supply), **options)

    def test_partition_is_not_blamed_for_jobs_that_were_cancelled(self) -> None:
        """Six workers are lost with their jobs: nothing is isolated, and each loss is told once."""
        supply = FakeSupply()
        run = self.run(supply)
        run.start()
        for worker in "abcdef":
            run.cluster.start_task("00000", worker)
            run.cluster.lose_worker(worker)
            run.step()
            assert len(run.listener.outcomes("00000")) == "abcdef".index(worker), "the cause is not known yet"
            supply.causes[worker] = LossCause.JOB_ENDED
            run.step()
        assert run.tasks.isolated == []
        assert run.listener.outcomes("00000") == ["retry"] * 6
        assert {result.reason for result in run.listener.results if result.reason} == {
            "its worker's job was cancelled, preempted, or out of walltime"
        }
        run.cluster.finish("00000")
        run.end()
        assert supply.demands[0] == 1, "the other one is done"
        assert supply.demands[-1] == 0

    def test_partition_is_blamed_for_workers_that_died_by_themselves(self) -> None:
        supply = FakeSupply({"a": LossCause.CRASH, "b": LossCause.CRASH})
        run = self.run(supply)
        run.start()
        for worker in "ab":
            run.cluster.start_task("00000", worker)
            run.cluster.lose_worker(worker)
            run.step()
        run.end()
        assert run.tasks.isolated == ["00000"]

    def test_wait_in_a_queue_is_no_lack_of_workers(self) -> None:
        """Until the source of the workers gives up."""
        supply = FakeSupply()
        run = self.run(supply, policy=DispatchPolicy(no_workers_timeout=30))
        run.cluster.workers.clear()
        run.start()
        run.step(200, seconds=1.0)
        supply.error = NoWorkers("no job of the batch system started")
        with pytest.raises(NoWorkers, match="batch system"):
            run.step(2, seconds=1.0)


class TestMemoryKill:
    def test_executing_partition_is_split(self) -> None:
        """Its halves are submitted in its place."""
        cluster = FakeCluster("w", threads=2, outcomes={"00000": [NEVER]})
        receipt: Any = FakeReceipt("00000", splits=("00000.0", "00000.1"))
        result = SplitResult(receipt, tuple(make_partitions(*receipt.splits)))
        run = run_of(cluster, split=lambda partition, known, *, parts=2: result)
        run.start()
        cluster.start_task("00000", "w")
        cluster.kill_for_memory("w")
        run.end()
        assert receipt in run.receipts
        assert run.done == ["00000", "00000.0", "00000.1", "00001"]
        (split,) = [result for result in run.listener.results if result.partition.id == "00000"]
        assert (split.outcome, split.split_reason) == ("split", "memory")

    def test_partition_too_small_to_split_is_isolated(self) -> None:
        """The source decides what is too small."""
        cluster = FakeCluster("w", threads=2, outcomes={"00000": [NEVER]})
        run = run_of(cluster)
        run.start()
        cluster.start_task("00000", "w")
        cluster.kill_for_memory("w")
        run.end()
        assert run.tasks.isolated == ["00000"]


class TestDeadline:
    def test_overdue_partition_costs_its_worker_and_is_isolated_the_second_time(self) -> None:
        """A task cannot be interrupted, so its worker is restarted."""
        cluster = FakeCluster("w", threads=2, outcomes={"00000": [NEVER, NEVER]})
        run = run_of(cluster, policy=DispatchPolicy(partition_timeout=20, stall_timeout=HUGE))
        run.start()
        cluster.start_task("00000", "w")
        run.step(22, seconds=1.0)
        assert cluster.restarted == ["w"]
        cluster.start_task("00000~2", "w")
        run.step(22, seconds=1.0)
        run.end()
        assert run.done == ["00000", "00001"]
        assert run.tasks.isolated == ["00000"]
        assert cluster.restarted == ["w", "w"]
