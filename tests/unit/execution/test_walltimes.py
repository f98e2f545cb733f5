"""The dispatcher with workers whose time is over: partitions are handed on, and what fits no worker fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline.common.rows import Fragment
from pipeline.errors import PartitionTimeout
from pipeline.events import SplitReason
from pipeline.execution.health import DispatchPolicy
from pipeline.execution.protocols import SplitResult
from pipeline.jobs.cancellation import Stop, StopReason
from pipeline.plan.plan import Partition
from pipeline.testing.fake_cluster import NEVER, DispatcherRun, FakeCluster, FakeReceipt, make_partitions, partition_of


def rest_of(partition: Partition, rows: int) -> tuple[Partition, Partition]:
    """Return the first ``rows`` rows of a partition, and the others."""
    return tuple(  # type: ignore[return-value]
        Partition(f"{partition.id}.{number}", (Fragment("f", 0, size, 0, 1, size),))
        for number, size in enumerate((rows, partition.rows - rows))
    )


@dataclass
class Farm:
    """Workers that live ``lifetime`` seconds, score a row a second and are replaced at once; a second a turn."""

    run: DispatcherRun
    workers: int
    lifetime: int
    margin: int
    rows: dict[str, int]
    """Rows of each partition."""
    batch: int = 1
    """Seconds between two batch boundaries."""
    spent: int = 0
    """Seconds of scoring."""
    kept: int = 0
    """Seconds of scoring that ended in a receipt."""
    ages: dict[str, int] = field(default_factory=dict)
    running: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Key and finished seconds of the attempt of each worker."""
    born: int = 0

    def turn(self) -> None:
        """Let a second pass."""
        cluster = self.run.cluster
        while len(self.ages) < self.workers:
            self.ages[f"w{self.born}"] = -7 * (self.born % 3)
            self.born += 1
        cluster.workers.clear()
        cluster.workers.update(dict.fromkeys(self.ages, "running"))
        for worker in list(self.ages):
            self._play(worker)
        self.run.step(seconds=1.0)

    def _play(self, worker: str) -> None:
        cluster = self.run.cluster
        self.ages[worker] += 1
        left = self.lifetime - self.ages[worker]
        if worker not in self.running and left > self.margin:
            taken = {key for key, _ in self.running.values()}
            waiting = [
                key
                for key, future in cluster.futures.items()
                if future.outcome is None and not future.is_cancelled and key not in taken
            ]
            if waiting:
                self.running[worker] = (waiting[0], 0)
                cluster.start_task(waiting[0], worker)
        if left == self.margin:
            cluster.announce_leaving(worker, lifetime=self.lifetime)
        if worker in self.running:
            self._score(worker, is_leaving=left <= self.margin)
        if left <= 0 or (left < self.margin and worker not in self.running):
            cluster.lose_worker(worker, is_expected=True)
            self.running.pop(worker, None)
            del self.ages[worker]

    def _score(self, worker: str, *, is_leaving: bool) -> None:
        key, done = self.running[worker]
        rows = self.rows[partition_of(key)]
        done += 1
        self.spent += 1
        self.running[worker] = (key, done)
        if done >= rows:
            self._end(worker, rows, FakeReceipt(partition_of(key)))
        elif is_leaving and done % self.batch == 0:
            self._end(worker, done, FakeReceipt(partition_of(key), splits=(str(done),)))

    def _end(self, worker: str, done: int, receipt: FakeReceipt) -> None:
        key, _ = self.running.pop(worker)
        self.kept += done
        self.run.cluster.finish(key, receipt)


def farm_of(*, partitions: int, seconds: int, **options: Any) -> Farm:
    """A job of equal partitions, on workers with short lives."""
    rows: dict[str, int] = {}

    def split(partition: Partition, receipt: Any, *, parts: int = 2) -> SplitResult | None:
        first, rest = rest_of(partition, int(receipt.splits[0]))
        rows[rest.id] = rest.rows
        return SplitResult(receipt, (first, rest), FakeReceipt(first.id))  # type: ignore[arg-type]

    planned = make_partitions(*(f"p{number:02d}" for number in range(partitions)), rows=seconds)
    rows.update((partition.id, seconds) for partition in planned)
    run = DispatcherRun(
        FakeCluster("w0", threads=1, default=NEVER), planned, split=split, policy=DispatchPolicy(grace=0.0)
    )
    farm = Farm(run, rows=rows, **options)
    run.start()
    return farm


@pytest.mark.parametrize(("seconds", "lifetime"), [(72, 55), (20, 55), (200, 55)])
def test_next_to_no_work_is_lost_at_the_ends_of_workers(seconds: int, lifetime: int) -> None:
    """Also with partitions that take longer than any worker lives: what is scored once is not scored again."""
    farm = farm_of(partitions=24, seconds=seconds, workers=4, lifetime=lifetime, margin=7)
    for _ in range(4000):
        if not farm.run.dispatcher.has_work:
            break
        farm.turn()
    assert not farm.run.dispatcher.has_work
    assert farm.kept == 24 * seconds
    assert farm.spent <= 1.02 * farm.kept
    reasons = {result.split_reason for result in farm.run.listener.results if result.outcome == "split"}
    assert reasons <= {SplitReason.HANDED_ON}
    assert farm.run.dispatcher.retries == 0


def test_batches_longer_than_a_lifetime_fail_with_both_numbers() -> None:
    """Instead of an endless loop of attempts that do not get to a batch boundary."""
    farm = farm_of(partitions=4, seconds=600, batch=80, workers=2, lifetime=55, margin=7)
    for _ in range(300):
        if farm.run.dispatcher.is_closing:
            break
        farm.turn()
    with pytest.raises(PartitionTimeout, match="longer than workers live") as caught:
        list(farm.run.dispatcher.run(()))
    assert "within the 55 s that a worker has" in str(caught.value.expected)
    assert "in the lifetimes of 2 workers" in str(caught.value.found)


def test_a_worker_that_is_killed_while_it_leaves_is_blamed_on_nobody() -> None:
    """Cancelled and preempted workers announce it, but may not get as far as to leave in good order."""
    run = DispatcherRun(FakeCluster("w", default=NEVER), make_partitions("p"))
    run.start()
    for worker in "abcd":
        run.cluster.start_task("p", worker)
        run.cluster.announce_leaving(worker, reason="signal")
        run.cluster.lose_worker(worker)
        run.step()
    assert run.listener.outcomes("p") == ["retry"] * 4
    assert {result.reason for result in run.listener.results} == {"its worker left"}
    assert run.tasks.isolated == []


def test_a_stopped_run_asks_its_attempts_to_commit_what_is_done() -> None:
    """A batch system kills a driver soon after SIGTERM: partitions that run for minutes would be lost."""
    stop = Stop()
    cluster = FakeCluster("w", default=NEVER)
    run = DispatcherRun(cluster, make_partitions("p"), stop=stop, policy=DispatchPolicy(grace=30.0))
    run.start()
    cluster.start_task("p", "w")
    run.step()
    stop.request(StopReason.SIGNAL)
    drained = run.dispatcher.run(())
    original = run.dispatcher._health.check

    def check(is_busy: bool) -> None:
        run.clock.advance(1.0)
        original(is_busy)

    run.dispatcher._health.check = check  # type: ignore[method-assign]
    list(drained)
    assert cluster.calls_of("request_split") == [(("p", 1), "w")]
