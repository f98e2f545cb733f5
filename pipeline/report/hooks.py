"""Hooks: notify other systems when a job starts and ends, from threads that the job does not wait for.

A hook that fails causes an event and a warning in the log, never a failed job. At the end of the job, hooks have
``hook_timeout`` seconds. Notifications that are still undelivered are then dropped.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.common.secrets import redact_values
from pipeline.common.units import iso_time, utc_now
from pipeline.errors import Fenced
from pipeline.events import Callback, JobEnded, StatusChanged
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.report.hook_delivery import Delivery, DeliveryAttempt, Message, deliver
from pipeline.report.openlineage import Lineage
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parts import Hook

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
PREFIX = "PIPELINE_HOOK_"
EVENTS = {
    Status.SUCCEEDED: "success",
    Status.SUCCEEDED_WITH_WARNINGS: "warnings",
    Status.FAILED: "failure",
    Status.CANCELLED: "cancelled",
    Status.INTERRUPTED: "interrupted",
    Status.INCOMPLETE: "failure",
}
"""The event for each final status. A child that waits for its parent has not ended."""


class _Worker:
    """One hook with its own thread, so that a hook that hangs cannot delay other hooks."""

    def __init__(self, hook: Hook, send: Callable[[Hook, Message], DeliveryAttempt] | None) -> None:
        self.hook = hook
        self._send = send
        self.deliveries: list[Delivery] = []
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._queued: list[Message] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="pipeline-hook", daemon=True)
        self._thread.start()

    def tell(self, message: Message) -> None:
        """Queue the message for delivery. Returns at once."""
        self._queued.append(message)
        self._messages.put(message)

    def close(self, until: float) -> tuple[Delivery, ...]:
        """Return the outcome of every message, including those that are dropped now."""
        self._messages.put(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        self._is_over.set()
        # Let an attempt finish that is about to end; abandon one that hangs.
        self._thread.join(0.2)
        done = tuple(self.deliveries)
        late = "given up at the end of the run: it took too long"
        return (
            *done,
            *(Delivery(self.hook.name, message.event, False, 0, late) for message in self._queued[len(done) :]),
        )

    def _work(self) -> None:
        while (message := self._messages.get()) is not None:
            delivery = deliver(self.hook, message, is_over=self._is_over, send=self._send)
            self.deliveries.append(delivery)
            if not delivery.ok:
                logger.warning("the hook %s did not receive %s: %s", delivery.hook, delivery.event, delivery.reason)


class Hooks(Callback):
    """Notify hooks about one job."""

    def __init__(self, job: JobDirectory, hooks: Sequence[Hook]) -> None:
        self._job = job
        self._lineage = Lineage(job) if any(hook.openlineage is not None for hook in hooks) else None
        self._workers = [_Worker(hook, self._sender(hook)) for hook in hooks]
        self._is_started = False

    def _sender(self, hook: Hook) -> Callable[[Hook, Message], DeliveryAttempt] | None:
        return self._lineage.send if self._lineage is not None and hook.openlineage is not None else None

    def on_status(self, event: StatusChanged) -> None:
        """Notify hooks of the start, at the first status of a run."""
        if self._is_started or Status(event.after).is_final:
            return
        self._is_started = True
        record = self._job.record
        facts = {"status": event.after, "reason": event.reason, "rows": {"in": record.rows}, "model": record.model}
        self._tell("start", {**facts, "output": self._job.resolve(record.sink)})

    def on_end(self, event: JobEnded) -> None:
        """Notify hooks of the end."""
        name = EVENTS.get(Status(event.status))
        if name is not None:
            fields = (
                "status",
                "reason",
                "rows",
                "model",
                "output",
                "partitions",
                "seconds",
                "warnings",
                "error",
                "next",
            )
            self._tell(name, {key: event.report.get(key) for key in fields})

    def close(self, seconds: float) -> None:
        """Wait up to ``seconds`` for pending notifications, then record the outcome of each as an event."""
        until = time.monotonic() + seconds
        for worker in self._workers:
            for delivery in worker.close(until):
                if not delivery.ok:
                    logger.warning("the hook %s failed: %s", delivery.hook, delivery.reason)
                # The lease is released by now: another driver may have acquired it.
                with suppress(Fenced):
                    self._job.events.append(
                        "hook",
                        hook=delivery.hook,
                        on=delivery.event,
                        outcome="notified" if delivery.ok else "failed",
                        attempts=delivery.attempts,
                        reason=delivery.reason,
                    )
        if self._lineage is not None:
            self._lineage.close(max(0.0, until - time.monotonic()))

    def _tell(self, name: str, facts: dict[str, Any]) -> None:
        # A lineage service cannot use the end of a run without its start: send it every event.
        wanted = [worker for worker in self._workers if name in worker.hook.when or worker.hook.openlineage is not None]
        if wanted:
            message = make_message(self._job, name, facts)
            for worker in wanted:
                worker.tell(message)


def make_message(job: JobDirectory, event: str, facts: dict[str, Any]) -> Message:
    """Build the notification of ``event``.

    Its key depends only on the job, the event and the number of status and driver events so far.
    """
    number = sum(past["event"] in ("status", "driver") for past in job.events.read())
    key = f"{job.id}/{event}/{number}"
    body = {
        "schema_version": SCHEMA_VERSION,
        "id": key,
        "event": event,
        "time": iso_time(utc_now()),
        "job": job.id,
        "name": job.record.name,
        "directory": job.root,
        **facts,
    }
    clean: dict[str, Any] = redact_values(body)
    rows = clean.get("rows") or {}
    variables = {f"{PREFIX}{name.upper()}": str(clean.get(name) or "") for name in _AS_VARIABLES}
    variables |= {f"{PREFIX}ROWS_{name.upper()}": str(count) for name, count in rows.items()}
    return Message(key, event, json.dumps(clean, default=str).encode(), variables)


_AS_VARIABLES = ("id", "event", "time", "job", "name", "status", "reason", "output", "directory")


def hooks_of(spec: JobSpec, settings: Settings) -> tuple[Hook, ...]:
    """Return all hooks of a job: those of its spec, and those that the settings name for every job."""
    return (*spec.hooks, *(Hook.model_validate(hook) for hook in settings.hooks))


@contextmanager
def run_hooks(job: JobDirectory, hooks: Sequence[Hook], *, grace: float) -> Iterator[tuple[Callback, ...]]:
    """Yield callbacks for a run of ``job`` inside the block. On exit, hooks have ``grace`` seconds to finish."""
    if not hooks:
        yield ()
        return
    notifier = Hooks(job, hooks)
    try:
        yield (notifier,)
    finally:
        try:
            notifier.close(grace)
        except Exception:
            # An error of a hook must not change the outcome of the job.
            logger.exception("what became of the hooks of %s could not be recorded", job.id)
