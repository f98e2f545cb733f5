"""Workers of batch jobs that leave by themselves: when, and what becomes of what runs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.execution.clusters import worker_drain
from pipeline.execution.clusters.worker_drain import Drain, DrainTimes
from pipeline.scoring.progress import track_attempt
from pipeline.testing.fake_clock import FakeClock


class TestTimes:
    def test_count_from_the_start_of_the_job(self) -> None:
        """A prologue that takes long takes from the walltime. The workers of one job leave together."""
        environment = {"PIPELINE_JOB_STARTED": "1000", "PIPELINE_LIFETIME": "3540", "PIPELINE_STAGGER": "120"}
        times = [
            DrainTimes.from_environment(environment, name=name, now=1200.0)
            for name in ("pipeline-1-0", "pipeline-1-1", "pipeline-2-0")
        ]
        leaves = [one.leaves_at for one in times if one is not None]
        assert leaves[0] == leaves[1] != leaves[2]
        assert all(1000 + 3540 - 120 <= at <= 1000 + 3540 for at in leaves)

    def test_follow_a_shorter_limit_of_the_batch_system(self) -> None:
        environment = {"PIPELINE_JOB_STARTED": "0", "PIPELINE_LIFETIME": "3540", "SLURM_JOB_END_TIME": "600"}
        times = DrainTimes.from_environment(environment, name="pipeline-1", now=0.0)
        assert times is not None
        assert times.leaves_at == 595

    def test_of_other_workers_are_none(self) -> None:
        assert DrainTimes.from_environment({}, name="0", now=0.0) is None


class FakeWorker:
    """A worker, as far as a drain uses it."""

    address = "tcp://w"

    def __init__(self) -> None:
        self.memory_manager = SimpleNamespace(memory_pause_fraction=0.8)
        self.status: Any = "running"
        self.events: list[str] = []

    def log_event(self, topic: str, message: Any) -> None:
        self.events.append(message["reason"])

    async def close_gracefully(self, *, restart: bool, reason: str) -> None:
        self.events.append(f"closed: {reason}")


class TestDrain:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
        """Time passes only while the drain sleeps; the end of the process is an exception."""
        clock = FakeClock(0.0)

        async def sleep(seconds: float) -> None:
            clock.advance(seconds)

        def leave(code: int) -> None:
            raise SystemExit(code)

        monkeypatch.setattr(worker_drain.asyncio, "sleep", sleep)
        monkeypatch.setattr(worker_drain.os, "_exit", leave)
        return clock

    def run(self, drain: Drain) -> None:
        with pytest.raises(SystemExit):
            asyncio.run(drain.run())

    def test_idle_worker_leaves_before_its_deadline(self, clock: FakeClock) -> None:
        worker = FakeWorker()
        self.run(Drain(worker, DrainTimes(100.0, 100.0), clock=clock))
        assert worker.events == ["deadline", "closed: leaving-deadline"]
        assert str(worker.status) == "Status.paused"
        assert 90 < clock.now < 93

    def test_running_partition_is_asked_to_stop_in_time_for_its_batch(self, clock: FakeClock) -> None:
        """The longer a batch takes, the earlier; a partition that does not stop is left behind at the end."""
        worker = FakeWorker()
        drain = Drain(worker, DrainTimes(100.0, 100.0), clock=clock)
        with track_attempt("key", rows=1000) as attempt:
            attempt.clock = clock
            attempt.started, attempt.batches = 0.0, 10
            self.run(drain)
            assert attempt.parts == 1
        assert 100 <= clock.now < 101

    def test_signal_leaves_time_to_commit(self, clock: FakeClock) -> None:
        worker = FakeWorker()
        drain = Drain(worker, DrainTimes(1000.0, 1000.0), clock=clock)
        drain._on_signal(15, None)
        with track_attempt("key", rows=1000) as attempt:
            self.run(drain)
            assert attempt.parts == 1
        assert 20 <= clock.now < 21
        assert worker.events[0] == "signal"
