"""Decisions after failed attempts and lost workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from distributed.scheduler import KilledWorker

from pipeline.errors import (
    DeviceLost,
    DeviceOutOfMemory,
    DiskFull,
    OutOfMemory,
    OutputExists,
    PartitionFailed,
    PartitionStuck,
    PipelineError,
    SchemaDrift,
    StepFailed,
    StorageError,
)
from pipeline.execution.failures import (
    Fail,
    Isolate,
    LeaveToDask,
    Retry,
    Split,
    after_failure,
    after_worker_loss,
    overdue,
)
from pipeline.execution.worker_events import LossCause


def killed() -> KilledWorker:
    return KilledWorker("key", SimpleNamespace(address="tcp://w"), 1)


class TestAfterFailure:
    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (SchemaDrift("x"), SchemaDrift),
            (DiskFull("x"), DiskFull),
            (StepFailed("x"), StepFailed),
            (OutputExists("x"), OutputExists),
        ],
    )
    def test_data_and_user_errors_fail_at_once(self, error: Exception, kind: type[PipelineError]) -> None:
        """An error that a retry would meet again is final."""
        decision = after_failure(error, partition="00001", attempt=1, attempts=3)
        assert isinstance(decision, Fail)
        assert isinstance(decision.error, kind)

    @pytest.mark.parametrize("error", [StorageError("x"), OSError("x"), killed()])
    @pytest.mark.fault(23)
    def test_infrastructure_errors_are_retried_with_back_off(self, error: Exception) -> None:
        """Delays double until all attempts are used."""
        decisions = [after_failure(error, partition="00001", attempt=n, attempts=3) for n in (1, 2, 3)]
        last = Isolate if isinstance(error, KilledWorker) else Fail
        assert [type(decision) for decision in decisions] == [Retry, Retry, last]
        assert [decision.delay for decision in decisions if isinstance(decision, Retry)] == [0.5, 1.0]

    def test_isolated_partition_that_kills_workers_fails(self) -> None:
        """The error names the partition."""
        decision = after_failure(killed(), partition="00007", attempt=3, attempts=3, is_isolated=True)
        assert isinstance(decision, Fail)
        assert isinstance(decision.error, PartitionStuck)
        assert "00007" in decision.error.where

    def test_too_little_device_memory_is_final(self) -> None:
        """A process of its own would score on the CPU, and the job requests GPUs."""
        error = DeviceOutOfMemory("x")
        final = after_failure(error, partition="00001", attempt=1, attempts=3)
        assert isinstance(final, Fail)
        assert final.error is error

    def test_lost_gpu_is_retried_elsewhere(self) -> None:
        assert isinstance(after_failure(DeviceLost("x"), partition="00001", attempt=1, attempts=3), Retry)
        assert isinstance(after_failure(DeviceLost("x"), partition="00001", attempt=3, attempts=3), Fail)

    def test_memory_error_splits_and_out_of_memory_isolates(self) -> None:
        """`OutOfMemory` comes from the smallest batch: smaller parts would not help. In isolation both are final."""
        assert isinstance(after_failure(MemoryError("x"), partition="00001", attempt=1, attempts=3), Split)
        assert isinstance(after_failure(OutOfMemory("x"), partition="00001", attempt=1, attempts=3), Isolate)
        isolated = after_failure(MemoryError("x"), partition="00001", attempt=1, attempts=3, is_isolated=True)
        assert isinstance(isolated, Fail)
        assert isinstance(isolated.error, OutOfMemory)

    def test_second_timeout_isolates(self) -> None:
        """One timeout may be due to a slow worker."""
        error = overdue("00001", limit=1)
        kinds = [type(after_failure(error, partition="00001", attempt=n, attempts=9)) for n in (1, 2)]
        assert kinds == [Retry, Isolate]

    def test_unforeseen_error_is_retried_once(self) -> None:
        """The final error holds the traceback."""

        def broken() -> None:
            raise RuntimeError("this is unforeseen")

        try:
            broken()
        except RuntimeError as error:
            first = after_failure(error, partition="00001", attempt=1, attempts=3)
            second = after_failure(error, partition="00001", attempt=2, attempts=3)
        assert isinstance(first, Retry)
        assert isinstance(second, Fail)
        assert isinstance(second.error, PartitionFailed)
        assert "this is unforeseen" in second.error.found
        assert "broken" in second.error.found


class TestAfterWorkerLoss:
    @pytest.mark.parametrize(
        ("cause", "crash_count", "is_isolated", "kind"),
        [
            (LossCause.MEMORY, 0, False, Split),
            (LossCause.CRASH, 1, False, LeaveToDask),
            (LossCause.CRASH, 2, False, Isolate),
            (LossCause.LEFT, 9, False, LeaveToDask),
            (LossCause.RESTARTED, 9, False, LeaveToDask),
            (LossCause.CRASH, 2, True, LeaveToDask),
            (LossCause.CRASH, 6, True, Fail),
        ],
    )
    def test_decision_by_cause(self, cause: LossCause, crash_count: int, is_isolated: bool, kind: type[object]) -> None:
        """Only crashes and memory kills count against a partition."""
        decision = after_worker_loss(cause, partition="1", crash_count=crash_count, attempts=3, is_isolated=is_isolated)
        assert type(decision) is kind

    @pytest.mark.fault(23)
    def test_second_memory_kill_isolates(self) -> None:
        """Kills by the partition that a part comes from count too."""
        decisions = [
            after_worker_loss(
                LossCause.MEMORY, partition="1.0", crash_count=0, attempts=3, is_isolated=False, oom_count=kills
            )
            for kills in (1, 2)
        ]
        assert [type(decision) for decision in decisions] == [Split, Isolate]
