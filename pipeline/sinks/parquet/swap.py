"""Replace a whole folder in one step on a POSIX file system.

The new folder is built beside the old folder and takes its path by one rename. A missing or empty folder is replaced.
Other folders are exchanged (``renameat2(RENAME_EXCHANGE)``, Linux). Every reader that lists the path sees either the
old files or the new files, even a reader that does not use manifests.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from pipeline.errors import OutputExists, StorageError
from pipeline.storage.local import LocalStore
from pipeline.storage.urls import is_unfinished, storage_errors, unique_name

_ATTEMPT = re.compile(r"[0-9a-f]{8}(?:\.[0-9a-f]{8})*")
"""Unique part of an attempt; with more of them once the folder is being removed."""
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
    """Raised when a folder cannot be replaced in one step at this path or on this file system."""


def staging_path(path: Path, *, job: str, number: int) -> Path:
    """Return the path to build a new folder for ``path`` at: a hidden sibling, unique to this attempt."""
    return path.with_name(f"{_prefix(path, job=job, number=number)}{unique_name()[:8]}")


def find_staging(path: Path, *, job: str, number: int) -> list[Path]:
    """Return the folders that attempts to publish this manifest left beside ``path``."""
    prefix = _prefix(path, job=job, number=number)
    try:
        names = [name for name in os.listdir(path.parent) if name.startswith(prefix)]
    except FileNotFoundError:
        return []
    return sorted(path.with_name(name) for name in names if _ATTEMPT.fullmatch(name.removeprefix(prefix)))


def _prefix(path: Path, *, job: str, number: int) -> str:
    # No id of a job contains a tilde: "a" and its child "a.b" cannot be confused.
    return f".{path.name}~{job}~{number}~"


def remove_staging(staging: Path) -> None:
    """Remove a folder that was built beside the sink, or the folder that was replaced.

    The folder is renamed first: another driver still building it then fails instead of publishing part of it.
    """
    trash = staging.with_name(f"{staging.name}.{unique_name()[:8]}")
    with storage_errors(str(staging)), suppress(FileNotFoundError):
        os.rename(staging, trash)
        shutil.rmtree(trash)


def start_staging(path: Path, staging: Path) -> None:
    """Create the empty folder that will replace ``path``; if ``path`` exists, copy its mode and group.

    Missing folders above it are created durably.

    :raises CannotSwap: when ``path`` is a mount point, or no folder can be created in its parent.
    """
    if os.path.ismount(path):
        raise CannotSwap(f"{path} is a mount point")
    try:
        LocalStore(staging.parent).make_folder(staging.parent)
        os.mkdir(staging)
        if path.is_dir():
            old = path.stat()
            if old.st_gid != staging.stat().st_gid:
                with suppress(PermissionError):
                    os.chown(staging, -1, old.st_gid)
            os.chmod(staging, stat.S_IMODE(old.st_mode))
    except (OSError, StorageError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) else error
        if not isinstance(cause, OSError) or cause.errno not in _CANNOT:
            with storage_errors(str(staging)):
                raise
        with suppress(OSError):
            os.rmdir(staging)
        raise CannotSwap(str(cause)) from error


def place(staging: Path, path: Path) -> None:
    """Rename ``staging`` to ``path``, which must be missing or an empty folder.

    :raises OutputExists: when ``path`` contains files; nothing changed.
    :raises CannotSwap: when the file system does not allow it; nothing changed.
    """
    with storage_errors(str(path)):
        try:
            os.rename(staging, path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and _holds_unfinished_only(path):
                raise CannotSwap("the folder contains unfinished files of a process that died") from error
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise OutputExists(
                    "there is data in the sink already",
                    where=f"sink.path: {path}",
                    found="files that appeared while the job ran",
                    expected="no data, since sink.mode is error",
                    next_step="choose another sink.path, or resume with --set sink.mode=overwrite",
                ) from error
            if error.errno in _CANNOT:
                raise CannotSwap(str(error)) from error
            raise


def _holds_unfinished_only(path: Path) -> bool:
    return all(is_unfinished(name) for name in os.listdir(path))


def exchange(staging: Path, path: Path) -> None:
    """Swap the names of two folders in one step.

    :raises CannotSwap: when the system or the file system does not support the exchange; nothing changed.
    """
    with storage_errors(str(path)):
        failure = rename_exchange(os.fsencode(staging), os.fsencode(path))
        if failure in _CANNOT:
            raise CannotSwap(os.strerror(failure))
        if failure:
            raise OSError(failure, os.strerror(failure), str(path))


def rename_exchange(first: bytes, second: bytes) -> int:
    """Call ``renameat2(2)`` with RENAME_EXCHANGE; return 0, or the errno."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return errno.ENOSYS
    result = call(
        _AT_FDCWD, ctypes.c_char_p(first), _AT_FDCWD, ctypes.c_char_p(second), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    return 0 if result == 0 else ctypes.get_errno()


def sync(folder: Path) -> None:
    """Make a rename in ``folder`` durable."""
    LocalStore(folder).sync()
