"""Partitions in flight: a bounded window of tasks, what each outcome means, and the watch over the cluster.

What to do with an outcome is a pure decision (`decide`); this module carries it out. Its facts about Dask are in
``docs/design/dask.md``.
"""

from __future__ import annotations

import heapq
import queue
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

from distributed.scheduler import KilledWorker, NoValidWorkerError

from pipeline.errors import (
    DiskFull,
    NoWorkers,
    OutOfMemory,
    PartitionFailed,
    PartitionStuck,
    PipelineError,
    ReconciliationFailed,
    SchedulerLost,
    SchedulerUnresponsive,
    StorageError,
)
from pipeline.plan import Partition
from pipeline.receipt import Receipt

TICK = 0.5
"""Seconds between two looks at the cluster while nothing ends."""
PROBE_EVERY = 3.0
"""Seconds between two questions to the scheduler."""
PROBE_TIMEOUT = 5.0
"""Seconds the scheduler has to answer one."""


@dataclass(frozen=True)
class Policy:
    """Limits of patience."""

    attempts: int = 3
    """Attempts a partition gets when storage or the cluster fails under it."""
    no_workers_timeout: float = 300.0
    """Seconds without any worker until `NoWorkers`."""
    scheduler_timeout: float = 30.0
    """Seconds without an answer until `SchedulerUnresponsive`."""
    grace: float = 60.0
    """Seconds running partitions are given to end once no more are started."""


@dataclass(frozen=True)
class Retry:
    """Try the partition again, ``delay`` seconds from now."""

    delay: float
    reason: str


@dataclass(frozen=True)
class Fail:
    """Give the job up with this error."""

    error: PipelineError


def decide(error: BaseException, *, partition: str, attempt: int, attempts: int) -> Retry | Fail:
    """What to do about a partition whose ``attempt``-th attempt (from 1) ended with ``error``.

    Storage and cluster failures are tried again with exponential back-off. What is wrong with the data, the steps or
    the model will be wrong the next time: such an error of ours is final at once, and an unforeseen one, which may be
    a passing defect of the environment, is tried once more.
    """
    if isinstance(error, PipelineError) and not _is_passing(error):
        return Fail(error)
    if isinstance(error, MemoryError):
        return Fail(_out_of_memory(error, partition))
    allowed = attempts if _is_infrastructure(error) else min(attempts, 2)
    if attempt < allowed:
        return Retry(delay=0.5 * 2.0 ** (attempt - 1), reason=f"{type(error).__name__}: {_first_line(error)}")
    if isinstance(error, PipelineError):
        return Fail(error)
    if isinstance(error, KilledWorker):
        return Fail(_stuck(error, partition, attempt))
    return Fail(_failed(error, partition, attempt))


def _is_passing(error: PipelineError) -> bool:
    return isinstance(error, StorageError) and not isinstance(error, (DiskFull, ReconciliationFailed))


def _is_infrastructure(error: BaseException) -> bool:
    return isinstance(error, (StorageError, OSError, KilledWorker, CancelledError, NoValidWorkerError, TimeoutError))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _out_of_memory(error: BaseException, partition: str) -> OutOfMemory:
    return OutOfMemory(
        "a partition ran out of memory",
        where=f"partition {partition}",
        found=_first_line(error) or "MemoryError",
        next_step="give the workers more memory (--memory-limit) and resume",
    )


def _stuck(error: BaseException, partition: str, attempt: int) -> PartitionStuck:
    return PartitionStuck(
        "a partition keeps killing its workers",
        where=f"partition {partition}",
        found=f"{_first_line(error)} (attempt {attempt})",
        next_step="mend the step or the model that crashes, or give the workers more memory; then resume",
    )


def _failed(error: BaseException, partition: str, attempt: int) -> PartitionFailed:
    trace = "".join(traceback.format_exception(error)[-3:]).strip()
    return PartitionFailed(
        "a partition failed on every attempt",
        where=f"partition {partition}",
        found=f"{trace}\n  (attempt {attempt})",
        next_step="mend the cause, then resume; what is done stays done",
    )


class Stop:
    """A request to start no more partitions; set by a signal handler, read by the dispatcher."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.now = False
        """True after a second request: do not wait for what runs."""

    def request(self, signal_number: int) -> None:
        """Ask to stop; asked twice, at once."""
        self.now = self.signal_number is not None
        self.signal_number = signal_number

    @property
    def is_requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal_number is not None


@dataclass
class _Attempt:
    partition: Partition
    number: int
    started: float


@dataclass(frozen=True)
class Ended:
    """How an attempt ended, for observers."""

    partition: Partition
    attempt: int
    outcome: str
    """``done``, ``retry`` or ``failed``."""
    receipt: Receipt | None = None
    reason: str = ""


@dataclass
class Dispatcher:
    """Runs partitions on a client and gives their receipts as they come.

    ``submit`` turns partitions into one `dask.delayed` each; ``read`` gets the receipt out of what a task returned.
    """

    client: Any
    submit: Callable[[Sequence[Partition]], list[Any]]
    read: Callable[[Any], Receipt]
    policy: Policy = Policy()
    stop: Stop = field(default_factory=Stop)
    on_ended: Callable[[Ended], None] = lambda ended: None
    clock: Callable[[], float] = time.monotonic
    tick: float = TICK
    """Seconds to wait for an end before looking at the cluster."""

    def __post_init__(self) -> None:
        self._waiting: deque[_Attempt] = deque()
        self._later: list[tuple[float, str, _Attempt]] = []
        self._running: dict[Any, _Attempt] = {}
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._failure: PipelineError | None = None
        self._watch = _Watch(self.client, self.policy, self.clock)
        self.retries = 0
        """Attempts that were repeated."""

    def run(self, todo: Sequence[Partition]) -> Iterator[Receipt]:
        """Receipts of ``todo``, in the order they end. Partitions start in the given order.

        :raises PipelineError: the first failure, after what was running has ended or ``grace`` is over.
        """
        self._waiting.extend(_Attempt(partition, 1, 0.0) for partition in todo)
        try:
            while self._waiting or self._later or self._running:
                if self._is_closing():
                    yield from self._drain()
                    break
                self._fill()
                yield from self._collect(self.tick)
                self._watch.check(bool(self._running or self._waiting))
        finally:
            self._release()
        if self._failure is not None:
            raise self._failure

    def _is_closing(self) -> bool:
        return self._failure is not None or self.stop.is_requested

    def _fill(self) -> None:
        now = self.clock()
        while self._later and self._later[0][0] <= now:
            self._waiting.append(heapq.heappop(self._later)[2])
        threads = max(1, self._watch.threads)
        if len(self._running) > threads + threads // 2:
            return
        room = 2 * threads - len(self._running)
        batch = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if not batch:
            return
        futures = self.client.compute(self.submit([attempt.partition for attempt in batch]), retries=0)
        for attempt, future in zip(batch, futures, strict=True):
            attempt.started = now
            self._running[future] = attempt
            future.add_done_callback(self._ended.put)

    def _collect(self, timeout: float) -> Iterator[Receipt]:
        """Everything that has ended; waits up to ``timeout`` seconds for the first."""
        while True:
            try:
                future = self._ended.get(timeout=timeout)
            except queue.Empty:
                return
            timeout = 0.0
            attempt = self._running.pop(future, None)
            if attempt is None:
                continue
            receipt = self._settle(future, attempt)
            if receipt is not None:
                yield receipt

    def _settle(self, future: Any, attempt: _Attempt) -> Receipt | None:
        try:
            receipt = self.read(future.result(timeout=PROBE_TIMEOUT))
        except Exception as error:
            self._watch.check_alive()
            self._react(error, attempt)
            return None
        finally:
            future.release()
        self.on_ended(Ended(attempt.partition, attempt.number, "done", receipt))
        return receipt

    def _react(self, error: Exception, attempt: _Attempt) -> None:
        decision = decide(error, partition=attempt.partition.id, attempt=attempt.number, attempts=self.policy.attempts)
        if isinstance(decision, Retry):
            self.retries += 1
            again = _Attempt(attempt.partition, attempt.number + 1, 0.0)
            heapq.heappush(self._later, (self.clock() + decision.delay, attempt.partition.id, again))
            self.on_ended(Ended(attempt.partition, attempt.number, "retry", reason=decision.reason))
            return
        self._failure = self._failure or decision.error
        self.on_ended(Ended(attempt.partition, attempt.number, "failed", reason=decision.error.message))

    def _drain(self) -> Iterator[Receipt]:
        """Let what runs end; what the scheduler has only queued is taken back."""
        running = self._executing()
        for future in [future for future in self._running if str(future.key) not in running]:
            del self._running[future]
            future.cancel(force=True)
        deadline = self.clock() + self.policy.grace
        while self._running and not self.stop.now and self.clock() < deadline:
            yield from self._collect(self.tick)
            self._watch.check(True)

    def _executing(self) -> set[str]:
        calls = self.client.sync(self.client.scheduler.processing, callback_timeout=PROBE_TIMEOUT)
        return {str(key) for keys in calls.values() for key in keys}

    def _release(self) -> None:
        for future in self._running:
            future.release()
        self._running.clear()


class _Watch:
    """Looks after the scheduler and the workers; raises when patience is over."""

    def __init__(self, client: Any, policy: Policy, clock: Callable[[], float]) -> None:
        self._client = client
        self._policy = policy
        self._clock = clock
        self._answered = self._manned = clock()
        self._asked = float("-inf")
        self.threads = 1
        """Threads of all workers, as last heard."""
        self._probe()

    def check(self, is_busy: bool) -> None:
        """Ask the scheduler now and then.

        :raises SchedulerLost: when the connection is gone.
        :raises SchedulerUnresponsive: when it has not answered for longer than the limit.
        :raises NoWorkers: when there has been none for longer than the limit.
        """
        self.check_alive()
        if self._clock() - self._asked >= PROBE_EVERY:
            self._probe()
        if is_busy:
            self._check_patience()

    def check_alive(self) -> None:
        """:raises SchedulerLost: when the connection is gone."""
        if self._client.status != "running":
            raise SchedulerLost(
                "the scheduler is gone",
                found=f"client status {self._client.status!r}",
                next_step="resume the job; what is done stays done",
            )

    def _probe(self) -> None:
        self._asked = self._clock()
        try:
            threads = self._client.sync(self._client.scheduler.ncores, callback_timeout=PROBE_TIMEOUT)
        except (TimeoutError, OSError):
            return
        self._answered = self._clock()
        self.threads = sum(threads.values())
        if threads:
            self._manned = self._answered

    def _check_patience(self) -> None:
        now = self._clock()
        if now - self._answered > self._policy.scheduler_timeout:
            raise SchedulerUnresponsive(
                "the scheduler does not answer",
                found=f"no answer for {now - self._answered:.0f} s",
                expected=f"one within {self._policy.scheduler_timeout:.0f} s",
                next_step="look at its machine, then resume the job",
            )
        if self._answered - self._manned > self._policy.no_workers_timeout:
            raise NoWorkers(
                "no worker is left",
                found=f"none for {self._answered - self._manned:.0f} s",
                expected=f"one within {self._policy.no_workers_timeout:.0f} s",
                next_step="start workers, then resume the job",
            )
