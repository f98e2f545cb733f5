"""What a running job spends, and when it must stop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.driver.budget import BudgetMonitor
from pipeline.errors import BudgetExhausted
from pipeline.events import RunningPartition
from pipeline.jobs.budget import Spending, read_budget, read_spending, set_budget
from pipeline.jobs.cancellation import Stop, StopReason
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status, status_after
from pipeline.models.engines import EngineUse
from pipeline.spec.budget import Budget
from pipeline.testing.fake_clock import FakeClock
from pipeline.testing.jobs import small_job


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    job = small_job(tmp_path / "in", sink=str(tmp_path / "out"), rows=(5,))
    return JobDirectory.create(str(tmp_path / "jobs"), job.plan, job="small-1")


def monitor_of(job: JobDirectory, **limits: float) -> BudgetMonitor:
    set_budget(job, Budget(**limits))
    monitor = BudgetMonitor.open(job, epoch=1, stop=Stop())
    monitor.clock = FakeClock()
    return monitor


def receipt(partition: str, cost: float) -> Any:
    return SimpleNamespace(plan="p", round=0, partition=partition, engine=EngineUse(usage={"cost": cost}))


def running(partition: str, cost: float) -> RunningPartition:
    return RunningPartition(partition, "w", 10, 5, 1.0, 0.0, cost)


def test_costs_of_receipts_and_of_what_runs(job: JobDirectory) -> None:
    monitor = monitor_of(job, cost=10.0)
    monitor.add("j", receipt("00000", 4.0))
    monitor.add("j", receipt("00000", 4.0))  # the same receipt, read twice
    monitor.advanced("j", [running("00001", 3.0)])
    monitor.advanced("other", [running("00001", 2.5)])
    assert (monitor.use.cost, monitor.stop.is_requested) == (9.5, False)
    monitor.add("j", receipt("00001", 3.2))  # in place of what it had spent while it ran
    assert monitor.use.cost == pytest.approx(9.7)
    monitor.ended("other")
    monitor.add("j", receipt("00002", 2.8))
    assert monitor.stop.reason is StopReason.BUDGET
    error = monitor.stop.error("job-1", left=3)
    assert isinstance(error, BudgetExhausted)
    assert (status_after(error), error.exit_code) == (Status.INCOMPLETE, 9)
    assert "3 partitions are left" in error.message
    assert "resume job-1 --budget" in error.next_step


def test_hours_of_machines_over_all_runs(job: JobDirectory) -> None:
    Spending(0.0, 3600.0).write(job.store, "7")
    monitor = monitor_of(job, node_hours=3.0)
    monitor.count(2, 3000.0)
    assert not monitor.stop.is_requested
    monitor.count(2, 600.0)
    assert monitor.stop.reason is StopReason.BUDGET
    monitor.record()
    use = read_budget(job)
    assert use is not None
    assert (use.node_hours, use.node_hours_limit) == (3.0, 3.0)


def test_machines_are_counted_once(job: JobDirectory) -> None:
    addresses = ["tcp://10.0.0.1:1", "tcp://10.0.0.1:2", "tls://10.0.0.2:1", "inproc://10.0.0.3/1/2"]
    client = SimpleNamespace(scheduler_info=lambda n_workers: {"workers": dict.fromkeys(addresses)})
    assert BudgetMonitor._nodes(client, 0) == 3
    assert BudgetMonitor._nodes(SimpleNamespace(), 5) == 5


def test_a_job_without_a_budget_records_nothing(job: JobDirectory) -> None:
    monitor = BudgetMonitor.open(job, epoch=1, stop=Stop())
    monitor.add("j", receipt("00000", 1e9))
    with monitor.metering(None):
        pass
    assert not monitor.stop.is_requested
    assert read_spending(job.store) == Spending(0.0, 0.0)


def test_a_stop_by_a_signal_outranks_the_budget() -> None:
    stop = Stop()
    stop.request(StopReason.BUDGET, message="cost 1 of 1")
    stop.request(StopReason.SIGNAL, signal_number=15)
    assert stop.reason is StopReason.SIGNAL
