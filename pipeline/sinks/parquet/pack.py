"""Assign the checkpoint files of a manifest to published files, and merge small checkpoint files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.checksum import ChecksumFile, short
from pipeline.errors import StateCorrupt
from pipeline.jobs.manifest import Manifest, ManifestFile
from pipeline.sinks import PublishedFile
from pipeline.sinks.parquet.layout import file_name
from pipeline.storage.store import Store
from pipeline.storage.urls import as_storage_error, is_bare

_GROUP_ROWS = 1 << 20
_GROUP_BYTES = 64 << 20
"""Bytes of a row group in merged files, unless ``_GROUP_ROWS`` is reached first. Memory is a few times these bytes."""


@dataclass(frozen=True)
class Piece:
    """One file to publish."""

    name: str
    sources: tuple[ManifestFile, ...]
    """Checkpoint files of this piece, in order. One is linked or copied, several are merged, none: an empty file."""


def make_pieces(manifest: Manifest, *, target: int | None, attempt: str = "") -> tuple[Piece, ...]:
    """Assign the files of ``manifest`` to published files, in source order.

    Neighbours are merged up to ``target`` bytes. A file of at least half the target is not merged, and no file is
    split: the largest partition is the upper bound. Output without rows is one file without rows, for its schema.
    """
    if not manifest.files:
        return (Piece(file_name("00000", manifest, attempt=attempt), ()),)
    # Files of different rounds are not merged: the metadata of a file names one model version.
    groups: list[list[ManifestFile]] = []
    room = 0.0
    for file in manifest.files:
        is_small = target is not None and file.bytes < target / 2
        if is_small and groups and file.bytes <= room and file.round == groups[-1][-1].round:
            groups[-1].append(file)
            room -= file.bytes
        else:
            groups.append([file])
            room = target - file.bytes if is_small and target else 0.0
    return tuple(Piece(file_name(_label(group[0]), manifest, attempt=attempt), tuple(group)) for group in groups)


def _label(file: ManifestFile) -> str:
    """Return the id of the partition, after the first round with the round's number: ``r1.00003``."""
    return f"r{file.round}.{file.partition}" if file.round else file.partition


def check_sources(manifest: Manifest, *, store: Store) -> None:
    """Check that every checkpoint file of ``manifest`` exists with the size in its receipt.

    :raises StateCorrupt: when a file is missing or has another size.
    """
    for file in manifest.files:
        try:
            size: int | None = store.size(file.name)
        except FileNotFoundError:
            size = None
        if size != file.bytes:
            raise StateCorrupt(
                "a checkpoint file is not what its receipt says",
                where=store.url(file.name),
                found="no file" if size is None else f"{size:,} bytes",
                expected=f"{file.bytes:,} bytes",
                next_step=f"remove the receipt of partition {file.partition} and resume: it is scored again",
            )


def linked_files(piece: Piece) -> PublishedFile:
    """Return the published file of a piece with one source."""
    (file,) = piece.sources
    return PublishedFile(piece.name, file.rows, file.bytes, file.checksum)


def write_merged(
    piece: Piece, *, source: Store, schema: pa.Schema, compression: str, output: IO[bytes]
) -> PublishedFile:
    """Write the rows of all sources of ``piece`` to ``output``, in order. Types and metadata do not change.

    :raises StateCorrupt: when the pages of a checkpoint file do not match their checksums.
    """
    if piece.sources:
        with source.open_input(piece.sources[0].name) as file:
            schema = pq.read_schema(file)
    counted = ChecksumFile(output)
    rows = 0
    with pq.ParquetWriter(
        pa.PythonFile(counted, "w"), schema, compression=compression, write_page_checksum=True
    ) as writer:
        for table in _tables(piece.sources, store=source):
            writer.write_table(table.unify_dictionaries(), row_group_size=_GROUP_ROWS)
            rows += table.num_rows
    return PublishedFile(piece.name, rows, counted.size, counted.checksum)


def _tables(files: Sequence[ManifestFile], *, store: Store) -> Iterator[pa.Table]:
    """Yield all rows as tables that have at least `_GROUP_ROWS` rows or `_GROUP_BYTES` bytes, except the last."""
    held: list[pa.Table] = []
    rows = size = 0
    for file in files:
        for table in read_row_groups(file, store=store):
            held.append(table)
            rows, size = rows + table.num_rows, size + table.nbytes
            if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
                yield pa.concat_tables(held)
                held, rows, size = [], 0, 0
    if held:
        yield pa.concat_tables(held)


def read_row_groups(file: ManifestFile, *, store: Store) -> Iterator[pa.Table]:
    """Yield the rows of a checkpoint file, one table per row group.

    :raises StateCorrupt: if the file is damaged.
    """
    try:
        with (
            store.open_input(file.name) as opened,
            closing(pq.ParquetFile(opened, page_checksum_verification=True)) as parquet,
        ):
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and not is_bare(error):
            raise as_storage_error(error, where=store.url(file.name)) from error
        raise StateCorrupt(
            "a checkpoint file is damaged",
            where=store.url(file.name),
            found=str(error),
            expected=short(file.checksum),
            next_step=f"remove the receipt of partition {file.partition} and resume: it is scored again",
        ) from error
