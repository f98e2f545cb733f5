"""Prints and warnings of the users' steps: the first of each place goes to the driver, instead of all to the worker's
stderr. All of them are in the log of their partition.

A worker forwards the first line of a place as an event of the scheduler; the driver tells the first of all workers.
Warnings outside of a partition's task, such as those of other users of the worker, are left to their own way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from distributed import get_worker

from pipeline.common import warn_once
from pipeline.common.step_output import MAX_TEXT, OutputLine
from pipeline.common.text import shortened

TOPIC = "pipeline-step-message"
TASK_PREFIX = "score "
"""Beginning of the keys of tasks that run steps."""
MAX_FORWARDED = 200
"""Places of a job that a worker forwards."""
KEPT_JOBS = 50
"""Jobs of which a worker knows what it has forwarded."""


@dataclass(frozen=True)
class StepMessage:
    """The first line of a place in the code, on one worker."""

    key: str
    """Key of the task."""
    line: OutputLine
    worker: str


class _ShowOthers(warn_once.WarnOnce):
    def is_due(self, kind: str, text: str) -> bool:
        """Return True: warnings of others are shown as they would be without this package."""
        return True


def install() -> None:
    """Take the warnings of steps from now on, in this worker process; once."""
    warn_once.install(_ShowOthers)


_forwarded: dict[str, set[tuple[str, str, str]]] = {}
_lock = threading.Lock()


def message_forwarder(job: str) -> Callable[[OutputLine], None] | None:
    """Return a function that tells the driver of the first line of each place; None outside a worker."""
    try:
        worker = get_worker()
        key = str(worker.get_current_task())
    except (ValueError, AttributeError):
        return None

    def forward(line: OutputLine) -> None:
        if _is_first(job, (line.step, line.kind, line.place)):
            message = {**asdict(line), "text": shortened(line.text, width=MAX_TEXT)}
            with suppress(Exception):
                worker.log_event(TOPIC, {"key": key, "worker": worker.address, **message})

    return forward


def read_message(message: Any) -> StepMessage:
    """Return the line in the message of an event."""
    line = OutputLine(*(str(message.get(name, "")) for name in ("step", "kind", "place", "text", "time")))
    return StepMessage(str(message.get("key", "")), line, str(message.get("worker", "")))


def _is_first(job: str, place: tuple[str, str, str]) -> bool:
    with _lock:
        places = _forwarded.setdefault(job, set())
        while len(_forwarded) > KEPT_JOBS:
            del _forwarded[next(iter(_forwarded))]
        if place in places or len(places) >= MAX_FORWARDED:
            return False
        places.add(place)
        return True
