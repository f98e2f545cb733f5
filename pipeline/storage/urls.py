"""Functions common to all stores: names that stay inside their root, URLs and options, and storage errors."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pipeline.common.secrets import resolve_options
from pipeline.errors import DiskFull, PipelineError, RefusedForSafety, SpecError, StorageError

P = ParamSpec("P")
R = TypeVar("R")

Names = list[str]
"""Names in a folder. (Stores have a method ``list``, which hides the type.)"""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLIENTS = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "urllib3"}
"""Packages below fsspec's file systems that raise errors other than OSError, for example without a connection."""
_LOCAL_SCHEMES = ("file://", "local://")

Options = Mapping[str, Mapping[str, Any]]
"""URL prefix -> options of the file system, with references for secrets."""
_NO_OPTIONS: Options = {}
_options: ContextVar[Options] = ContextVar("storage_options", default=_NO_OPTIONS)
"""Options of the job that this thread works for. A new thread has none; see `with_storage_options`."""


def is_local_path(path: str) -> bool:
    """True if ``path`` is on the local file system (no scheme, or ``file://``)."""
    return "://" not in path or path.startswith(_LOCAL_SCHEMES)


def local_path(path: str) -> Path:
    """Return the absolute local path of a path or ``file://`` URL. Links are not followed."""
    for scheme in _LOCAL_SCHEMES:
        path = path.removeprefix(scheme)
    return Path(os.path.abspath(expand_user(path)))


def expand_user(path: str) -> Path:
    """Return ``path`` with ``~`` and ``~user`` replaced by a home folder.

    :raises SpecError: for an unknown user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise SpecError(
            "a path names an unknown user",
            where=path,
            found=Path(path).parts[0],
            expected="~ or ~user for a user of this machine",
            next_step="write the path out, or ./~… for a name that begins with a tilde",
        ) from error


def unique_name() -> str:
    """Return a name that no other writer has: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def is_unfinished(name: str) -> bool:
    """True if ``name`` is an unfinished file: its writer is still running, or has died."""
    return name.startswith(".") and name.endswith(".tmp")


def check_name(name: str) -> str:
    """Return ``name`` if joining it to a root cannot lead out of the root.

    :raises RefusedForSafety: for an absolute name, and for a name with ``.``, ``..``, an empty part, a backslash or a
        NUL.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise RefusedForSafety("a name would lead out of its folder", found=repr(name), expected="a relative name")
    return name


def is_bare(error: BaseException) -> bool:
    """True if ``error`` is a plain OSError without errno: raised by pyarrow about content, not by storage."""
    return type(error) is OSError and error.errno is None


def check_url(url: str) -> str:
    """Return ``url`` if it contains no password. URLs of a job are stored in many places.

    :raises RefusedForSafety: if ``url`` contains a password; the message does not repeat it.
    """
    scheme, separator, rest = url.partition("://")
    user, at, host = rest.split("/", 1)[0].rpartition("@")
    if separator and at and ":" in user:
        raise RefusedForSafety(
            "a URL carries a password, which would be written to the job directory",
            where=f"{scheme}://…@{host}",
            found="user:password@",
            expected="credentials from the environment, a file of the client library, or the role of the machine",
            next_step="take the password out of the URL (docs/storage.md)",
        )
    return url


def use_storage_options(options: Options) -> None:
    """Use exactly these options from now on in this thread, which works for one job; those of a former job are gone.

    References are resolved when a URL is opened. Other threads have options of their own.
    """
    _options.set(dict(options))


@contextmanager
def own_storage_options() -> Iterator[None]:
    """Restore the options of this thread after the block, or the call of a decorated function."""
    token = _options.set(_options.get())
    try:
        yield
    finally:
        _options.reset(token)


def with_storage_options(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function`` for another thread, where it has the options that this thread has now."""
    options = _options.get()

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with own_storage_options():
            use_storage_options(options)
            return function(*args, **kwargs)

    return call


def options_for(url: str) -> dict[str, Any]:
    """Return the options for ``url`` by the longest matching prefix, with references resolved; empty without a match.

    :raises SpecError: if a reference cannot be resolved in this process.
    """
    options = _options.get()
    fitting = [begin for begin in options if f"{url.rstrip('/')}/".startswith(f"{begin.rstrip('/')}/")]
    begin = max(fitting, key=len, default=None)
    return {} if begin is None else resolve_options(options[begin], where=f"storage: {begin}")


def file_system(url: str, **options: Any) -> tuple[Any, str]:
    """Return the fsspec file system of ``url``, and the path in it.

    :param options: options of the file system. Default: those of `use_storage_options`, else fsspec's configuration.
    :raises SpecError: if the file system is unknown, or its package is not installed.
    :raises RefusedForSafety: if ``url`` contains a password.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(check_url(url), **(options or options_for(url)))
    except SpecError:
        raise
    except (ImportError, ValueError) as error:
        raise SpecError(
            "the storage of a path cannot be used",
            where=url,
            found=str(error),
            expected="a local path, or the URL of a file system fsspec knows and whose package is installed",
            next_step="install the package (s3fs for s3://), or fix the path",
        ) from error
    return system, str(path)


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn errors of storage into `DiskFull` or `StorageError` with its place.

    `FileNotFoundError` and `FileExistsError` pass unchanged.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, PipelineError):
        raise
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise as_storage_error(error, where=where) from error


def is_storage_error(error: Exception) -> bool:
    """True if ``error`` comes from storage: an OSError, or an error of a client library."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS


def as_storage_error(error: Exception, *, where: str) -> StorageError:
    """Build the `StorageError` or `DiskFull` for an error of the storage at ``where``."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return DiskFull(
            "there is no space left on the storage",
            where=where,
            found=str(error),
            next_step="make room there, then resume the job; nothing that is done is lost",
        )
    is_refused = isinstance(error, PermissionError) or "Credentials" in type(error).__name__
    return StorageError(
        "the storage refused access" if is_refused else "the storage failed",
        where=where,
        found=f"{type(error).__name__}: {error}",
        next_step=("give access (docs/storage.md)" if is_refused else "fix the storage")
        + ", then run or resume the job; nothing that is done is lost",
    )
