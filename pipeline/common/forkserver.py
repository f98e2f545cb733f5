"""Start a process with the imports of a worker, from which workers and their replacements are forked in milliseconds.

The process is Python's own fork server. Dask's nannies fork from it if ``distributed.worker.multiprocessing-method``
is ``forkserver``. The server runs no task and no step and loads no model, so that it has no threads that a fork could
lose. The server ends with this process.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from typing import Any

from pipeline.common.cores import core_count

logger = logging.getLogger(__name__)

PRELOADED = ["pipeline.common.forkserver_preload"]
FOR_STEPS = ["pipeline.common.forkserver_preload_steps"]
"""Modules that only workers that run map steps import: pandas takes a third of the time of all other imports."""
ALWAYS = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONHASHSEED": "6640"}
"""Variables that libraries and the C library read when loaded. The hash seed is the seed that Dask's nannies set."""
ARROW_POOL = "jemalloc"
"""Allocator of Arrow in workers. Each partition is read by a new thread, and Arrow's default, mimalloc, keeps memory
for each thread: workers had 100 MB more, of 500. Arrow reads the variable when it is imported. A build of Arrow without
jemalloc, which is none of the usual ones for Linux, prints a warning and takes its default."""
_POOL = "ARROW_DEFAULT_MEMORY_POOL"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "ARROW_IO_THREADS")

_IS_SAFE = sys.platform.startswith("linux") and sys.version_info >= (3, 11, 1)
"""Before 3.11.1 any user of the machine could run code in the server: its socket was open to all (CVE-2022-42919)."""

_lock = threading.Lock()
_started: dict[str, str] = {}
"""Variables given to the server that this process started; empty without a server."""
_inherited: set[str] = set()
"""Names of all variables that the server has."""
_preloaded: set[str] = set()
"""Modules that the server imported at its start."""
_users: list[object] = []
"""One object per cluster whose workers are forked from the server."""
_borrowers: list[object] = []
_originals: dict[str, str | None] = {}
"""Values of variables before the first of the `restored` blocks that are active; None: not set."""


SMALLEST_WORKER = 1 << 30
"""Smallest memory of a worker in bytes. Below it the imports do not pay, and fewer workers are started."""


def default_shape(cores: int, memory: int) -> tuple[int, int]:
    """Return the number of workers and of threads per worker for a machine.

    Up to 8 cores one thread per process, because steps in pandas hold the interpreter lock. Then two threads, and four
    above 32 cores, because every process pays for its imports and its copy of the model.

    :param memory: bytes of memory of the machine.
    """
    threads = 1 if cores <= 8 else 2 if cores <= 32 else 4
    workers = max(1, min(cores // threads, memory // SMALLEST_WORKER))
    return workers, threads


def chosen_shape(cores: int, memory: int, *, workers: int | None, threads: int | None) -> tuple[int, int]:
    """Return the number of workers and of threads per worker. A value that is None comes from `default_shape`."""
    usual_workers, usual_threads = default_shape(cores, memory)
    each = threads or usual_threads
    return workers or (usual_workers if each == usual_threads else max(1, cores // each)), each


def thread_environment(cores: int, slots: int) -> dict[str, str]:
    """Return the variables to set before a worker starts, so that ``slots`` concurrent tasks share the cores.

    On Linux they name `ARROW_POOL`, unless this process has another choice in its variables.
    """
    pool = os.environ.get(_POOL, ARROW_POOL) if sys.platform == "linux" else os.environ.get(_POOL)
    return {
        **dict.fromkeys(_THREADS, str(max(1, cores // slots))),
        **ALWAYS,
        **({_POOL: pool} if pool else {}),
    }


def likely_environment(workers: int | None, threads: int | None) -> dict[str, str]:
    """Return the variables that workers of a local cluster on this machine will have, unless memory limits them.

    :param workers: number of worker processes, if given.
    :param threads: threads per worker, if given.
    """
    count, each = chosen_shape(core_count(), sys.maxsize, workers=workers, threads=threads)
    return thread_environment(core_count(), count * each)


def start(environment: Mapping[str, str], *, has_steps: bool = True) -> bool:
    """Start the server, unless it is running. Its imports run concurrently with this process.

    A server that nobody uses, and that lacks the imports for steps, is replaced if there are steps.

    :param environment: variables for the server, from `thread_environment`.
    :param has_steps: False: the workers will probably run no map step, so pandas is not imported.
    :returns: True if workers with ``environment`` can be forked. False if the platform has no safe fork server, if
        another part of this process started one, or if ours is in use with a different environment. A server with a
        variable that this process has no more is replaced; `handed_over` has all others.
    """
    with _lock:
        modules = [*PRELOADED, *FOR_STEPS] if has_steps else PRELOADED
        return _begin(environment, modules=modules, needed=modules)


@contextmanager
def in_use(environment: Mapping[str, str]) -> Iterator[bool]:
    """Keep the server unchanged inside the block, whatever it has imported. Yields the result of `start`."""
    user = object()
    with _lock:
        is_ours = _begin(environment, modules=[*PRELOADED, *FOR_STEPS])
        _users.extend([user] if is_ours else [])
    try:
        yield is_ours
    finally:
        with _lock:
            _users[:] = [other for other in _users if other is not user]


def _begin(environment: Mapping[str, str], *, modules: list[str], needed: Collection[str] = ()) -> bool:
    """Start a server that imports ``modules``, unless the one that runs has ``environment`` and the ``needed`` ones."""
    is_as_wanted = _started == dict(environment) and _inherited <= {*os.environ, *environment}
    if is_as_wanted and _preloaded.issuperset(needed):
        return True
    if not _IS_SAFE or (_started and _users) or (not _started and _server_pid() is not None):
        return False
    try:
        _end(os.getpid())
        forkserver.set_forkserver_preload(modules)
        with _variables(environment):
            forkserver.ensure_running()
    except (OSError, ValueError):
        logger.warning("no process to fork workers from could be started; each starts alone", exc_info=True)
        return False
    if not _started:
        atexit.register(_end, os.getpid())
    _started.clear()
    _started.update(environment)
    _inherited.clear()
    _inherited.update(os.environ, environment)
    _preloaded.clear()
    _preloaded.update(modules)
    return True


def handed_over(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a worker gets at its start: this process has them now, its fork server may not.

    :param environment: variables that the worker has already, from `thread_environment`.
    """
    return {name: value for name, value in os.environ.items() if name not in environment}


@contextmanager
def restored(environment: Mapping[str, str]) -> Iterator[None]:
    """Restore the variables named in ``environment`` after the block: Dask's nannies set them in this process.

    With overlapping blocks, the last one to end restores what was before the first.
    """
    user = object()
    with _lock:
        for name in environment:
            _originals.setdefault(name, os.environ.get(name))
        _borrowers.append(user)
    try:
        yield
    finally:
        with _lock:
            _borrowers.remove(user)
            if not _borrowers:
                _set_variables(_originals)
                _originals.clear()


def is_running() -> bool:
    """True if `start` has started the server in this process."""
    return bool(_started)


def _server_pid() -> int | None:
    # There is no public API. If the private name is missing (-1), an unknown server may be running: leave it alone.
    server: Any = getattr(forkserver, "_forkserver", None)
    pid: int | None = getattr(server, "_forkserver_pid", -1)
    return pid


def _end(owner: int) -> None:
    """Stop our server at once, if it is running. Otherwise it would finish its imports before it ends with us."""
    pid = _server_pid()
    if _started and os.getpid() == owner and pid is not None and pid > 0:
        with suppress(ProcessLookupError, PermissionError, ChildProcessError):
            os.kill(pid, signal.SIGTERM)
            # Do not reap the process: Python's own fork server object does.
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
