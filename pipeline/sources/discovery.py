"""`Discovery`: the files and columns of a source. Independent of the file format."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from pipeline.common.rows import Fragment, InputFile, QuarantinedFile, RowGroup
from pipeline.sources.locate import SourceFile


class MeasuredFile(Protocol):
    """An input file with figures per column. Each format has its own."""

    @property
    def file(self) -> SourceFile:
        """The file."""

    def input_file(self, columns: Sequence[str]) -> InputFile:
        """Return the file for the plan, with the bytes of ``columns`` only."""

    def total_bytes(self, columns: Sequence[str]) -> int:
        """Return the uncompressed bytes of ``columns``."""

    def narrow(self, groups: Collection[int]) -> MeasuredFile:
        """Return the file with no other row groups selected than ``groups``."""


@dataclass(frozen=True)
class Discovery:
    """The current files and columns of a source."""

    files: tuple[InputFile, ...]
    """Input files, sorted by path. Bytes of row groups are those of all columns of ``schema``."""
    schema: pa.Schema
    """Physical columns that may be read, in the order of the first file, then hive keys. A key is int64 if all its
    values are integers, else string. A physical column of the same name hides a key."""
    key_names: tuple[str, ...] = ()
    """Hive keys that are columns of ``schema``."""
    available: tuple[str, ...] = ()
    """All columns of the first file, including those not requested, and the hive keys."""
    filter: str | None = None
    """Row filter that decided which row groups are selected."""
    rejected: tuple[QuarantinedFile, ...] = ()
    """Quarantined files, sorted by path; none of them is in ``files``."""
    measured: tuple[MeasuredFile, ...] = field(default=(), repr=False, compare=False)
    """Figures per column of each of ``files``."""
    format: str = "parquet"
    """Name of the adapter that reads the files."""
    never_null: frozenset[str] = frozenset()
    """Columns of integers and booleans without nulls in all selected row groups; any other column may have nulls."""

    @property
    def physical(self) -> tuple[str, ...]:
        """Columns of ``schema`` that are read from the files."""
        return tuple(name for name in self.schema.names if name not in self.key_names)

    @property
    def versions(self) -> dict[str, tuple[int, str]]:
        """Size and version per path; `pipeline.sources.read_batches` checks both."""
        return {file.path: (file.size, file.version) for file in self.files}


@dataclass(frozen=True, slots=True)
class FileSelection:
    """The part of a file that an incremental job scores."""

    reason: str
    """Reason for which the file is scored."""
    published_row_groups: int = 0
    """Row groups at the start of the file that an earlier job has published."""


def resize(discovery: Discovery, *, columns: Sequence[str]) -> tuple[InputFile, ...]:
    """Return the files of ``discovery`` with the bytes of ``columns`` only."""
    if set(columns) >= set(discovery.physical) or not discovery.measured:
        return discovery.files
    return tuple(file.input_file(columns) for file in discovery.measured)


def total_bytes(discovery: Discovery, *, columns: Sequence[str]) -> int:
    """Return the uncompressed bytes of ``columns`` in all files."""
    if set(columns) >= set(discovery.physical) or not discovery.measured:
        return sum(group.bytes for file in discovery.files for group in file.input_groups)
    return sum(file.total_bytes(columns) for file in discovery.measured)


def selected_fragments(file: InputFile) -> Iterator[Fragment]:
    """Yield the runs of adjacent selected row groups of a file."""
    start = stop = first = size = 0
    for number, group in enumerate((*file.row_groups, RowGroup(0, 0, 0, selected=False))):
        if group.selected:
            stop, size = stop + group.rows, size + group.bytes
            continue
        if stop > start:
            span = file.span(first, number)
            yield Fragment(file.path, start, stop, first, number, size, file.hive_keys, span=span)
        start = stop = stop + group.rows
        first, size = number + 1, 0
