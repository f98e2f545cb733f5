"""What executes where, and which task is to blame when a worker leaves.

Dask blames every task assigned to a worker that died, also tasks that only waited there. Here a partition is blamed
only when its code had started: the task tells the scheduler before it does anything else, and waits for the answer. So
a partition that kills its worker at once is known to have started.

Task starts and lost workers reach the driver as events of the scheduler, in the order in which the scheduler logged
them. `ExecutionTracker` is pure: events in, lost executions out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from distributed import get_worker
from distributed.utils import sync


class LossCause(StrEnum):
    """Why a worker is gone."""

    MEMORY = "memory"
    """Its nanny killed it for its memory."""
    CRASH = "crash"
    LEFT = "left"
    """It announced that it would leave: its lifetime was over, or it was retired."""
    RESTARTED = "restarted"
    """The driver had it restarted."""


@dataclass(frozen=True)
class Started:
    """A task started to execute."""

    key: str
    worker: str
    """Address."""
    threads: int = 0
    """Tasks the worker runs at a time; 0: unknown."""


@dataclass(frozen=True)
class MemoryRanOut:
    """A nanny is about to kill its worker for its memory."""

    worker: str


@dataclass(frozen=True)
class WorkerLeft:
    """The scheduler has removed a worker."""

    worker: str
    is_expected: bool
    """Whether the worker had announced that it would leave."""


ClusterEvent = Started | MemoryRanOut | WorkerLeft


@dataclass(frozen=True)
class LostExecution:
    """A task was executing when its worker left."""

    key: str
    worker: str
    cause: LossCause


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

    @property
    def executing(self) -> Mapping[str, Execution]:
        """Executions by key of the task."""
        return self._executing

    def record(self, event: ClusterEvent, *, now: float) -> tuple[LostExecution, ...]:
        """Record an event; return the executions it ended."""
        if isinstance(event, Started):
            if event.threads == 1:
                # The task before has ended, even if its result has not arrived: it is not to blame for what follows.
                for key in self._keys_on(event.worker):
                    del self._executing[key]
            self._executing[event.key] = Execution(event.worker, now)
            return ()
        if isinstance(event, MemoryRanOut):
            self._out_of_memory.add(event.worker)
            return ()
        cause = self._cause(event)
        self._out_of_memory.discard(event.worker)
        self._restarting.discard(event.worker)
        keys = self._keys_on(event.worker)
        for key in keys:
            del self._executing[key]
        return tuple(LostExecution(key, event.worker, cause) for key in keys)

    def _keys_on(self, worker: str) -> list[str]:
        return [key for key, execution in self._executing.items() if execution.worker == worker]

    def remove(self, key: str) -> None:
        """Remove a task that ended or was cancelled."""
        self._executing.pop(key, None)

    def expect_restart(self, worker: str) -> None:
        """Note that the driver is about to restart a worker, so that no task is blamed for it."""
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
        return LossCause.LEFT if event.is_expected else LossCause.CRASH


class SharedClusterState:
    """The trackers of all dispatchers on one cluster, each written by one thread and read by all."""

    def __init__(self) -> None:
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
        # A dict's values are copied in one step, whatever its owner does meanwhile.
        return {execution.worker for tracker in self._all() for execution in list(tracker.executing.values())}

    def expect_restart(self, worker: str) -> None:
        """Note that one of the dispatchers is about to restart a worker, so that none blames a task for it."""
        for tracker in self._all():
            tracker.expect_restart(worker)

    def _all(self) -> list[ExecutionTracker]:
        with self._lock:
            return list(self._trackers)


STARTED_TOPIC = "pipeline-started"
MEMORY_TOPIC = "worker-restart-memory"
"""Topic to which nannies log before they kill their worker."""
ALL_TOPIC = "all"
"""Topic to which the scheduler logs the workers it removes."""
ANNOUNCE_TIMEOUT = 5.0
"""Seconds a task waits for the scheduler's answer; then it runs on, and is not blamed for a crash."""


def announce_start() -> None:
    """Announce the start of this task: one round trip to the scheduler. Does nothing outside a worker."""
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


def memory_limit() -> int:
    """Return the bytes this worker may use; 0 without a limit, or outside a worker."""
    try:
        return int(get_worker().memory_manager.memory_limit or 0)
    except (ValueError, AttributeError):
        return 0


class ClusterEventListener:
    """Passes cluster events on, from the thread of the client's event loop, until it is closed."""

    def __init__(self, client: Any, put: Callable[[ClusterEvent], None]) -> None:
        self._client = client
        self._put = put
        for topic, handler in self._handlers().items():
            client.subscribe_topic(topic, handler)

    def close(self) -> None:
        """Unsubscribe."""
        for topic in self._handlers():
            with suppress(Exception):
                self._client.unsubscribe_topic(topic)

    def _handlers(self) -> dict[str, Callable[[tuple[float, Any]], None]]:
        return {STARTED_TOPIC: self._on_started, MEMORY_TOPIC: self._on_memory, ALL_TOPIC: self._on_all}

    def _on_started(self, event: tuple[float, Any]) -> None:
        message = event[1]
        self._put(Started(str(message["key"]), str(message["worker"]), int(message.get("threads", 0))))

    def _on_memory(self, event: tuple[float, Any]) -> None:
        self._put(MemoryRanOut(str(event[1]["worker"])))

    def _on_all(self, event: tuple[float, Any]) -> None:
        message = event[1]
        if isinstance(message, dict) and message.get("action") == "remove-worker":
            self._put(WorkerLeft(str(message["worker"]), bool(message.get("expected"))))
