"""Track the worker of each executing task, and find the task to blame when a worker leaves.

Dask blames every task assigned to a worker that died, even tasks that only waited on that worker. Here, a partition is
blamed only if its code had started. Each task first announces its start to the scheduler, and waits for the answer. The
start of a partition that kills its worker at once is therefore known.

Task starts and lost workers reach the driver as events of the scheduler, in the order in which the scheduler logged
them. `ExecutionTracker` is pure: events in, lost executions out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from distributed import get_worker
from distributed.utils import sync

from pipeline.execution import step_messages
from pipeline.execution.step_messages import StepMessage
from pipeline.models.endpoints.calls import current_calls


class LossCause(StrEnum):
    """Causes of the loss of a worker."""

    MEMORY = "memory"
    """The nanny killed the worker for its memory."""
    CRASH = "crash"
    LEFT = "left"
    """The worker announced that it would leave: its lifetime was over, or it was retired."""
    RESTARTED = "restarted"
    """The driver restarted the worker."""
    JOB_ENDED = "job ended"
    """The batch system ended the job of the worker: it was cancelled, preempted, or out of walltime."""


@dataclass(frozen=True)
class Started:
    """Start of a task."""

    key: str
    worker: str
    """Address of the worker."""
    threads: int = 0
    """Number of tasks the worker runs at a time; 0: unknown."""


@dataclass(frozen=True)
class MemoryRanOut:
    """Announcement of a nanny that will kill its worker for its memory."""

    worker: str


@dataclass(frozen=True)
class WorkerLeft:
    """Removal of a worker by the scheduler."""

    worker: str
    is_expected: bool
    """True if the worker had announced that it would leave."""
    processing: tuple[Any, ...] = ()
    """Keys of the tasks that the scheduler had assigned to it."""


@dataclass(frozen=True)
class WorkerLeaving:
    """Announcement of a worker that it takes no more partitions, and stops those that run."""

    worker: str
    lifetime: float
    """Seconds from the start of its job until it has left."""
    is_deadline: bool
    """True if its time is over; False: it was asked to end."""


@dataclass(frozen=True)
class Advanced:
    """Progress inside a task."""

    key: str
    rows_done: int
    """Input rows of its finished batches."""
    cost: float = 0.0
    """Cost of the answers of services in them."""


ClusterEvent = Started | MemoryRanOut | WorkerLeaving | WorkerLeft | StepMessage


@dataclass(frozen=True)
class LostExecution:
    """Execution of a task that its worker left unfinished."""

    key: str
    worker: str
    cause: LossCause
    since: float = 0.0
    """Start of the execution by the driver's clock."""
    lifetime: float | None = None
    """Seconds that the worker had, if its time was over; None: it left for another reason."""


@dataclass(frozen=True)
class Execution:
    """Worker on which a task executes, and its start by the driver's clock."""

    worker: str
    since: float


@dataclass
class ExecutionTracker:
    """Executing tasks, derived from events in the order in which the scheduler logged them."""

    _executing: dict[str, Execution] = field(default_factory=dict)
    _out_of_memory: set[str] = field(default_factory=set)
    _restarting: set[str] = field(default_factory=set)
    _leaving: dict[str, WorkerLeaving] = field(default_factory=dict)

    @property
    def executing(self) -> Mapping[str, Execution]:
        """Executions by key of the task."""
        return self._executing

    def record(self, event: ClusterEvent, *, now: float) -> tuple[LostExecution, ...]:
        """Record an event; return the executions it ended."""
        if isinstance(event, Started):
            if event.threads == 1:
                # The previous task has ended, even if its result has not arrived: do not blame it for a later loss.
                for key in self._keys_on(event.worker):
                    del self._executing[key]
            self._executing[event.key] = Execution(event.worker, now)
            return ()
        if isinstance(event, MemoryRanOut):
            self._out_of_memory.add(event.worker)
            return ()
        if isinstance(event, StepMessage):
            return ()
        if isinstance(event, WorkerLeaving):
            self._leaving[event.worker] = event
            return ()
        cause = self._cause(event)
        self._out_of_memory.discard(event.worker)
        self._restarting.discard(event.worker)
        leaving = self._leaving.get(event.worker)
        lifetime = leaving.lifetime if leaving is not None and leaving.is_deadline else None
        ended = {key: self._executing.pop(key) for key in self._keys_on(event.worker)}
        return tuple(
            LostExecution(key, event.worker, cause, execution.since, lifetime) for key, execution in ended.items()
        )

    def is_leaving(self, worker: str) -> bool:
        """True if a worker has announced that it stops its partitions."""
        return worker in self._leaving

    def leaving_workers(self) -> set[str]:
        """Return the workers that have announced that they stop their partitions."""
        return set(self._leaving)

    def _keys_on(self, worker: str) -> list[str]:
        return [key for key, execution in self._executing.items() if execution.worker == worker]

    def remove(self, key: str) -> None:
        """Remove a task that ended or was cancelled."""
        self._executing.pop(key, None)

    def expect_restart(self, worker: str) -> None:
        """Record that the driver is about to restart a worker, so that no task is blamed for the restart."""
        self._restarting.add(worker)

    def busy_workers(self) -> set[str]:
        """Return the addresses of workers on which tasks execute."""
        return {execution.worker for execution in self._executing.values()}

    def overdue(self, *, now: float, limit: float | None) -> tuple[str, ...]:
        """Return the keys of tasks that have executed for longer than ``limit`` seconds."""
        if limit is None:
            return ()
        return tuple(key for key, execution in self._executing.items() if now - execution.since > limit)

    def _cause(self, event: WorkerLeft) -> LossCause:
        if event.worker in self._restarting:
            return LossCause.RESTARTED
        if event.worker in self._out_of_memory:
            return LossCause.MEMORY
        # A worker that was asked to end may be killed before it has left in good order.
        return LossCause.LEFT if event.is_expected or event.worker in self._leaving else LossCause.CRASH


class WorkerSupply(Protocol):
    """The source of the workers of a cluster, which replaces those that leave. Called from any thread."""

    def set_demand(self, owner: int, partitions: int, /) -> None:
        """Tell how many partitions of a dispatcher are not done.

        :param owner: number that tells dispatchers apart.
        """

    def expects_workers(self) -> bool:
        """Return True while workers are to be expected, although there is none.

        :raises PipelineError: when none is to be expected, with the reason.
        """

    def loss_cause(self, worker: str, /) -> LossCause | None:
        """Return why a worker left without a word; None: not known yet.

        :param worker: its address.
        """


class SharedClusterState:
    """The trackers of all dispatchers on one cluster, each written by one thread and read by all.

    :param supply: the source of the workers; None: workers are not replaced.
    """

    def __init__(self, supply: WorkerSupply | None = None) -> None:
        self.supply = supply
        self._trackers: list[ExecutionTracker] = []
        self._lock = threading.Lock()

    def join(self, tracker: ExecutionTracker) -> None:
        """Add the tracker of a dispatcher that starts."""
        with self._lock:
            self._trackers.append(tracker)

    def leave(self, tracker: ExecutionTracker) -> None:
        """Remove the tracker of a dispatcher that ends."""
        with self._lock:
            self._trackers = [known for known in self._trackers if known is not tracker]

    def busy_workers(self) -> set[str]:
        """Return the addresses of workers on which tasks of any dispatcher execute."""
        # `list` copies a dict's values in one step, so its owner may change it at the same time.
        return {execution.worker for tracker in self._all() for execution in list(tracker.executing.values())}

    def expect_restart(self, worker: str) -> None:
        """Record that a dispatcher is about to restart a worker, so that no dispatcher blames a task for this."""
        for tracker in self._all():
            tracker.expect_restart(worker)

    def _all(self) -> list[ExecutionTracker]:
        with self._lock:
            return list(self._trackers)


STARTED_TOPIC = "pipeline-started"
PROGRESS_TOPIC = "pipeline-progress"
PROGRESS_SECONDS = 1.0
"""Shortest time between two reports of a task's progress; a task that takes less time sends none."""
PAID_SECONDS = 0.1
"""The same for a task whose rows cost money."""
MEMORY_TOPIC = "worker-restart-memory"
"""Topic for the announcements of nannies before they kill their worker."""
LEAVING_TOPIC = "pipeline-leaving"
"""Topic for the announcements of workers that leave."""
ALL_TOPIC = "all"
"""Topic for the scheduler's events about removed workers."""
ANNOUNCE_TIMEOUT = 5.0
"""Seconds a task waits for the scheduler's answer; then the task continues, and is not blamed for a crash."""


def announce_start() -> None:
    """Announce the start of this task: one round trip to the scheduler. Do nothing outside a worker."""
    try:
        worker = get_worker()
        key = str(worker.get_current_task())
    except (ValueError, AttributeError):
        return
    message = {"key": key, "worker": worker.address, "threads": worker.state.nthreads}
    with suppress(OSError, TimeoutError):
        sync(
            worker.loop,
            worker.scheduler.log_event,
            callback_timeout=ANNOUNCE_TIMEOUT,
            topic=STARTED_TOPIC,
            msg=message,
        )


def progress_reporter(clock: Callable[[], float] = time.monotonic) -> Callable[[int], None] | None:
    """Return a function that tells the driver how many rows of this task are done; None outside a worker.

    Reports are sent without waiting, and a lost one is harmless: the next one has all rows.
    """
    try:
        worker = get_worker()
        key = str(worker.get_current_task())
    except (ValueError, AttributeError):
        return None
    last = clock()

    def report(rows_done: int) -> None:
        nonlocal last
        now, cost = clock(), current_calls().cost
        if now - last >= (PAID_SECONDS if cost else PROGRESS_SECONDS):
            last = now
            with suppress(Exception):
                paid = {"cost": cost} if cost else {}
                worker.log_event(PROGRESS_TOPIC, {"key": key, "rows_done": rows_done, **paid})

    return report


def memory_limit() -> int:
    """Return the bytes this worker may use; 0 without a limit, or outside a worker."""
    try:
        return int(get_worker().memory_manager.memory_limit or 0)
    except (ValueError, AttributeError):
        return 0


class ClusterEventListener:
    """Passes cluster events on, from the thread of the client's event loop, until it is closed."""

    def __init__(self, client: Any, put: Callable[[ClusterEvent | Advanced], None]) -> None:
        self._client = client
        self._put = put
        for topic, handler in self._handlers().items():
            client.subscribe_topic(topic, handler)

    def close(self) -> None:
        """Unsubscribe from the events."""
        for topic in self._handlers():
            with suppress(Exception):
                self._client.unsubscribe_topic(topic)

    def _handlers(self) -> dict[str, Callable[[tuple[float, Any]], None]]:
        return {
            STARTED_TOPIC: self._on_started,
            PROGRESS_TOPIC: self._on_progress,
            MEMORY_TOPIC: self._on_memory,
            LEAVING_TOPIC: self._on_leaving,
            ALL_TOPIC: self._on_all,
            step_messages.TOPIC: self._on_message,
        }

    def _on_started(self, event: tuple[float, Any]) -> None:
        message = event[1]
        self._put(Started(str(message["key"]), str(message["worker"]), int(message.get("threads", 0))))

    def _on_progress(self, event: tuple[float, Any]) -> None:
        self._put(Advanced(str(event[1]["key"]), int(event[1]["rows_done"]), float(event[1].get("cost", 0.0))))

    def _on_memory(self, event: tuple[float, Any]) -> None:
        self._put(MemoryRanOut(str(event[1]["worker"])))

    def _on_message(self, event: tuple[float, Any]) -> None:
        self._put(step_messages.read_message(event[1]))

    def _on_leaving(self, event: tuple[float, Any]) -> None:
        message = event[1]
        is_deadline = message["reason"] == "deadline"
        self._put(WorkerLeaving(str(message["worker"]), float(message["lifetime"]), is_deadline))

    def _on_all(self, event: tuple[float, Any]) -> None:
        message = event[1]
        if isinstance(message, dict) and message.get("action") == "remove-worker":
            processing = tuple(message.get("processing-tasks") or ())
            self._put(WorkerLeft(str(message["worker"]), bool(message.get("expected")), processing))
