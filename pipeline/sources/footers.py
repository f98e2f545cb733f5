"""Open Parquet files, and take from their footers what planning needs."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptInput, PipelineError, StorageError
from pipeline.files import is_local_path
from pipeline.sources.expression import Filter
from pipeline.sources.locate import HIVE_NULL, Located
from pipeline.sources.pruning import Bounds
from pipeline.storage import file_system, is_bare, is_storage_error

WHOLE_FILE_BYTES = 1 << 20
"""Local files up to this size are read in one go: a 500-row file takes 0.45 ms so, 0.55 ms otherwise (measured)."""
BUFFER_BYTES = 1 << 16
"""Read buffer per column of a local file."""
REMOTE_BUFFER_BYTES = 1 << 22
"""Read buffer per column of a remote file, where every filling is a request."""
BUFFERS_BYTES = 1 << 27
"""All read buffers of a file together; wide tables get smaller ones."""
_SMALLEST_BUFFER = 1 << 12
_MAGIC, _ENCRYPTED_MAGIC = b"PAR1", b"PARE"


@dataclass(frozen=True, slots=True)
class Footer:
    """What a footer says, boiled down: memory is in proportion to row groups + columns, not to their product."""

    file: Located
    rows: np.ndarray
    """int64 [groups]."""
    totals: np.ndarray
    """int64 [groups]: uncompressed bytes of all columns."""
    names: tuple[str, ...]
    """Columns of the file, in its order."""
    weights: np.ndarray
    """float64 [columns]: share of each column in ``totals``; measured on up to three row groups."""
    packed: np.ndarray
    """float64 [columns]: compressed / uncompressed bytes of each column."""
    widths: np.ndarray
    """float64 [columns]: bytes of a decoded value where that is fixed, else 0."""
    wanted: tuple[bool, ...]
    """Per row group: whether the filter could keep a row of it."""
    mark: str = ""
    """As in `pipeline.rows.InputFile`."""
    done_groups: int = 0
    """As there."""
    why: str = ""
    """As there."""

    def group_bytes(self, columns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Uncompressed and compressed bytes of ``columns``, int64 [groups] each.

        Values of a fixed width count with it even where their encoding is shorter: that is what they take in memory.
        """
        chosen = _positions(self.names, tuple(columns))
        encoded = np.outer(self.totals, self.weights[chosen])
        decoded = np.maximum(encoded, np.outer(self.rows, self.widths[chosen]))
        return decoded.sum(axis=1).astype(np.int64), (encoded @ self.packed[chosen]).astype(np.int64)


@lru_cache(maxsize=8)
def _positions(names: tuple[str, ...], columns: tuple[str, ...]) -> list[int]:
    """Where those of ``columns`` that are there are in ``names``; the files of a set mostly have the same."""
    places = {name: number for number, name in reversed(list(enumerate(names)))}
    return [places[name] for name in columns if name in places]


class LeanFile(pq.ParquetFile):  # type: ignore[misc]
    """A `pyarrow.parquet.ParquetFile` that does not look at the path of every column until columns are named.

    That takes as long as reading the footer, and is of no use where all columns are read. Where pyarrow does it under
    another name one day, this changes nothing.
    """

    _paths: Any = None

    def _build_nested_paths(self) -> None:
        return None

    @property
    def _nested_paths_by_prefix(self) -> Any:
        if self._paths is None:
            self._paths = super()._build_nested_paths()
        return self._paths

    @_nested_paths_by_prefix.setter
    def _nested_paths_by_prefix(self, paths: Any) -> None:
        self._paths = paths


def open_source(path: str) -> Any:
    """A file that pyarrow can read: one of its own where ``path`` is local, else fsspec's without read-ahead."""
    if not is_local_path(path):
        system, name = file_system(path)
        return system.open(name, "rb", cache_type="none")
    local = path.removeprefix("file://")
    if os.path.getsize(local) > WHOLE_FILE_BYTES:
        return pa.OSFile(local)
    with open(local, "rb") as file:
        return pa.BufferReader(file.read())


@contextmanager
def parquet_errors(path: str) -> Iterator[None]:
    """Turn what pyarrow and storage raise while a file is read into `CorruptInput` or `StorageError`."""
    try:
        yield
    except (PipelineError, FileNotFoundError):
        raise
    except Exception as error:
        if is_storage_error(error) and not is_bare(error):
            raise StorageError(
                "an input file cannot be read",
                where=path,
                found=f"{type(error).__name__}: {error}",
                next_step="check permissions and the storage, then run or resume",
            ) from error
        if not isinstance(error, (pa.ArrowException, OSError)):
            raise
        raise _corrupt(path, error) from error


@contextmanager
def open_parquet(path: str, *, columns: int) -> Iterator[pq.ParquetFile]:
    """An open Parquet file whose reading takes memory for pages and one batch, not for its row groups.

    Without ``buffer_size`` pyarrow reads whole column chunks of a row group: a group of 2 M rows × 28 float32 (229 MB)
    took 413 MB of resident memory at its peak; with it 189 MB, for a batch of 65,536 rows, and no more time (measured).

    :param columns: how many will be read.
    :raises CorruptInput: when it is no Parquet file, truncated, or encrypted.
    """
    with parquet_errors(path):
        source = open_source(path)
        try:
            buffer = min(
                BUFFER_BYTES if is_local_path(path) else REMOTE_BUFFER_BYTES,
                max(BUFFERS_BYTES // max(columns, 1), _SMALLEST_BUFFER),
            )
            file = LeanFile(source, buffer_size=buffer, pre_buffer=False, page_checksum_verification=True)
            yield file
        finally:
            source.close()


def read_footer(file: Located) -> pq.FileMetaData:
    """Footer of one file.

    :raises CorruptInput: when it is no Parquet file, truncated, or encrypted.
    """
    with parquet_errors(file.path):
        source = open_source(file.path) if not is_local_path(file.path) else pa.OSFile(file.path)
        try:
            return LeanFile(source, pre_buffer=False).metadata
        finally:
            source.close()


@dataclass(frozen=True)
class Layout:
    """How the Arrow columns of a file lie in its Parquet columns. One serves all files of the same schema."""

    schema: pa.Schema

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Arrow columns."""
        return tuple(self.schema.names)

    @cached_property
    def owners(self) -> np.ndarray:
        """int64 [Parquet columns]: the Arrow column each belongs to."""
        return np.repeat(np.arange(len(self.schema)), [_leaves(field.type) for field in self.schema])

    @cached_property
    def widths(self) -> np.ndarray:
        """float64 [Arrow columns]: as `Footer.widths`."""
        return np.array([_width(field.type) for field in self.schema], float)


def group_marks(metadata: pq.FileMetaData) -> tuple[str, ...]:
    """A digest for each number of row groups, from 1: of all that the footer says of the first so many of them.

    Writers that append to a file leave the row groups that are there where they are, and write a new footer.
    """
    running, marks = hashlib.sha256(), []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number).to_dict()
        running.update(json.dumps(group, sort_keys=True, default=str).encode())
        marks.append(running.hexdigest())
    return tuple(marks)


def digest_footer(
    file: Located, metadata: pq.FileMetaData, *, layout: Layout, keys: pa.Schema, condition: Filter | None
) -> Footer:
    """What planning needs of ``metadata``.

    :param keys: fields of the hive keys.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    weights, packed = _shares(groups, layout)
    return Footer(
        file=file,
        rows=np.array([group.num_rows for group in groups], np.int64),
        totals=np.array([group.total_byte_size for group in groups], np.int64),
        names=layout.names,
        weights=weights,
        packed=packed,
        widths=layout.widths,
        wanted=_wanted(file, groups, layout=layout, keys=keys, condition=condition),
    )


def key_value(text: str, arrow_type: pa.DataType) -> int | str | None:
    """The value of a hive key, from its folder's name."""
    if text == HIVE_NULL:
        return None
    return int(text) if pa.types.is_integer(arrow_type) else text


def _shares(groups: list[Any], layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    owners, count = layout.owners, len(layout.schema)
    plain, packed = np.zeros(count), np.zeros(count)
    for number in sorted({0, len(groups) // 2, len(groups) - 1} if groups else ()):
        chunks = [groups[number].column(leaf) for leaf in range(min(len(owners), groups[number].num_columns))]
        own = owners[: len(chunks)]
        plain += np.bincount(own, [chunk.total_uncompressed_size for chunk in chunks], count)
        packed += np.bincount(own, [chunk.total_compressed_size for chunk in chunks], count)
    return plain / max(plain.sum(), 1.0), packed / np.maximum(plain, 1.0)


def _leaves(arrow_type: pa.DataType) -> int:
    """Parquet columns an Arrow column is stored in; they follow each other."""
    if isinstance(arrow_type, pa.BaseExtensionType):
        return _leaves(arrow_type.storage_type)
    if pa.types.is_dictionary(arrow_type):
        return _leaves(arrow_type.value_type)
    return sum(_leaves(arrow_type.field(child).type) for child in range(arrow_type.num_fields)) or 1


def _width(arrow_type: pa.DataType) -> float:
    if pa.types.is_dictionary(arrow_type):
        return _width(arrow_type.index_type)
    try:
        return float(arrow_type.bit_width / 8)
    except ValueError:
        return 0.0


def _wanted(
    file: Located, groups: list[Any], *, layout: Layout, keys: pa.Schema, condition: Filter | None
) -> tuple[bool, ...]:
    if condition is None:
        return (True,) * len(groups)
    bounds = {}
    for name, text in file.keys:
        if name in keys.names and name in condition.columns:
            arrow_type = keys.field(name).type
            value = key_value(text, arrow_type)
            bounds[name] = Bounds(arrow_type, value, value, nulls=value is None, only_nulls=value is None)
    if not condition.may_keep(bounds):
        return (False,) * len(groups)
    columns = _flat_columns(groups, layout, condition)
    return tuple(
        condition.may_keep({**bounds, **{name: _bounds(group, leaf, kind) for name, (leaf, kind) in columns.items()}})
        for group in groups
    )


def _flat_columns(groups: list[Any], layout: Layout, condition: Filter) -> dict[str, tuple[int, pa.DataType]]:
    """Parquet column and type of the filter's columns that are stored in one of the same name."""
    columns = {}
    for number in (layout.names.index(name) for name in condition.columns if name in layout.names):
        leaf = int(np.searchsorted(layout.owners, number))
        name = layout.names[number]
        if groups and groups[0].column(leaf).path_in_schema == name:
            columns[name] = (leaf, layout.schema.field(number).type)
    return columns


def _bounds(group: Any, leaf: int, arrow_type: pa.DataType) -> Bounds:
    statistics = group.column(leaf).statistics
    if statistics is None:
        return Bounds(arrow_type)
    nulls = statistics.null_count if statistics.has_null_count else None
    low = high = None
    if statistics.has_min_max:
        try:
            low, high = statistics.min, statistics.max
            if isinstance(low, float) and (math.isnan(low) or math.isnan(high)):
                low = high = None
        except (ValueError, OverflowError, TypeError):
            # Text that was cut inside a character, a date past the year 9999: not knowing is always right.
            low = high = None
    only_nulls = nulls == group.num_rows and group.num_rows > 0
    return Bounds(arrow_type, low, high, nulls=nulls != 0, only_nulls=only_nulls)


def _corrupt(path: str, error: Exception) -> CorruptInput:
    head, tail, size = _ends(path)
    expected, step = "a whole Parquet file, which begins and ends with the bytes PAR1", "replace or remove the file"
    if tail == _ENCRYPTED_MAGIC or "encrypted" in str(error).lower() or "decrypt" in str(error).lower():
        return CorruptInput(
            "an input file is encrypted",
            where=path,
            found=str(error),
            expected="a Parquet file without encryption",
            next_step="decrypt it first",
        )
    if size == 0:
        message, found = "an input file is empty", "0 bytes"
    elif head == _MAGIC and tail != _MAGIC:
        message, found = "an input file is truncated", f"{size:,} bytes that begin as Parquet but do not end so"
    elif head != _MAGIC:
        message, found = "an input file is not a Parquet file", f"{size:,} bytes that begin with {head!r}"
        step = "remove it from the source (names that begin with . or _ are passed over), or convert it"
    else:
        message, found = "an input file is damaged", f"{type(error).__name__}: {error}"
    return CorruptInput(message, where=path, found=found, expected=expected, next_step=step)


def _ends(path: str) -> tuple[bytes, bytes, int]:
    """First and last four bytes, and the size."""
    try:
        source = open_source(path)
        try:
            size = source.seek(0, os.SEEK_END)
            size = source.tell() if size is None else size
            source.seek(0)
            head = source.read(4)
            source.seek(max(size - 4, 0))
            return bytes(head), bytes(source.read(4)), size
        finally:
            source.close()
    except (OSError, pa.ArrowException):
        return b"", b"", -1
