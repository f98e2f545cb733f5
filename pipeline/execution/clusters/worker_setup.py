"""Loaded by every worker process before its first task (``distributed.worker.preload``)."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress

import pipeline.execution.tasks  # noqa: F401  (imported while the worker starts, so that the first task does not wait for it)
from pipeline.common.secrets import mask_logs, mask_streams

# A worker has the driver's standard output, which is for the driver's result: what steps print goes to standard error.
with suppress(OSError):
    os.dup2(2, 1)
mask_logs()
mask_streams()

# Ctrl-C reaches the whole process group of the terminal. The driver answers it by draining; workers must go on.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
