"""Refuse unsafe sink paths of any format: the source, job directories, a home folder, the working directory."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from pipeline.errors import RefusedForSafety
from pipeline.storage.urls import is_local_path, local_path

_MAGIC = re.compile(r"[*?\[]")
_SAFE = "a folder of its own for the output, apart from the source"


def check_place(path: str, *, sources: Sequence[str], state: Sequence[str] = ()) -> None:
    """Refuse ``path`` as a sink if publishing could change files that are not output.

    :param sources: paths, URLs or globs of the source.
    :param state: folders that contain job directories.
    :raises RefusedForSafety: when ``path`` overlaps with ``sources`` or ``state``, or is ``/``, the user's home, the
        working directory, or a folder above one of these.
    """
    sink = real_place(path)
    if is_local_path(path):
        for folder, name in ((Path.home(), "your home"), (Path.cwd(), "the working directory")):
            if _is_within(_parts(os.path.realpath(folder)), _parts(sink)):
                raise _refused(path, f"{sink} is {name} or a folder above it")
    if len(_parts(sink)) <= 1:
        raise _refused(path, f"{sink} is the root of the storage")
    for source in sources:
        if _overlaps(sink, source):
            raise _refused(path, f"{sink} overlaps with the source {source}")
    for folder_of_jobs in state:
        jobs = _parts(real_place(folder_of_jobs))
        if _is_within(jobs, _parts(sink)) or _is_within(_parts(sink), jobs):
            raise _refused(path, f"{sink} overlaps with the job directories in {folder_of_jobs}")


def real_place(path: str) -> str:
    """Return a local ``path`` as an absolute path without symbolic links; return a URL without trailing slashes."""
    if is_local_path(path):
        return os.path.realpath(local_path(path))
    scheme, separator, rest = path.partition("://")
    return f"{scheme}{separator}{rest.rstrip('/')}"


def _overlaps(sink: str, source: str) -> bool:
    magic = _MAGIC.search(source)
    if magic is None:
        folder = _parts(real_place(source))
        return _is_within(_parts(sink), folder) or _is_within(folder, _parts(sink))
    slash = source.rfind("/", 0, magic.start())
    base = _parts(real_place(source[: max(slash, 1)] if slash >= 0 else "."))
    if _is_within(base, _parts(sink)):
        return True
    if not _is_within(_parts(sink), base):
        return False
    below = _parts(sink)[len(base) :]
    patterns = PurePosixPath(source[slash + 1 :]).parts
    # If a glob matches the sink's folders or part of their path, the next run would read this run's output.
    for part, pattern in zip(below, patterns, strict=False):
        if pattern == "**":
            return True
        if not fnmatch(part, pattern):
            return False
    return True


def _is_within(parts: tuple[str, ...], folder: tuple[str, ...]) -> bool:
    return parts[: len(folder)] == folder


def _parts(path: str) -> tuple[str, ...]:
    scheme, separator, rest = path.rpartition("://")
    return (scheme + separator or "/", *(part for part in rest.split("/") if part))


def _refused(path: str, found: str) -> RefusedForSafety:
    return RefusedForSafety(
        "the output cannot go there",
        where=f"sink.path: {path}",
        found=found,
        expected=_SAFE,
        next_step="choose another sink.path",
    )
