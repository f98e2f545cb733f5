"""Replacing a whole folder in one step on a POSIX file system.

The new folder is built aside, as a sibling, and takes its place by one rename: onto nothing or an empty folder, or in
exchange with the old one (``renameat2(RENAME_EXCHANGE)``, Linux). Whoever lists the path sees the old files or the new
ones, also a reader who knows nothing of manifests.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from pipeline.errors import OutputExists
from pipeline.storage.urls import is_unfinished, storage_errors, unique_name

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT = {
    errno.ENOSYS,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EACCES,
    errno.EXDEV,
    errno.EBUSY,
    errno.EROFS,
}


class CannotSwap(Exception):
    """This file system, or this place in it, has no such step."""


def aside_path(path: Path, *, job: str, number: int) -> Path:
    """Where a new folder for ``path`` is built: a hidden sibling that no other attempt has."""
    return path.with_name(f".{path.name}.{job}-{number}.{unique_name()[:8]}")


def find_asides(path: Path, *, job: str, number: int) -> list[Path]:
    """What attempts to publish this manifest left beside ``path``."""
    prefix = f".{path.name}.{job}-{number}."
    try:
        return sorted(path.with_name(name) for name in os.listdir(path.parent) if name.startswith(prefix))
    except FileNotFoundError:
        return []


def remove_aside(aside: Path) -> None:
    """Remove a folder that was built aside, or the one that was replaced.

    It is renamed first: whoever is still building it then fails, instead of putting half of it in place.
    """
    gone = aside.with_name(f"{aside.name}.{unique_name()[:8]}")
    with storage_errors(str(aside)), suppress(FileNotFoundError):
        os.rename(aside, gone)
        shutil.rmtree(gone)


def start_aside(path: Path, aside: Path) -> None:
    """Make the empty folder that will take the place of ``path``, with its mode and group where it exists.

    :raises CannotSwap: when ``path`` is a mount point, or its parent takes no folders.
    """
    if os.path.ismount(path):
        raise CannotSwap(f"{path} is a mount point")
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.mkdir(aside)
        if path.is_dir():
            old = path.stat()
            if old.st_gid != aside.stat().st_gid:
                with suppress(PermissionError):
                    os.chown(aside, -1, old.st_gid)
            os.chmod(aside, stat.S_IMODE(old.st_mode))
    except OSError as error:
        if error.errno not in _CANNOT:
            with storage_errors(str(aside)):
                raise
        with suppress(OSError):
            os.rmdir(aside)
        raise CannotSwap(str(error)) from error


def place(aside: Path, path: Path) -> None:
    """Give ``aside`` the name ``path``, which must not exist or be empty.

    :raises OutputExists: when something is there; nothing changed.
    :raises CannotSwap: when the file system does not allow it; nothing changed.
    """
    with storage_errors(str(path)):
        try:
            os.rename(aside, path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and _holds_unfinished_only(path):
                raise CannotSwap("files that somebody died writing are in the folder") from error
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise OutputExists(
                    "there is data in the sink already",
                    where=f"sink.path: {path}",
                    found="it appeared while the job ran",
                    expected="no data, since sink.mode is error",
                    next_step="choose another sink.path, or resume with --set sink.mode=overwrite",
                ) from error
            if error.errno in _CANNOT:
                raise CannotSwap(str(error)) from error
            raise


def _holds_unfinished_only(path: Path) -> bool:
    return all(is_unfinished(name) for name in os.listdir(path))


def exchange(aside: Path, path: Path) -> None:
    """Swap the names of two folders in one step.

    :raises CannotSwap: when the system or the file system does not do that; nothing changed.
    """
    with storage_errors(str(path)):
        failure = rename_exchange(os.fsencode(aside), os.fsencode(path))
        if failure in _CANNOT:
            raise CannotSwap(os.strerror(failure))
        if failure:
            raise OSError(failure, os.strerror(failure), str(path))


def rename_exchange(one: bytes, other: bytes) -> int:
    """``renameat2(2)`` with RENAME_EXCHANGE: 0, or the errno."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return errno.ENOSYS
    done = call(_AT_FDCWD, ctypes.c_char_p(one), _AT_FDCWD, ctypes.c_char_p(other), ctypes.c_uint(_RENAME_EXCHANGE))
    return 0 if done == 0 else ctypes.get_errno()


def sync(folder: Path) -> None:
    """Make a rename in ``folder`` durable."""
    with storage_errors(str(folder)):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
