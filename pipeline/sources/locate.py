"""Find the files of a source's path: directories, hive partition folders, globs, lists, any fsspec URL."""

from __future__ import annotations

import difflib
import errno
import glob
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from pipeline.common.rows import InputFile
from pipeline.errors import InputError, MissingInput
from pipeline.sources.changes import input_changed, version_text
from pipeline.sources.versions import is_same_version, stat_version
from pipeline.storage.urls import file_system, is_local_path, local_path, storage_errors

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
"""Null in the name of a hive partition folder."""
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}
_WILDCARD = re.compile(r"[*?\[]")
_TIME_KEYS = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
_VERSION_KEYS = ("etag", "ETag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "modified", "created")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that was found, but not opened yet."""

    path: str
    """Absolute local path, or fsspec URL."""
    size: int
    """Bytes."""
    version: str
    """See `pipeline.common.rows.InputFile.version`."""
    hive_keys: tuple[tuple[str, str], ...] = ()
    """Hive partition keys."""
    modified: float = field(default=0.0, compare=False)
    """Time of creation or last change, in seconds since the epoch by the storage's clock; 0.0 if unknown. On local
    disks the inode's change time counts too: a copy that keeps its modification time is new."""
    inode: int = field(default=0, compare=False)
    """Number of the inode on a local disk, else 0."""
    changed_ns: int = field(default=0, compare=False)
    """Time of the last change of the inode on a local disk, in nanoseconds, else 0."""

    @property
    def identity(self) -> str:
        """``version`` with inode and change time; see `pipeline.sources.versions`."""
        return f"{self.version} inode:{self.inode} ctime:{self.changed_ns}" if self.inode else self.version


def locate(
    path: str | Iterable[str], *, base: str | None = None, unusable: list[MissingInput] | None = None
) -> tuple[SourceFile, ...]:
    """Return the files of ``path``, each once, sorted by path.

    In directories, names that begin with ``.`` or ``_`` are skipped (except ``_key=value``), like in Spark and pyarrow.
    Hive keys are the ``key=value`` folders below a directory, or from the first wildcard of a glob on. For the path of
    a single file, hive keys are the folders below ``base``. A file that is removed meanwhile is not in the result.

    :param unusable: receives the error of each entry that is not a file: links that lead nowhere, pipes, devices.
        Default: the first such error is raised.
    :raises MissingInput: if there is no file.
    :raises SpecError: if the URL's file system is unknown or its package is not installed.
    """
    located: dict[str, SourceFile] = {}
    for text in (path,) if isinstance(path, str) else path:
        errors: list[MissingInput] = []
        files = list(_locate_local(text, base, errors) if is_local_path(text) else _locate_remote(text, base))
        if errors and (unusable is None or not files):
            raise errors[0]
        if not files:
            raise _empty(text)
        if unusable is not None:
            unusable += errors
        for file in files:
            located.setdefault(file.path, file)
    return tuple(located[name] for name in sorted(located))


def locate_planned(
    path: str | Iterable[str], planned: Collection[InputFile], *, base: str | None = None
) -> tuple[SourceFile, ...]:
    """Return the files of ``planned``, sorted by path.

    :param base: see `locate`.
    :raises InputChanged: if a file was changed or removed.
    """
    current = {file.path: file for file in locate(path, base=base)}
    for file in planned:
        now = current.get(file.path)
        if now is None or not is_same_version(file.path, (file.size, file.version), (now.size, now.identity)):
            raise input_changed(
                file.path,
                found="file not found" if now is None else version_text(now.size, now.identity),
                expected=version_text(file.size, file.version),
            )
    return tuple(current[name] for name in sorted(file.path for file in planned))


def current_version(path: str) -> tuple[int, str]:
    """Return the current size in bytes and version of a file.

    :raises FileNotFoundError: if the file does not exist.
    """
    if is_local_path(path):
        return stat_version(os.stat(path.removeprefix("file://")))
    system, name = file_system(path)
    system.invalidate_cache()
    info = system.info(name)
    return int(info["size"]), _version(info)


def has_version(path: str, size: int, version: str) -> bool:
    """True if the current version of a file is ``version``.

    :raises FileNotFoundError: if the file does not exist.
    """
    return is_same_version(path, (size, version), current_version(path))


def _version(info: Mapping[str, Any]) -> str:
    for key in _VERSION_KEYS:
        value = info.get(key)
        if value:
            # A file system returns one moment as datetime from one call, as float from another.
            text = str(value.timestamp() if isinstance(value, datetime) else value).strip('"')
            return f"etag:{text}" if key.lower() == "etag" else f"modified:{text}"
    return ""


def _modified(info: Mapping[str, Any]) -> float:
    for key in _TIME_KEYS:
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str) and value:
            with suppress(ValueError):
                return datetime.fromisoformat(value).timestamp()
    return 0.0


def _locate_local(text: str, keys_from: str | None, errors: list[MissingInput]) -> Iterator[SourceFile]:
    path = str(local_path(text))
    if os.path.isdir(path):
        yield from _walk(path, base=path, errors=errors)
    elif os.path.exists(path):
        base = _if_above(path, str(local_path(keys_from)) if keys_from else "")
        yield from _local_file(path, base=base, errors=errors)
    elif not _WILDCARD.search(path):
        raise _missing(text, _local_neighbours(Path(path)))
    else:
        base = fixed_part(path)
        for match in glob.iglob(path, recursive=True):
            if _is_hidden(match[len(base) :], path[len(base) :]):
                continue
            walk = _walk if os.path.isdir(match) else _local_file
            yield from walk(match, base=base, errors=errors)


def _walk(
    folder: str, *, base: str, errors: list[MissingInput], above: tuple[tuple[int, int], ...] = ()
) -> Iterator[SourceFile]:
    """Yield the files below ``folder``.

    :param errors: receives the error of each entry that is not a file.
    :param above: device and inode of each folder on the way: a link to one of them would cause an endless walk.
    """
    try:
        with storage_errors(folder):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in above:
                return
            with os.scandir(folder) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    above = (*above, (status.st_dev, status.st_ino))
    for entry in children:
        if _is_hidden_name(entry.name):
            continue
        if _is_folder(entry):
            yield from _walk(entry.path, base=base, errors=errors, above=above)
        else:
            yield from _local_file(entry.path, base=base, errors=errors)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that leads back to itself: `_local_file` makes the error.
        return False


def _local_file(path: str, *, base: str, errors: list[MissingInput]) -> Iterator[SourceFile]:
    """Yield the file at ``path``, or nothing if the entry is not a file or was removed."""
    _check_utf8(path)
    try:
        with storage_errors(path):
            status = _stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            target = os.readlink(path)
            errors.append(_no_file(path, f"a link to {target}, which does not exist or leads back to the link"))
        return
    if not stat.S_ISREG(status.st_mode):
        errors.append(_no_file(path, _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")))
        return
    keys = _hive_keys(path[len(base) :]) if base else ()
    modified = max(status.st_mtime, status.st_ctime)
    version = f"mtime:{status.st_mtime_ns}"
    yield SourceFile(path, status.st_size, version, keys, modified, status.st_ino, status.st_ctime_ns)


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileNotFoundError(error.errno, error.strerror, path) from error
        raise


def _no_file(path: str, found: str) -> MissingInput:
    return MissingInput(
        "an input is not a regular file",
        where=path,
        found=found,
        expected="a Parquet file",
        next_step="remove it from the source, or skip such entries with errors.files: quarantine",
    )


def _check_utf8(path: str) -> None:
    """Refuse a name that no plan, report or reject can hold as text.

    :raises InputError: for a name that is not UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise InputError(
            "the name of an input file is not UTF-8",
            where=shown,
            found=repr(os.fsencode(os.path.basename(path))),
            expected="a path in UTF-8",
            next_step="rename the file, or its folder",
        ) from None


def _if_above(path: str, folder: str) -> str:
    """Return ``folder`` if ``path`` lies below it, else an empty text."""
    folder = folder.rstrip("/")
    return folder if folder and path.startswith(f"{folder}/") else ""


def _locate_remote(url: str, keys_from: str | None) -> Iterator[SourceFile]:
    system, path = file_system(url)
    system.invalidate_cache()
    with storage_errors(url):
        if system.isfile(path):
            base = _if_above(path, file_system(keys_from)[1] if keys_from else "")
            yield _remote_file(system, system.info(path), base=base)
        elif system.isdir(path):
            yield from _find(system, path, base=path)
        elif not _WILDCARD.search(path):
            raise _missing(url, _remote_neighbours(system, path))
        else:
            base = fixed_part(path)
            for match, info in system.glob(path, detail=True).items():
                if _is_hidden(match[len(base) :], path[len(base) :]):
                    continue
                is_folder = info["type"] == "directory"
                yield from _find(system, match, base=base) if is_folder else [_remote_file(system, info, base=base)]


def _find(system: Any, folder: str, *, base: str) -> Iterator[SourceFile]:
    for name, info in system.find(folder, detail=True).items():
        below = name[len(folder) :].strip("/")
        # An object store may hold an empty object as a marker for a folder.
        if not below or any(map(_is_hidden_name, below.split("/"))) or name.endswith("/"):
            continue
        yield _remote_file(system, info, base=base)


def _remote_file(system: Any, info: Mapping[str, Any], *, base: str) -> SourceFile:
    name = str(info["name"])
    keys = _hive_keys(name[len(base) :]) if base else ()
    return SourceFile(str(system.unstrip_protocol(name)), int(info["size"]), _version(info), keys, _modified(info))


def _hive_keys(below: str) -> tuple[tuple[str, str], ...]:
    folders = below.strip("/").split("/")[:-1]
    pairs = (folder.split("=", 1) for folder in folders if "=" in folder and not folder.startswith("="))
    return tuple((unquote(name), unquote(value)) for name, value in pairs)


def _is_hidden_name(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _is_hidden(below: str, pattern: str) -> bool:
    """True if a wildcard of a glob matched a hidden name. A hidden name written out in the pattern is wanted."""
    spelled = {part for part in pattern.split("/") if part[:1] in ("_", ".")}
    return not spelled and any(_is_hidden_name(part) for part in below.split("/") if part)


def hive_value(text: str, arrow_type: pa.DataType) -> int | str | None:
    """Return the value of a hive key, from its text in the name of a folder."""
    if text == HIVE_NULL:
        return None
    return int(text) if pa.types.is_integer(arrow_type) else text


def fixed_part(pattern: str) -> str:
    """Return the folders of a glob before the first wildcard, with a slash at the end."""
    match = _WILDCARD.search(pattern)
    return pattern[: pattern.rfind("/", 0, match.start()) + 1] if match else pattern


def _local_neighbours(path: Path) -> tuple[str, str, list[str]]:
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    with storage_errors(str(missing.parent)):
        return missing.name, str(missing.parent), sorted(os.listdir(missing.parent))


def _remote_neighbours(system: Any, path: str) -> tuple[str, str, list[str]]:
    parent, _, name = path.rstrip("/").rpartition("/")
    try:
        names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in system.ls(parent, detail=False)]
    except (OSError, ValueError):
        names = []
    return name, parent, sorted(names)


def _missing(path: str, neighbours: tuple[str, str, list[str]]) -> MissingInput:
    name, folder, names = neighbours
    near = difflib.get_close_matches(name, names, n=3)
    shown = ", ".join((near or names)[:5]) or "nothing"
    return MissingInput(
        "the source's path does not exist",
        where=path,
        found=f"in {folder or '/'}: {shown}",
        expected=f"a Parquet file, or a directory of them, called {name}",
        next_step=f"did you mean {near[0]}? fix source.path" if near else "fix source.path",
    )


def _empty(path: str) -> MissingInput:
    is_pattern = bool(_WILDCARD.search(path)) and not os.path.exists(path)
    return MissingInput(
        "no file matches the source's path" if is_pattern else "the source's directory holds no file",
        where=path,
        found="no file (names that begin with . or _ are passed over)",
        expected="at least one Parquet file",
        next_step="fix source.path, or put the files there",
    )
