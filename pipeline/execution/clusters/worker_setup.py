"""Set up a worker process before its first task (``distributed.worker.preload``)."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import suppress
from typing import Any

import pipeline.execution.tasks  # noqa: F401  (while the worker starts: the first task does not wait)
from pipeline.common.imports import allow_partial_imports
from pipeline.common.secrets import mask_logs, mask_streams
from pipeline.execution import step_messages
from pipeline.execution.clusters.worker_drain import leave_in_time

# The driver prints its result to standard output. Output of steps is sent to standard error.
with suppress(OSError):
    os.dup2(2, 1)
mask_logs()
mask_streams()


_DEMOTED = ("Compute Failed", "Failed to communicate with scheduler during heartbeat")
"""Beginnings of Dask's records, with tracebacks, about what the driver reports itself: a task that failed, and a
scheduler that is gone. A job that ends while a worker sends a heartbeat also causes the second one."""


def _is_shown(record: logging.LogRecord) -> bool:
    """Demote records that `_DEMOTED` names to DEBUG."""
    if record.levelno == logging.ERROR and str(record.msg).startswith(_DEMOTED):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
    return True


logging.getLogger("distributed.worker").addFilter(_is_shown)


def dask_setup(worker: Any) -> None:
    """Set up a process that is a worker, not one that only imports this module. Dask calls this."""
    allow_partial_imports()
    step_messages.install()
    leave_in_time(worker)


# Ctrl-C reaches the whole process group of the terminal. The driver drains; workers must keep running.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
