"""Facts from the cluster: a task that begins says so, and the driver hears that and which workers leave.

Both go through the scheduler's events, which a client gets in the order in which the scheduler logged them. The task
waits for the scheduler's answer before it goes on: a partition that kills its worker at once is known to have begun.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from distributed import get_worker
from distributed.utils import sync

from pipeline.execution.worker_events import Fact, MemoryRanOut, Started, WorkerLeft

STARTED_TOPIC = "pipeline-started"
MEMORY_TOPIC = "worker-restart-memory"
"""Nannies log here before they end their worker."""
ALL_TOPIC = "all"
"""The scheduler logs here which worker it removes."""
ANNOUNCE_TIMEOUT = 5.0
"""Seconds a task waits for the scheduler's answer; then it goes on, and cannot be blamed for a death."""


def announce() -> None:
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


class Evidence:
    """Hears the facts and passes them on, from the thread of the client's event loop, until it is closed."""

    def __init__(self, client: Any, put: Callable[[Fact], None]) -> None:
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
