"""Open Parquet files for reading, and explain errors of unreadable files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptInput, PipelineError, SchemaDrift
from pipeline.sources.parquet.fetching import fits
from pipeline.sources.reading_errors import reading_errors
from pipeline.sources.types import read_type
from pipeline.storage.urls import file_system, is_local_path

WHOLE_FILE_BYTES = 1 << 20
"""Local files up to this size are read at once: a 500-row file takes 0.45 ms instead of 0.55 ms (measured)."""
BUFFER_BYTES = 1 << 16
"""Read buffer per column of a local file."""
REMOTE_BUFFER_BYTES = 1 << 22
"""Read buffer per column of a remote file, where each fill is one request."""
BUFFERS_BYTES = 1 << 27
"""Limit for all read buffers of a file together. Wide tables get smaller buffers."""
_SMALLEST_BUFFER = 1 << 12
MAGIC, _ENCRYPTED_MAGIC = b"PAR1", b"PARE"
TAIL_BYTES = 1 << 16
"""Bytes at the end of a file that are read first. Most footers are shorter, so that one read is enough."""
_SMALLEST_FILE = 12
"""Bytes of the magic twice, and of the footer's length."""
_SIGNATURE_BYTES = 28
"""Nonce and tag after a plaintext footer that is signed: the file has encrypted columns, whose metadata ends the
process of the reader (seen in pyarrow 26)."""
READ_OPTIONS: dict[str, Any] = {"coerce_int96_timestamp_unit": "us"}
"""Options that decide types. INT96 timestamps are read in microseconds: nanoseconds end in 2262, and 9999-12-31, the
usual "valid for ever", would become another date."""


class LeanFile(pq.ParquetFile):  # type: ignore[misc]
    """A `pyarrow.parquet.ParquetFile` that builds the map of column paths only if columns are named.

    Building the map takes as long as reading the footer, and is useless if all columns are read. If pyarrow renames
    the method, this class has no effect.
    """

    _paths: Any = None
    is_read_by_group = False
    """True if a row group is read whole when its rows are asked for: they should be asked for group by group."""

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
    """Open a file for pyarrow: a pyarrow file if ``path`` is local, else an fsspec file without read-ahead."""
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
    """Turn errors of pyarrow and storage while reading a file into `CorruptInput`, `SchemaDrift` or `StorageError`."""

    def damage(error: Exception) -> CorruptInput | SchemaDrift | None:
        if isinstance(error, pa.ArrowNotImplementedError) or _FIXED_LISTS in str(error):
            return _unsupported(path, error)
        return _corrupt(path, error) if isinstance(error, (pa.ArrowException, OSError)) else None

    with reading_errors(path, damage):
        yield


@contextmanager
def open_parquet(
    path: str, *, columns: Sequence[str], groups: range | None = None, content: bytes | None = None
) -> Iterator[LeanFile]:
    """Open a Parquet file so that reading needs memory for pages and one batch, not for row groups.

    Without ``buffer_size``, pyarrow reads whole column chunks of a row group. A group of 2 M rows × 28 float32 (229 MB)
    then had a peak of 413 MB resident memory. With ``buffer_size`` and batches of 65,536 rows it was 189 MB, in the
    same time (measured). Row groups of remote files that `fetching.fits` are read whole, if each is read alone.

    :param columns: names of the columns that will be read.
    :param groups: numbers of the row groups that will be read, one by one. Default: any, and a buffer for each column.
    :param content: the file, if it was read already.
    :raises CorruptInput: if the file is not a Parquet file, truncated, or encrypted.
    """
    is_local = content is not None or is_local_path(path)
    with parquet_errors(path):
        source = open_source(path) if content is None else pa.BufferReader(content)
        try:
            most = BUFFERS_BYTES // max(len(columns), 1)
            buffer = min(BUFFER_BYTES if is_local else REMOTE_BUFFER_BYTES, max(most, _SMALLEST_BUFFER))
            options = {"page_checksum_verification": True, **READ_OPTIONS}
            file = LeanFile(source, buffer_size=buffer, pre_buffer=False, **options)
            if not is_local and groups is not None and fits(file.metadata, _present(groups, file.metadata), columns):
                file = LeanFile(source, metadata=file.metadata, pre_buffer=True, **options)
                file.is_read_by_group = True
            yield file
        finally:
            source.close()


def _present(groups: range, metadata: pq.FileMetaData) -> range:
    """Return ``groups`` without those that the file does not have."""
    return range(groups.start, min(groups.stop, metadata.num_row_groups))


def read_footer(path: str) -> pq.FileMetaData:
    """Return the footer of one file; see `footer_bytes` and `parse_footer` for errors.

    The result must not be used further before `FooterGuard.check`, if the file is unknown.
    """
    return parse_footer(path, footer_bytes(path))


def footer_bytes(path: str) -> bytes:
    """Return the bytes from the first of the footer to the end of the file; see `last_bytes` for errors."""
    return footer_of(last_bytes(path))


def footer_of(last: bytes) -> bytes:
    """Return the footer within the result of `last_bytes`."""
    return last[-_footer_length(last) :]


def _footer_length(last: bytes) -> int:
    return int.from_bytes(last[-8:-4], "little") + 8


def last_bytes(path: str) -> bytes:
    """Return the last bytes of a file: `TAIL_BYTES` or the whole file, and more if the footer is longer.

    :raises CorruptInput: if the file is not a Parquet file, truncated, or its footer is encrypted.
    :raises FileNotFoundError: if the file does not exist.
    """
    with parquet_errors(path):
        if is_local_path(path):
            with open(path.removeprefix("file://"), "rb", buffering=0) as file:
                return _read_last_bytes(path, file)
        with open_source(path) as source:
            return _read_last_bytes(path, source)


def _read_last_bytes(path: str, file: Any) -> bytes:
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(max(size - TAIL_BYTES, 0))
    tail = bytes(file.read(TAIL_BYTES))
    if size < _SMALLEST_FILE or tail[-4:] != MAGIC:
        raise _corrupt(path, ValueError("no footer at the end of the file"))
    length = _footer_length(tail)
    if length > size - len(MAGIC):
        raise _corrupt(path, ValueError(f"a footer of {length:,} bytes in a file of {size:,} bytes"))
    if length > len(tail):
        file.seek(size - length)
        tail = bytes(file.read(length - len(tail))) + tail
    if len(tail) < min(length, size):
        raise _corrupt(path, ValueError(f"{len(tail):,} bytes where the footer should have {length:,}"))
    return tail


def parse_footer(path: str, footer: bytes) -> pq.FileMetaData:
    """Parse the result of `footer_bytes`, and check that it does not contradict itself.

    :raises CorruptInput: if the footer is damaged, or columns are encrypted.
    """
    try:
        metadata = LeanFile(pa.BufferReader(MAGIC + footer), pre_buffer=False).metadata
    except Exception as error:
        raise _corrupt(path, error) from error
    signature = len(footer) - 8 - metadata.serialized_size
    if signature == _SIGNATURE_BYTES:
        raise _encrypted(path, "a signed footer: columns are encrypted")
    contradiction = _contradiction(metadata)
    if contradiction:
        raise damaged_footer(path, contradiction)
    return metadata


def _contradiction(metadata: pq.FileMetaData) -> str:
    """Return the first contradiction between a footer's figures; empty if there is none."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = len(metadata.schema)
    rows = 0
    for number, group in enumerate(groups):
        if group.num_rows < 0 or group.total_byte_size < 0:
            return f"row group {number} has {group.num_rows:,} rows, {group.total_byte_size:,} bytes"
        if group.num_columns != columns:
            return f"row group {number} has {group.num_columns:,} columns, the schema has {columns:,}"
        rows += group.num_rows
    # Some writers leave the number of the file at 0; readers go by the row groups.
    if metadata.num_rows not in (0, rows):
        return f"{metadata.num_rows:,} rows in all, {rows:,} in its row groups"
    return ""


def _encrypted(path: str, found: str) -> CorruptInput:
    return CorruptInput(
        "an input file is encrypted",
        where=path,
        found=found,
        expected="a Parquet file without encryption",
        next_step="decrypt it first, or remove it from the source",
    )


def damaged_footer(path: str, found: str) -> CorruptInput:
    """Build the error for a file whose footer cannot be used."""
    return CorruptInput(
        "an input file is damaged",
        where=path,
        found=f"in its footer: {found}",
        expected="a whole Parquet file",
        next_step="replace or remove the file",
    )


@contextmanager
def footer_errors(path: str) -> Iterator[None]:
    """Turn every error of code that reads figures of a footer into `CorruptInput`."""
    try:
        yield
    except (PipelineError, FileNotFoundError):
        raise
    except Exception as error:
        raise damaged_footer(path, f"{type(error).__name__}: {error}") from error


def arrow_schema(metadata: pq.FileMetaData, *, path: str) -> pa.Schema:
    """Return the columns of a file in the types in which they are read; the same at planning, reading and checking.

    A footer's own ``schema.to_arrow_schema()`` knows no extension types and other timestamps.

    :param path: file of the footer, for errors.
    :raises SchemaDrift: if Arrow has no type for a column.
    :raises CorruptInput: if the footer holds no columns that Arrow understands.
    """
    with parquet_errors(path):
        schema = LeanFile(pa.BufferReader(b""), metadata=metadata, **READ_OPTIONS).schema_arrow
        return pa.schema([field.with_type(read_type(field.type)) for field in schema], schema.metadata)


_FIXED_LISTS = "Expected all lists to be of size"
"""pyarrow before 26 says this of a null in a column of lists of a fixed size."""


def _unsupported(path: str, error: Exception) -> SchemaDrift:
    upgrade = ", or upgrade pyarrow to 26" if _FIXED_LISTS in str(error) else ""
    return SchemaDrift(
        "an input file has a column of a type that cannot be read",
        where=path,
        found=str(error),
        expected="columns that pyarrow reads",
        next_step=f"leave the column out of source.columns, or write the file anew with another type{upgrade}",
    )


def _corrupt(path: str, error: Exception) -> CorruptInput:
    head, tail, size = _ends(path)
    expected, step = "a whole Parquet file, which begins and ends with the bytes PAR1", "replace or remove the file"
    if tail == _ENCRYPTED_MAGIC or "encrypted" in str(error).lower() or "decrypt" in str(error).lower():
        return _encrypted(path, str(error))
    if size == 0:
        message, found = "an input file is empty", "0 bytes"
    elif head == MAGIC and tail != MAGIC:
        message, found = "an input file is truncated", f"{size:,} bytes that begin as Parquet but do not end so"
    elif head != MAGIC:
        message, found = "an input file is not a Parquet file", f"{size:,} bytes that begin with {head!r}"
        step = "remove it from the source (names that begin with . or _ are passed over), or convert it"
    else:
        message, found = "an input file is damaged", f"{type(error).__name__}: {error}"
    return CorruptInput(message, where=path, found=found, expected=expected, next_step=step)


def _ends(path: str) -> tuple[bytes, bytes, int]:
    """Return the first and last four bytes, and the size; -1 if the file cannot be read."""
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
