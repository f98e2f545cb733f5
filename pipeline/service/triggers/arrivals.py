"""Find the files that arrived for a trigger, and decide whether to score them now."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import PurePosixPath

from pipeline.common.digest import digest_bytes, digest_json
from pipeline.common.units import format_seconds, parse_bytes, parse_seconds
from pipeline.errors import MissingInput, PipelineError
from pipeline.sources.locate import fixed_part, locate
from pipeline.spec.triggers import ArrivalTrigger
from pipeline.storage.urls import file_system, is_local_path, local_path, storage_errors


@dataclass(frozen=True, slots=True)
class ArrivedFile:
    """A file that exists now."""

    path: str
    size: int
    version: str
    """Version of the content, see `pipeline.common.rows.InputFile.version`."""
    modified: float
    """Seconds since the epoch, by the storage's clock."""
    is_marked: bool = True
    """True if the marker that the trigger requires exists."""
    rows: int | None = None
    """Number of rows, if the trigger has a threshold of rows."""

    @property
    def key(self) -> str:
        """Key of this content under this name; another version has another key."""
        return digest_bytes(f"{self.path}\0{self.size}\0{self.version}".encode())[:24]


@dataclass(frozen=True)
class Due:
    """Decision about the files that exist."""

    files: tuple[ArrivedFile, ...]
    """Files to score now, sorted by path."""
    waiting: int
    """Number of new files that wait."""
    reason: str
    """Reason, as text."""


def scan_arrivals(
    arrival: ArrivalTrigger, *, seen: Collection[str], count_rows: Callable[[Sequence[ArrivedFile]], Sequence[int]]
) -> tuple[ArrivedFile, ...]:
    """List the files that exist now, sorted by path. Rows of new files are counted if the trigger needs them.

    :param seen: Keys of files that fired before.
    :param count_rows: Function that counts the rows of files, such as a `RowCounter`.
    """
    try:
        located = locate(arrival.path, unusable=[])
    except MissingInput:
        return ()
    files = [ArrivedFile(file.path, file.size, file.version, file.modified) for file in located]
    if arrival.marker is not None:
        marked = _marked_folders(arrival, [file.path for file in files if file.key not in seen])
        files = [replace(file, is_marked=_folder(file.path) in marked) for file in files]
    if arrival.rows is not None:
        new = [file for file in files if file.key not in seen]
        counts = dict(zip((file.key for file in new), count_rows(new), strict=True))
        files = [replace(file, rows=counts.get(file.key)) for file in files]
    return tuple(files)


@dataclass
class RowCounter:
    """Counter of the rows of files, which reads each footer once. A file without a footer counts as 0 rows."""

    count: Callable[[Iterable[str]], Mapping[str, int | PipelineError]]
    """Returns the rows, or an error, by path."""
    _known: dict[str, int] = field(default_factory=dict)
    """Key of a file -> its rows."""

    def __call__(self, files: Sequence[ArrivedFile]) -> list[int]:
        """Return the rows of ``files``, and forget all other files."""
        new = {file.path: file.key for file in files if file.key not in self._known}
        for path, rows in self.count(new).items() if new else ():
            # Incomplete, removed again, or not Parquet: the job that scores the file reports it.
            self._known[new[path]] = rows if isinstance(rows, int) else 0
        self._known = {file.key: self._known.get(file.key, 0) for file in files}
        return list(self._known.values())


def decide_arrival(
    arrival: ArrivalTrigger, files: Sequence[ArrivedFile], *, seen: Collection[str], now: datetime
) -> Due:
    """Decide which of ``files`` to score now. Pure.

    New files count if they have their marker and have not changed for ``quiet``. All these files fire together:

    - with thresholds, when a threshold is reached;
    - without thresholds, when no file arrived in the last ``quiet``;
    - in any case, when the first file is older than ``at_latest``.
    """
    time, quiet = now.timestamp(), arrival.quiet_seconds
    new = sorted((file for file in files if file.key not in seen), key=lambda file: file.path)
    if not new:
        return Due((), 0, "no file that was not seen before")
    marked = [file for file in new if file.is_marked]
    if not marked:
        return Due((), len(new), f"{_count(len(new))} without {arrival.marker}")
    settled = [file for file in marked if time - file.modified >= quiet]
    if not settled:
        return Due((), len(new), f"{_count(len(marked))} that changed in the last {format_seconds(quiet)}")
    age = time - min(file.modified for file in settled)
    if arrival.at_latest is not None and age >= parse_seconds(arrival.at_latest):
        return _taken(settled, new, f"the first came {format_seconds(age)} ago")
    if arrival.has_threshold:
        return _at_threshold(arrival, settled, new)
    if len(settled) < len(marked):
        return Due((), len(new), f"more came in the last {format_seconds(quiet)}")
    return _taken(settled, new, f"no other came in the last {format_seconds(quiet)}")


def fired_id(files: Iterable[ArrivedFile]) -> str:
    """Return the id of the firing for exactly these files."""
    return digest_json([[file.path, file.size, file.version] for file in files])[:24]


def _at_threshold(arrival: ArrivalTrigger, settled: Sequence[ArrivedFile], new: Sequence[ArrivedFile]) -> Due:
    amounts = {
        "files": (len(settled), arrival.files),
        "rows": (sum(file.rows or 0 for file in settled), arrival.rows),
        "bytes": (sum(file.size for file in settled), None if arrival.bytes is None else parse_bytes(arrival.bytes)),
    }
    asked = [(name, have, need) for name, (have, need) in amounts.items() if need is not None]
    reached = [f"{have:,} {name} reach the {need:,} asked for" for name, have, need in asked if have >= need]
    if reached:
        return _taken(settled, new, "; ".join(reached))
    return Due((), len(new), "; ".join(f"{have:,} of {need:,} {name}" for name, have, need in asked))


def _taken(settled: Sequence[ArrivedFile], new: Sequence[ArrivedFile], reason: str) -> Due:
    return Due(tuple(settled), len(new) - len(settled), f"{_count(len(settled))}: {reason}")


def _count(files: int) -> str:
    return "1 file" if files == 1 else f"{files:,} files"


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _marked_folders(arrival: ArrivalTrigger, paths: Iterable[str]) -> set[str]:
    """Return the folders of ``paths`` with the marker in them, or in a parent folder below the trigger's path."""
    base = _base(arrival.path)
    is_there: dict[str, bool] = {}
    marked = set()
    for folder in {_folder(path) for path in paths}:
        above = [folder]
        while above[-1] != base and above[-1].startswith(base) and above[-1].count("/") > base.count("/"):
            above.append(_folder(above[-1]))
        for parent in above:
            if parent not in is_there:
                is_there[parent] = _exists(f"{parent}/{arrival.marker}")
            if is_there[parent]:
                marked.add(folder)
                break
    return marked


def _base(path: str) -> str:
    """Return the fixed first part of ``path``, in the form of the paths of its files."""
    if is_local_path(path):
        fixed = fixed_part(str(local_path(path)))
        return fixed.rstrip("/")
    system, inside = file_system(path)
    return str(system.unstrip_protocol(fixed_part(str(PurePosixPath(inside))))).rstrip("/")


def _exists(path: str) -> bool:
    with storage_errors(path):
        if is_local_path(path):
            return local_path(path).is_file()
        system, inside = file_system(path)
        return bool(system.isfile(inside))
