"""Choose the reaction to a failed attempt or a lost worker. Pure; `pipeline.execution.dispatcher` acts on it."""

from __future__ import annotations

import traceback
from concurrent.futures import CancelledError
from dataclasses import dataclass
from enum import StrEnum

from distributed.scheduler import KilledWorker, NoValidWorkerError

from pipeline.errors import (
    DeviceOutOfMemory,
    DiskFull,
    InfrastructureError,
    InputError,
    NoWorkers,
    OutOfMemory,
    PartitionFailed,
    PartitionStuck,
    PartitionTimeout,
    PipelineError,
    ReconciliationFailed,
    StorageError,
    UserCodeError,
)
from pipeline.execution.worker_events import LossCause

MAX_CRASHES = 2
"""Worker crashes while a partition was executing, after which the partition is isolated."""
MAX_OOM_KILLS = 2
"""Workers killed for their memory by a partition, or a partition it was split from, after which the partition is
isolated. Each further half would cost another worker."""
MAX_UNFINISHED = 2.0
"""Lifetimes of workers in which a partition did not finish a batch, after which the job fails."""
MAX_TIMEOUTS = 2
"""Timeouts of a partition after which the partition is isolated."""
USER_ATTEMPTS = 2
"""Attempts at a partition that raises an unforeseen error: the cause may be transient."""


class FailureKind(StrEnum):
    """Kinds of failures. Each kind has its own number of attempts."""

    DATA = "data"
    USER_CODE = "user code"
    MEMORY = "memory"
    TIMEOUT = "timeout"
    INFRASTRUCTURE = "infrastructure"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    """A conflict, an invalid spec, a full disk: a retry would fail as well."""


BACK_OFF = {
    FailureKind.INFRASTRUCTURE: 0.5,
    FailureKind.CANCELLED: 0.5,
    FailureKind.USER_CODE: 0.5,
    FailureKind.TIMEOUT: 0.1,
}
"""Seconds until the second attempt by kind; doubled for each further attempt."""


_KINDS: tuple[tuple[tuple[type[BaseException], ...], FailureKind], ...] = (
    # A process of its own would score on the CPU, and the job requests GPUs.
    ((DeviceOutOfMemory,), FailureKind.USER_CODE),
    ((MemoryError, OutOfMemory), FailureKind.MEMORY),
    ((PartitionTimeout,), FailureKind.TIMEOUT),
    ((DiskFull, ReconciliationFailed), FailureKind.REFUSED),
    ((StorageError, InfrastructureError), FailureKind.INFRASTRUCTURE),
    ((InputError,), FailureKind.DATA),
    ((UserCodeError,), FailureKind.USER_CODE),
    ((PipelineError,), FailureKind.REFUSED),
    ((CancelledError,), FailureKind.CANCELLED),
    ((OSError, TimeoutError, KilledWorker, NoValidWorkerError), FailureKind.INFRASTRUCTURE),
)
"""Kinds by type of error; the first match wins. All other errors are user code."""


@dataclass(frozen=True)
class Retry:
    """Retry the partition ``delay`` seconds from now."""

    delay: float
    reason: str


@dataclass(frozen=True)
class Fail:
    """Fail the job with this error."""

    error: PipelineError


@dataclass(frozen=True)
class Split:
    """Replace the partition by two halves; isolate the partition if it is too small to split."""

    reason: str


@dataclass(frozen=True)
class Isolate:
    """Score the partition alone on its worker, in a process of its own."""

    reason: str


@dataclass(frozen=True)
class LeaveToDask:
    """Do nothing: Dask reruns the task."""

    reason: str


Decision = Retry | Fail | Split | Isolate


def is_worker_loss(reason: str) -> bool:
    """True if an attempt with this reason ended with its worker."""
    return reason.removeprefix("isolated: ") in (*_LOSSES.values(), _OOM, _OOM_AGAIN) or reason.endswith(_DEATHS)


def classify(error: BaseException) -> FailureKind:
    """Return the kind of an error that ended an attempt."""
    return next((kind for types, kind in _KINDS if isinstance(error, types)), FailureKind.USER_CODE)


def after_failure(
    error: BaseException, *, partition: str, attempt: int, attempts: int, is_isolated: bool = False
) -> Decision:
    """Decide about a partition whose ``attempt``-th attempt (from 1) ended with ``error``.

    Storage and cluster failures are retried with exponential back-off. Errors of data, steps or model are final at
    once; unforeseen errors are retried once. A partition that needs too much memory is split. A partition that times
    out or kills its workers is isolated. A partition that is isolated already is retried or fails the job.
    """
    kind = classify(error)
    if kind is FailureKind.MEMORY and not is_isolated:
        return Isolate("memory") if isinstance(error, OutOfMemory) else Split("MemoryError")
    if kind is FailureKind.TIMEOUT and not is_isolated:
        return Isolate("timeout") if attempt >= MAX_TIMEOUTS else _retry(error, kind, attempt)
    if attempt < _allowed(error, kind, attempts):
        return _retry(error, kind, attempt)
    if isinstance(error, KilledWorker):
        return Fail(stuck(partition, attempt)) if is_isolated else Isolate("crash")
    return Fail(_final(error, kind, partition, attempt))


def after_worker_loss(
    cause: LossCause, *, partition: str, crash_count: int, attempts: int, is_isolated: bool, oom_count: int = 0
) -> Split | Isolate | LeaveToDask | Fail:
    """Decide about a partition that was executing when its worker left.

    :param crash_count: crashes that the partition is blamed for, including this loss.
    :param oom_count: workers killed for their memory by this partition or a partition it was split from, including
        this loss.
    """
    if is_isolated:
        # The partition's code ran in a process of its own, so it is probably not the reason.
        is_stuck = crash_count > MAX_CRASHES + attempts
        return Fail(stuck(partition, crash_count)) if is_stuck else LeaveToDask(_LOSSES[cause])
    if cause is LossCause.MEMORY and oom_count < MAX_OOM_KILLS:
        return Split(_OOM)
    if cause is LossCause.MEMORY:
        return Isolate(_OOM_AGAIN)
    if cause is LossCause.CRASH and crash_count >= MAX_CRASHES:
        return Isolate(f"{crash_count}{_DEATHS}")
    return LeaveToDask(_LOSSES[cause])


_OOM, _OOM_AGAIN = "worker killed for memory", "worker killed for memory again"
_DEATHS = " workers died while it was executing"
_LOSSES = {
    LossCause.MEMORY: "its worker ran out of memory",
    LossCause.CRASH: "its worker died",
    LossCause.LEFT: "its worker left",
    LossCause.RESTARTED: "its worker was restarted",
    LossCause.JOB_ENDED: "its worker's job was cancelled, preempted, or out of walltime",
}


def stuck(partition: str, crashes: int) -> PartitionStuck:
    """Return the error for a partition whose workers die even if the partition is isolated."""
    return PartitionStuck(
        "a partition keeps killing its workers",
        where=f"partition {partition}",
        found=f"{crashes} workers died while it was executing, even in isolation",
        next_step="fix the step or the model that crashes, or give the workers more memory; then resume",
    )


def lifetimes_lost(seconds: float, *, lifetime: float) -> float:
    """Return how much an execution without a batch counts: a lifetime, if it had half of one; else a quarter."""
    return 1.0 if seconds >= lifetime / 2 else 0.25


def too_long(partition: str, *, seconds: float, lifetime: float) -> PartitionTimeout:
    """Return the error for a partition of which not one batch fits into the lifetime of a worker."""
    return PartitionTimeout(
        "a batch of rows takes longer than workers live",
        where=f"partition {partition}",
        found=f"no batch was done in {seconds:.0f} s, in the lifetimes of {MAX_UNFINISHED:.0f} workers",
        expected=f"a batch within the {lifetime:.0f} s that a worker has, from the start of its job until it leaves",
        next_step="raise walltime in the cluster's file, or lower batch_rows; then resume",
    )


def overdue(partition: str, *, limit: float) -> PartitionTimeout:
    """Return the error for an attempt that timed out."""
    return PartitionTimeout(
        "a partition timed out",
        where=f"partition {partition}",
        found=f"more than {limit:g} s (partition_timeout)",
        next_step="fix the slow step, or raise pipeline.partition-timeout; then resume",
    )


def _retry(error: BaseException, kind: FailureKind, attempt: int) -> Retry:
    delay = BACK_OFF.get(kind, 0.5) * 2.0 ** (attempt - 1)
    return Retry(delay=delay, reason=f"{type(error).__name__}: {_first_line(error)}")


def _allowed(error: BaseException, kind: FailureKind, attempts: int) -> int:
    if kind in (FailureKind.INFRASTRUCTURE, FailureKind.CANCELLED):
        return attempts
    is_final = kind is FailureKind.MEMORY or isinstance(error, PipelineError)
    return 1 if is_final else min(attempts, USER_ATTEMPTS)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _final(error: BaseException, kind: FailureKind, partition: str, attempt: int) -> PipelineError:
    if isinstance(error, PipelineError):
        return error
    if kind is FailureKind.MEMORY:
        return _out_of_memory(error, partition)
    if isinstance(error, NoValidWorkerError):
        return NoWorkers(
            "no worker can run a partition",
            where=f"partition {partition}",
            found=_first_line(error),
            next_step="start workers, then resume the job",
        )
    return _failed(error, partition, attempt)


def _out_of_memory(error: BaseException, partition: str) -> OutOfMemory:
    return OutOfMemory(
        "a partition ran out of memory",
        where=f"partition {partition}",
        found=_first_line(error) or "MemoryError",
        next_step="give the workers more memory (--memory-limit) and resume",
    )


def _failed(error: BaseException, partition: str, attempt: int) -> PartitionFailed:
    trace = "".join(traceback.format_exception(error)[-3:]).strip()
    return PartitionFailed(
        "a partition failed on every attempt",
        where=f"partition {partition}",
        found=f"{trace}\n  (attempt {attempt})",
        next_step="fix the cause, then resume; completed partitions are kept",
    )
