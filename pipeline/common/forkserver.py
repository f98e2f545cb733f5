"""One process that imports what workers import. They are forked from it in milliseconds, and so is what replaces one.

It is Python's own fork server, which Dask's nannies use where ``distributed.worker.multiprocessing-method`` says so.
It runs no task and no step and loads no model, so that it has no threads that a fork could lose. It goes with this
process.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from typing import Any

from dask.system import CPU_COUNT

logger = logging.getLogger(__name__)

PRELOADED = ["pipeline.common.forkserver_preload"]
ALWAYS = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONHASHSEED": "6640"}
"""Variables that libraries and the C library read when they are loaded. The hash seed is the one Dask's nannies set."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "ARROW_IO_THREADS")

_IS_SAFE = sys.platform.startswith("linux") and sys.version_info >= (3, 11, 1)
"""Before 3.11.1 any user of the machine could have it run code: its socket had no permissions (CVE-2022-42919)."""

_lock = threading.Lock()
_started: dict[str, str] = {}
"""The environment of the server that was started here."""
_users: list[object] = []
"""One for each cluster whose workers are forked from it."""


SMALLEST_WORKER = 1 << 30
"""Bytes below which a worker is not worth its own imports; fewer workers are started instead."""


def default_shape(cores: int, memory: int) -> tuple[int, int]:
    """Workers and threads per worker for a machine with that many bytes of memory.

    One thread a process up to 8 cores, because steps in pandas hold the interpreter lock; then two, above 32 four,
    because every process pays for its imports and its copy of the model.
    """
    threads = 1 if cores <= 8 else 2 if cores <= 32 else 4
    workers = max(1, min(cores // threads, memory // SMALLEST_WORKER))
    return workers, threads


def chosen_shape(cores: int, memory: int, *, workers: int | None, threads: int | None) -> tuple[int, int]:
    """Workers and threads per worker where one of them, both or none is said; the rest as `default_shape` has it."""
    usual_workers, usual_threads = default_shape(cores, memory)
    each = threads or usual_threads
    return workers or (usual_workers if each == usual_threads else max(1, cores // each)), each


def thread_environment(cores: int, slots: int) -> dict[str, str]:
    """Variables set before a worker is started, so that ``slots`` tasks at a time do not take each other's cores."""
    return {**dict.fromkeys(_THREADS, str(max(1, cores // slots))), **ALWAYS}


def likely_environment(workers: int | None, threads: int | None) -> dict[str, str]:
    """The variables that workers of a local cluster on this machine will have, as far as its memory does not matter.

    :param workers: worker processes, when that is said.
    :param threads: threads of each, when that is said.
    """
    count, each = chosen_shape(CPU_COUNT, sys.maxsize, workers=workers, threads=threads)
    return thread_environment(CPU_COUNT, count * each)


def start(environment: Mapping[str, str]) -> bool:
    """Start the server, unless it runs. It imports while this process goes on.

    :param environment: variables for it, from `thread_environment`.
    :returns: whether workers that are to have ``environment`` can be forked: not when there is no safe one on this
        platform, or somebody else's, or ours with another environment and in use.
    """
    with _lock:
        return _begin(environment)


@contextmanager
def in_use(environment: Mapping[str, str]) -> Iterator[bool]:
    """Inside the block the server stays what it is; gives what `start` gives."""
    user = object()
    with _lock:
        is_ours = _begin(environment)
        _users.extend([user] if is_ours else [])
    try:
        yield is_ours
    finally:
        with _lock:
            _users[:] = [one for one in _users if one is not user]


def _begin(environment: Mapping[str, str]) -> bool:
    if _started == dict(environment):
        return True
    if not _IS_SAFE or (_started and _users) or (not _started and _server_pid() is not None):
        return False
    try:
        _end(os.getpid())
        forkserver.set_forkserver_preload(PRELOADED)
        with _variables(environment):
            forkserver.ensure_running()
    except (OSError, ValueError):
        logger.warning("no process to fork workers from could be started; each starts alone", exc_info=True)
        return False
    if not _started:
        atexit.register(_end, os.getpid())
    _started.clear()
    _started.update(environment)
    return True


def is_running() -> bool:
    """Whether `start` has started the server in this process."""
    return bool(_started)


def _server_pid() -> int | None:
    # No public way to ask. Where the name has gone a server may run that is not known of: it is left alone.
    server: Any = getattr(forkserver, "_forkserver", None)
    pid: int | None = getattr(server, "_forkserver_pid", -1)
    return pid


def _end(owner: int) -> None:
    """End our server at once, should it run; with this process it would end by itself, but finish its imports first."""
    pid = _server_pid()
    if _started and os.getpid() == owner and pid is not None and pid > 0:
        with suppress(ProcessLookupError, PermissionError, ChildProcessError):
            os.kill(pid, signal.SIGTERM)
            # Left for Python's own record of it to collect.
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
