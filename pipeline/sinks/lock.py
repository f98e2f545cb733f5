"""The lock of a sink on a POSIX file system: one publisher at a time.

The lock is ``flock(2)`` on ``.<name>.lock`` beside the sink, because a swap replaces the sink's own folder. The kernel
frees the lock when its process ends, however it ends. The file is removed when the lock is released. A process that
waited on a removed file sees that the path names another file, and starts again.

Where nothing can be created beside the sink, no folder can be swapped either: the sink's own folder is locked then.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.common.units import iso_time, utc_now
from pipeline.errors import OutputConflict, StorageError
from pipeline.storage.local import LocalStore
from pipeline.storage.urls import storage_errors

logger = logging.getLogger(__name__)
LOCK_SECONDS = 600.0
"""Seconds to wait for another publisher."""
_FIRST_PAUSE, _LAST_PAUSE = 0.01, 0.5
"""Seconds between two attempts, doubled from the first to the last."""
_BUSY = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
_HOLDER_BYTES = 4096


def lock_path(folder: Path) -> Path:
    """Return the path of the lock file of the sink ``folder``."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def sink_lock(
    folder: Path,
    *,
    job: str,
    check_lease: Callable[[], object] = lambda: None,
    timeout: float = LOCK_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], object] = time.sleep,
) -> Iterator[bool]:
    """Hold the lock of the sink ``folder`` while the block runs. Yield True if the lock excludes other publishers.

    The value is False where the file system has no locks, which is logged.

    :param job: id of the publishing job, for the errors of others.
    :param check_lease: called between attempts; raises when this driver must give up.
    :raises OutputConflict: when another process holds the lock for ``timeout`` seconds.
    """
    descriptor = _acquire(folder, job=job, check_lease=check_lease, timeout=timeout, clock=clock, pause=pause)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        _release(descriptor, lock_path(folder))


def _acquire(
    folder: Path,
    *,
    job: str,
    check_lease: Callable[[], object],
    timeout: float,
    clock: Callable[[], float],
    pause: Callable[[float], object],
) -> int | None:
    begin, seconds, is_logged = clock(), _FIRST_PAUSE, False
    while True:
        descriptor, path = _open(folder)
        if descriptor is None:
            return None
        try:
            is_held = _try_lock(descriptor, path)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                logger.warning("%s has no file locks: let no two jobs publish to %s at once", path.parent, folder)
                return None
            raise
        if is_held:
            _write_holder(descriptor, path, job=job)
            return descriptor
        holder = _read_holder(descriptor)
        os.close(descriptor)
        if clock() - begin >= timeout:
            raise _locked(folder, job=job, holder=holder, timeout=timeout)
        if not is_logged:
            is_logged = True
            logger.info("waiting up to %g s for the sink %s: %s publishes to it", timeout, folder, holder)
        check_lease()
        pause(seconds)
        seconds = min(2 * seconds, _LAST_PAUSE)


def _open(folder: Path) -> tuple[int | None, Path]:
    """Open the lock file, or the folder where no lock file can be created."""
    path = lock_path(folder)
    with storage_errors(str(path)):
        try:
            LocalStore(folder.parent).make_folder(folder.parent)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), path
        except (OSError, StorageError) as error:
            if _errno_of(error) not in _READ_ONLY:
                raise
        for target, flags in ((path, os.O_NOFOLLOW), (folder, os.O_DIRECTORY)):
            with suppress(OSError):
                return os.open(target, os.O_RDONLY | flags), target
        return None, path


def _errno_of(error: BaseException) -> int | None:
    cause = error.__cause__ if isinstance(error, StorageError) else error
    return cause.errno if isinstance(cause, OSError) else None


def _try_lock(descriptor: int, path: Path) -> bool:
    """Lock an open file. Return False if another process holds the lock, or ``path`` names another file by now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _release(descriptor: int, path: Path) -> None:
    """Remove the lock file while it is locked, then unlock it: a child may have a copy of the descriptor."""
    try:
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.unlink(path)
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _write_holder(descriptor: int, path: Path, *, job: str) -> None:
    """Write who holds the lock, for the errors of others. The lock does not depend on it."""
    holder = {"job": job, "host": socket.gethostname(), "pid": os.getpid(), "since": iso_time(utc_now())}
    if path.name.endswith(".lock"):
        with suppress(OSError):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, _HOLDER_BYTES, 0))
        return f"job {holder['job']}, process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


def _locked(folder: Path, *, job: str, holder: str, timeout: float) -> OutputConflict:
    return OutputConflict(
        "another job is publishing to the same sink",
        where=f"sink.path: {folder}",
        found=holder,
        expected=f"the sink to be free within {timeout:g} s",
        next_step=f"wait for the other job, or end its process; then: python -m pipeline resume {job}",
    )
