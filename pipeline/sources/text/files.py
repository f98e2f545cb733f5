"""Read ranges of bytes of text files, plain or compressed, and scan their rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipeline.common.rows import RowGroup
from pipeline.common.units import format_bytes
from pipeline.errors import CorruptInput
from pipeline.sources.locate import SourceFile
from pipeline.sources.reading_errors import reading_errors
from pipeline.sources.text.scan import BLOCK_BYTES, OVERLAP, Block, Dialect, Malformed, assemble, scan_block
from pipeline.storage.urls import file_system, is_local_path, with_storage_options

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of compressed files."""
MOST_UNPACKED = 256 << 20
"""Largest number of bytes of a compressed file after decompression: it is one row group, which no task can divide."""
SAMPLE_BYTES = 1 << 20
"""Bytes at the beginning of a file that tell the types of its columns."""
_UTF16 = {b"\xff\xfe": "UTF-16 (little endian)", b"\xfe\xff": "UTF-16 (big endian)"}
BOM = b"\xef\xbb\xbf"


@contextmanager
def text_errors(path: str) -> Iterator[None]:
    """Turn errors of storage and of decompression while reading a file into `StorageError` or `CorruptInput`."""

    def damage(error: Exception) -> CorruptInput | None:
        is_damage = isinstance(error, (pa.ArrowException, OSError))
        return damaged(path, f"{type(error).__name__}: {error}") if is_damage else None

    with reading_errors(path, damage):
        yield


def damaged(path: str, found: str, *, next_step: str = "replace or remove the file") -> CorruptInput:
    """Build the error for a text file whose rows cannot be told apart."""
    return CorruptInput(
        "an input file is damaged, or of another format", where=path, found=found, expected="a whole text file",
        next_step=next_step,
    )  # fmt: skip


def compression_of(head: bytes) -> str | None:
    """Return the compression of a file that begins with ``head``."""
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


def read_head(path: str, count: int = SAMPLE_BYTES) -> bytes:
    """Return the first bytes of a file, decompressed.

    :raises CorruptInput: for UTF-16, and a file that cannot be decompressed.
    """
    with text_errors(path), open_text(path) as file:
        data = read_exactly(file, count)
    for mark, name in _UTF16.items():
        if data.startswith(mark):
            raise CorruptInput(
                "an input file has an encoding that cannot be read",
                where=path,
                found=name,
                expected="UTF-8",
                next_step=f"convert it: iconv -f {name.split(' ')[0]} -t UTF-8",
            )
    return data


@contextmanager
def open_text(path: str, *, start: int = 0) -> Iterator[Any]:
    """Open a file for reading from the byte ``start`` on; a compressed one always from the beginning, decompressed."""
    source = _open(path)
    try:
        compression = compression_of(bytes(source.read(4)))
        source.seek(0 if compression else start)
        if compression is None:
            yield source
            return
        raw = source if isinstance(source, pa.NativeFile) else pa.PythonFile(source, mode="r")
        with pa.CompressedInputStream(raw, compression) as unpacked:
            yield unpacked
    finally:
        source.close()


def _open(path: str) -> Any:
    if is_local_path(path):
        return pa.OSFile(path.removeprefix("file://"))
    system, name = file_system(path)
    return system.open(name, "rb", cache_type="none")


def read_exactly(file: Any, count: int) -> bytes:
    """Return the next ``count`` bytes, fewer only at the end of the file."""
    parts: list[bytes] = []
    while count > 0 and (part := bytes(file.read(count))):
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def scan_files(
    files: Sequence[SourceFile], dialect: Dialect, *, has_header: bool, threads: int
) -> Iterator[tuple[RowGroup, ...] | CorruptInput | FileNotFoundError]:
    """Yield the row groups of each file, or its error. All blocks of all files are scanned at the same time.

    Bytes of the row groups are those of the text.
    """
    tasks = [(number, start) for number, file in enumerate(files) for start in range(0, max(file.size, 1), BLOCK_BYTES)]
    work = with_storage_options(lambda task: _scan_task(files[task[0]], task[1], dialect))
    with ThreadPoolExecutor(max(1, min(threads, (os.cpu_count() or 1), len(tasks))), thread_name_prefix="scan") as pool:
        results: Iterable[Any] = pool.map(work, tasks) if len(tasks) > 1 else map(work, tasks)
        iterator = iter(results)
        for file in files:
            parts = [next(iterator) for _ in range(0, max(file.size, 1), BLOCK_BYTES)]
            yield _groups(file, parts, has_header=has_header)


def _scan_task(file: SourceFile, start: int, dialect: Dialect) -> Any:
    """Return the scan of a block; of a compressed file all its blocks, for the first one; or the error."""
    try:
        with text_errors(file.path):
            with open_text(file.path, start=max(0, start - OVERLAP)) as source:
                if isinstance(source, pa.CompressedInputStream):
                    return None if start else _scan_stream(file, source, dialect)
                before = min(start, OVERLAP)
                data = read_exactly(source, before + min(BLOCK_BYTES, file.size - start))
            return scan_block(data, start, before=before, dialect=dialect)
    except (CorruptInput, FileNotFoundError) as error:
        return error


def _scan_stream(file: SourceFile, source: Any, dialect: Dialect) -> list[Block]:
    blocks, before, start = [], b"", 0
    while data := read_exactly(source, BLOCK_BYTES):
        blocks.append(scan_block(before + data, start, before=len(before), dialect=dialect))
        start, before = start + len(data), data[-OVERLAP:]
        if start > MOST_UNPACKED:
            raise CorruptInput(
                "a compressed input file is too large for one partition",
                where=file.path,
                found=f"more than {format_bytes(MOST_UNPACKED)} when decompressed",
                expected="smaller compressed files, or plain text, which is read in parts",
                next_step="decompress it, or split it into several files",
            )
    return blocks


def _groups(
    file: SourceFile, parts: list[Any], *, has_header: bool
) -> tuple[RowGroup, ...] | CorruptInput | FileNotFoundError:
    error = next((part for part in parts if isinstance(part, Exception)), None)
    if isinstance(error, (CorruptInput, FileNotFoundError)):
        return error
    is_compressed = isinstance(parts[0], list)
    blocks: list[Block] = parts[0] if is_compressed else parts
    try:
        groups = assemble(blocks, size=blocks[-1].stop if blocks else 0)
    except Malformed as malformed:
        step = "fix the file; if its quotes are plain text, set source.csv.quote: null"
        return damaged(file.path, str(malformed), next_step=step)
    rows = [group.rows for group in groups]
    if has_header:
        first = next((number for number, count in enumerate(rows) if count), None)
        if first is not None:
            rows[first] -= 1
    if is_compressed:
        size = sum(group.bytes for group in groups)
        return (RowGroup(sum(rows), size, file.size, lines=sum(group.lines for group in groups)),)
    return tuple(
        RowGroup(count, group.bytes, group.bytes, lines=group.lines)
        for count, group in zip(rows, groups, strict=True)
    )  # fmt: skip
