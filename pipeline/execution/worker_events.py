"""Who was executing when a worker left. Pure: facts in, deaths out.

Dask blames every task that was assigned to a worker that died, also those that only waited there. Here a partition is
blamed only when its code had begun: the task tells the scheduler before it does anything else
(`pipeline.execution.worker_events`).

Dispatchers that share a cluster: what each must know of what the others have executing there.

Facts from the cluster: a task that begins says so, and the driver hears that and which workers leave.

Both go through the scheduler's events, which a client gets in the order in which the scheduler logged them. The task
waits for the scheduler's answer before it goes on: a partition that kills its worker at once is known to have begun.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from distributed import get_worker
from distributed.utils import sync

Cause = Literal["memory", "crash", "left", "recycled"]
"""Why a worker is gone: its nanny ended it for its memory; unasked; in good order; the driver had it restarted."""


@dataclass(frozen=True)
class Started:
    """A task begins to execute."""

    key: str
    worker: str
    """Address."""
    threads: int = 0
    """Tasks the worker does at a time; 0: unknown."""


@dataclass(frozen=True)
class MemoryRanOut:
    """A nanny is about to end its worker for its memory."""

    worker: str


@dataclass(frozen=True)
class WorkerLeft:
    """The scheduler has removed a worker."""

    worker: str
    is_expected: bool
    """It said before that it would go: its lifetime was over, or it was retired."""


ClusterEvent = Started | MemoryRanOut | WorkerLeft


@dataclass(frozen=True)
class LostExecution:
    """A task was executing when its worker left."""

    key: str
    worker: str
    cause: Cause


@dataclass(frozen=True)
class Execution:
    """Where a task executes, and since when by the driver's clock."""

    worker: str
    since: float


@dataclass
class ExecutionTracker:
    """What executes where, told by facts in the order in which the scheduler had them."""

    _executing: dict[str, Execution] = field(default_factory=dict)
    _out_of_memory: set[str] = field(default_factory=set)
    _recycled: set[str] = field(default_factory=set)

    @property
    def executing(self) -> Mapping[str, Execution]:
        """By key."""
        return self._executing

    def learn(self, fact: ClusterEvent, *, now: float) -> tuple[LostExecution, ...]:
        """Take a fact in; the tasks whose execution it ended."""
        if isinstance(fact, Started):
            if fact.threads == 1:
                # What ran there has ended, even if its result has not come yet: it is not to blame for what follows.
                for key in self._on(fact.worker):
                    del self._executing[key]
            self._executing[fact.key] = Execution(fact.worker, now)
            return ()
        if isinstance(fact, MemoryRanOut):
            self._out_of_memory.add(fact.worker)
            return ()
        cause = self._cause(fact)
        self._out_of_memory.discard(fact.worker)
        self._recycled.discard(fact.worker)
        keys = self._on(fact.worker)
        for key in keys:
            del self._executing[key]
        return tuple(LostExecution(key, fact.worker, cause) for key in keys)

    def _on(self, worker: str) -> list[str]:
        return [key for key, execution in self._executing.items() if execution.worker == worker]

    def ended(self, key: str) -> None:
        """The task is over, or was taken back."""
        self._executing.pop(key, None)

    def will_recycle(self, worker: str) -> None:
        """The driver is about to have that worker restarted; nobody is to blame for that."""
        self._recycled.add(worker)

    def busy_workers(self) -> set[str]:
        """Addresses where something executes."""
        return {execution.worker for execution in self._executing.values()}

    def overdue(self, *, now: float, limit: float | None) -> tuple[str, ...]:
        """Keys of what has executed for longer than ``limit`` seconds."""
        if limit is None:
            return ()
        return tuple(key for key, execution in self._executing.items() if now - execution.since > limit)

    def _cause(self, fact: WorkerLeft) -> Cause:
        if fact.worker in self._recycled:
            return "recycled"
        if fact.worker in self._out_of_memory:
            return "memory"
        return "left" if fact.is_expected else "crash"


class SharedClusterState:
    """The ledgers of all dispatchers on one cluster, each written by one thread and read by all."""

    def __init__(self) -> None:
        self._ledgers: list[ExecutionTracker] = []
        self._lock = threading.Lock()

    def join(self, ledger: ExecutionTracker) -> None:
        """``ledger`` is one of them from now on."""
        with self._lock:
            self._ledgers.append(ledger)

    def leave(self, ledger: ExecutionTracker) -> None:
        """It is not any more."""
        with self._lock:
            self._ledgers = [one for one in self._ledgers if one is not ledger]

    def busy_workers(self) -> set[str]:
        """Addresses where something executes, of whichever of them."""
        # A copy of a dict's values is made in one step, whatever its owner does meanwhile.
        return {execution.worker for ledger in self._all() for execution in list(ledger.executing.values())}

    def will_recycle(self, worker: str) -> None:
        """One of them is about to have that worker restarted; nobody of the others is to blame for that."""
        for ledger in self._all():
            ledger.will_recycle(worker)

    def _all(self) -> list[ExecutionTracker]:
        with self._lock:
            return list(self._ledgers)


STARTED_TOPIC = "pipeline-started"
MEMORY_TOPIC = "worker-restart-memory"
"""Nannies log here before they end their worker."""
ALL_TOPIC = "all"
"""The scheduler logs here which worker it removes."""
ANNOUNCE_TIMEOUT = 5.0
"""Seconds a task waits for the scheduler's answer; then it goes on, and cannot be blamed for a death."""


def announce_start() -> None:
    """Say that this task begins; does nothing outside of a worker. Takes a round trip to the scheduler."""
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
    """Bytes this worker may use; 0 where there is no limit, or no worker."""
    try:
        return int(get_worker().memory_manager.memory_limit or 0)
    except (ValueError, AttributeError):
        return 0


class ClusterEventListener:
    """Hears the facts and passes them on, from the thread of the client's event loop, until it is closed."""

    def __init__(self, client: Any, put: Callable[[ClusterEvent], None]) -> None:
        self._client = client
        self._put = put
        for topic, hear in self._handlers().items():
            client.subscribe_topic(topic, hear)

    def close(self) -> None:
        """Hear no more."""
        for topic in self._handlers():
            with suppress(Exception):
                self._client.unsubscribe_topic(topic)

    def _handlers(self) -> dict[str, Callable[[tuple[float, Any]], None]]:
        return {STARTED_TOPIC: self._started, MEMORY_TOPIC: self._memory, ALL_TOPIC: self._all}

    def _started(self, event: tuple[float, Any]) -> None:
        message = event[1]
        self._put(Started(str(message["key"]), str(message["worker"]), int(message.get("threads", 0))))

    def _memory(self, event: tuple[float, Any]) -> None:
        self._put(MemoryRanOut(str(event[1]["worker"])))

    def _all(self, event: tuple[float, Any]) -> None:
        message = event[1]
        if isinstance(message, dict) and message.get("action") == "remove-worker":
            self._put(WorkerLeft(str(message["worker"]), bool(message.get("expected"))))
