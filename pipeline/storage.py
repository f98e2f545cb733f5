"""What every store shares: names that stay inside their root, and storage errors a person can act on."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import DiskFull, PipelineError, RefusedForSafety, StorageError

Names = list[str]
"""Names in a folder (stores have a method ``list``, which hides the type)."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOCAL_SCHEMES = ("file://", "local://")


def is_local_path(path: str) -> bool:
    """Whether ``path`` is on the local file system (no scheme, or ``file://``)."""
    return "://" not in path or path.startswith(_LOCAL_SCHEMES)


def local_path(path: str) -> Path:
    """Absolute local path of a path or ``file://`` URL; links in it are not followed."""
    for scheme in _LOCAL_SCHEMES:
        path = path.removeprefix(scheme)
    return Path(os.path.abspath(Path(path).expanduser()))


def unique_name() -> str:
    """A name no other writer has: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def is_unfinished(name: str) -> bool:
    """Whether ``name`` is a file that somebody is still writing, or died writing."""
    return name.startswith(".") and name.endswith(".tmp")


def check_name(name: str) -> str:
    """``name`` itself, when joining it to a root cannot lead out of that root.

    :raises RefusedForSafety: for an absolute name, one with ``..``, an empty part, a backslash or a NUL.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise RefusedForSafety("a name would lead out of its folder", found=repr(name), expected="a relative name")
    return name


@contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turn an OSError into `DiskFull` or `StorageError` that name the place; a missing or existing file passes."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, PipelineError):
        raise
    except OSError as error:
        raise as_storage_error(error, place=place) from error


def as_storage_error(error: Exception, *, place: str) -> StorageError:
    """What to raise for an error that came from the storage at ``place``."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return DiskFull(
            "there is no space left on the storage",
            where=place,
            found=str(error),
            next_step="make room there, then resume the job; nothing that is done is lost",
        )
    return StorageError(
        "the storage failed",
        where=place,
        found=f"{type(error).__name__}: {error}",
        next_step="mend the storage, then resume the job; nothing that is done is lost",
    )
