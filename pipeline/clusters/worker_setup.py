"""Loaded by every worker process before its first task (``distributed.worker.preload``)."""

from __future__ import annotations

import signal
import threading

import pipeline.graph  # noqa: F401  (imported while the worker starts, so that the first task does not wait for it)
from pipeline.redaction import mask_logs, mask_streams

mask_logs()
mask_streams()

# Ctrl-C reaches the whole process group of the terminal. The driver answers it by draining; workers must go on.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
