"""Warnings of the users' steps: each kind goes to the driver once, instead of to the worker's stderr for every batch.

A worker forwards the first warning of a kind as an event of the scheduler; the driver logs the first of all workers.
Warnings outside of a partition's task, such as those of other users of the worker, are left to their own way.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distributed import get_worker

from pipeline.common import warn_once
from pipeline.common.secrets import redact
from pipeline.common.text import shortened

TOPIC = "pipeline-warning"
TASK_PREFIX = "score "
"""Beginning of the keys of tasks that run steps."""


@dataclass(frozen=True)
class StepWarning:
    """First warning of a kind on one worker."""

    key: str
    """Key of the task."""
    kind: str
    """Text that warnings have in common if they count as the same."""
    text: str
    worker: str


class _Forwarder(warn_once.WarnOnce):
    def is_due(self, kind: str, text: str) -> bool:
        """Forward a warning of a step; return True for any other one."""
        worker, key = _current_task()
        if worker is None:
            return True
        if self.is_first(kind):
            text = shortened(redact(text), width=400)
            message = {"key": key, "kind": kind[:200], "text": text, "worker": worker.address}
            with suppress(Exception):
                worker.log_event(TOPIC, message)
        return False


def install() -> None:
    """Forward warnings of steps from now on, in this worker process; once."""
    warn_once.install(_Forwarder)


def read_warning(message: Any) -> StepWarning:
    """Return the warning in the message of an event."""
    return StepWarning(*(str(message.get(name, "")) for name in ("key", "kind", "text", "worker")))


def _current_task() -> tuple[Any, str]:
    """Return the worker and the key of a step's task that this thread runs; None and "" in any other thread."""
    try:
        worker = get_worker()
        key = str(worker.get_current_task())
    except (ValueError, AttributeError, KeyError):
        return None, ""
    return (worker, key) if key.startswith(TASK_PREFIX) else (None, "")
