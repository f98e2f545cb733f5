"""What the end of an attempt means, and what to do about it. Pure decisions; `pipeline.execution.dispatcher` carries
them out."""

from __future__ import annotations

import traceback
from concurrent.futures import CancelledError
from dataclasses import dataclass
from enum import StrEnum

from distributed.scheduler import KilledWorker, NoValidWorkerError

from pipeline.errors import (
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
from pipeline.execution.worker_events import Cause

BLAMES = 2
"""Workers that died while a partition was executing, after which it is isolated."""
MEMORY_DEATHS = 2
"""Workers killed for their memory by a partition or what it is a part of, after which it is isolated: to find the rows
by halves alone would cost a worker each time."""
TIMEOUTS = 2
"""Deadlines a partition may pass, after which it is isolated."""
USER_ATTEMPTS = 2
"""Attempts after an error that nobody foresaw: it may be a passing defect of the environment."""


class FailureKind(StrEnum):
    """Classes of outcomes; each has its own patience."""

    RECEIPT = "receipt"
    DATA = "data"
    USER_CODE = "user code"
    MEMORY = "memory"
    TIMEOUT = "timeout"
    INFRASTRUCTURE = "infrastructure"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    """A conflict, a defect of the spec, a full disk: the same the next time, whoever tries."""


BACK_OFF = {
    FailureKind.INFRASTRUCTURE: 0.5,
    FailureKind.CANCELLED: 0.5,
    FailureKind.USER_CODE: 0.5,
    FailureKind.TIMEOUT: 0.1,
}
"""Seconds until the second attempt by kind; twice as many until each further one."""


_KINDS: tuple[tuple[tuple[type[BaseException], ...], FailureKind], ...] = (
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
"""The first that fits; what fits none is code that raised."""


@dataclass(frozen=True)
class Retry:
    """Try the partition again, ``delay`` seconds from now."""

    delay: float
    reason: str


@dataclass(frozen=True)
class Fail:
    """Give the job up with this error."""

    error: PipelineError


@dataclass(frozen=True)
class Split:
    """Put two halves in its place; isolate it when it is too small for that."""

    reason: str


@dataclass(frozen=True)
class Isolate:
    """Score it alone, in a process of its own, where it can harm nobody."""

    reason: str


@dataclass(frozen=True)
class LeaveToDask:
    """Dask tries it again by itself; there is nothing to do."""

    reason: str


Decision = Retry | Fail | Split | Isolate


def classify(error: BaseException) -> FailureKind:
    """The class of an attempt that ended with ``error``."""
    return next((kind for types, kind in _KINDS if isinstance(error, types)), FailureKind.USER_CODE)


def after_failure(
    error: BaseException, *, partition: str, attempt: int, attempts: int, is_isolated: bool = False
) -> Decision:
    """What to do about a partition whose ``attempt``-th attempt (from 1) ended with ``error``.

    Storage and cluster failures are tried again with exponential back-off. What is wrong with the data, the steps or
    the model will be wrong the next time: such an error of ours is final at once, and an unforeseen one is tried once
    more. What needs too much memory is cut; what passes its deadline, or kills its workers, is isolated. A partition
    that is isolated already has nothing left but to be tried again or to fail.
    """
    kind = classify(error)
    if kind is FailureKind.MEMORY and not is_isolated:
        return Isolate("memory") if isinstance(error, OutOfMemory) else Split("MemoryError")
    if kind is FailureKind.TIMEOUT and not is_isolated:
        return Isolate("timeout") if attempt >= TIMEOUTS else _retry(error, kind, attempt)
    if attempt < _allowed(error, kind, attempts):
        return _retry(error, kind, attempt)
    if isinstance(error, KilledWorker):
        return Fail(stuck(partition, attempt)) if is_isolated else Isolate("crash")
    return Fail(_final(error, kind, partition, attempt))


def after_worker_loss(
    cause: Cause, *, partition: str, crash_count: int, attempts: int, is_isolated: bool, oom_count: int = 0
) -> Split | Isolate | LeaveToDask | Fail:
    """What to do about a partition that was executing when its worker left.

    :param crash_count: deaths it is to blame for, this one included if it is.
    :param oom_count: the same of workers killed for their memory, by what it is a part of too.
    """
    if is_isolated:
        # Its code ran in a process of its own, so that it hardly was the reason.
        return (
            Fail(stuck(partition, crash_count))
            if crash_count > BLAMES + attempts
            else LeaveToDask(f"its worker {cause}")
        )
    if cause == "memory" and oom_count < MEMORY_DEATHS:
        return Split("worker killed for memory")
    if cause == "memory":
        return Isolate("worker killed for memory again")
    if cause == "crash" and crash_count >= BLAMES:
        return Isolate(f"{crash_count} workers died while it was executing")
    return LeaveToDask({"crash": "its worker died", "left": "its worker left"}.get(cause, "its worker was restarted"))


def is_blamed(cause: Cause) -> bool:
    """Whether a worker that left for that cause counts against what was executing on it."""
    return cause == "crash"


def stuck(partition: str, deaths: int) -> PartitionStuck:
    """The error about a partition whose workers die however it is run."""
    return PartitionStuck(
        "a partition keeps killing its workers",
        where=f"partition {partition}",
        found=f"{deaths} workers died while it was executing, isolated at last",
        next_step="mend the step or the model that crashes, or give the workers more memory; then resume",
    )


def overdue(partition: str, *, limit: float) -> PartitionTimeout:
    """The error about an attempt that passed its deadline."""
    return PartitionTimeout(
        "a partition ran past its deadline",
        where=f"partition {partition}",
        found=f"more than {limit:g} s (partition_timeout)",
        next_step="mend the step that takes so long, or raise pipeline.scoring.partition-timeout; then resume",
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
            "no worker is left that could do a partition",
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
        next_step="mend the cause, then resume; what is done stays done",
    )
