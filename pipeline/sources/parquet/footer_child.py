"""Read footers and a few rows in a process of its own, which a damaged file may end.

pyarrow lets C++ exceptions of some calls through, which ends the process. This module imports pyarrow alone, so that
the process starts fast.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MAGIC = b"PAR1"
SAMPLED_ROWS = 1024
"""Rows of a row group that are decoded to measure widths."""
SAMPLED_BYTES = 1 << 25
"""Decoded bytes after which no more rows are measured."""
IDLE_SECONDS = 30.0
"""Seconds without a request after which the process ends."""


def serve(connection: Connection) -> None:
    """Answer requests until the parent closes the connection, or asks nothing for `IDLE_SECONDS`.

    A request is a pickled tuple: the name of a function of this module, and its arguments. The answer is JSON: the
    result, or the error as text.
    """
    _be_quiet()
    with suppress(EOFError, OSError):
        while connection.poll(IDLE_SECONDS):
            connection.send_bytes(_answer(connection.recv_bytes()))


def _answer(request: bytes) -> bytes:
    try:
        name, *arguments = pickle.loads(request)
        answer: dict[str, Any] = {"result": _FUNCTIONS[name](*arguments)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    return json.dumps(answer).encode()


def exercise(footer: bytes, columns: Collection[str], is_digested: bool) -> None:
    """Make every call that planning makes on a footer.

    :param footer: the bytes from the first of the footer to the end of the file.
    :param columns: Arrow columns whose statistics are read.
    :param is_digested: True if the metadata of all row groups is read.
    """
    file = pq.ParquetFile(pa.BufferReader(MAGIC + footer), pre_buffer=False)
    metadata, _ = file.metadata, file.schema_arrow
    names = [name.partition(".")[0] for name in _paths(metadata)]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    for number in sorted({0, len(groups) // 2, len(groups) - 1} if groups else ()):
        for leaf in range(groups[number].num_columns):
            chunk = groups[number].column(leaf)
            _ = chunk.total_uncompressed_size, chunk.total_compressed_size, chunk.encodings
    leaves = [leaf for leaf, name in enumerate(names) if name in columns]
    for group in groups:
        if is_digested:
            group.to_dict()
        for leaf in leaves:
            _bounds(group.column(leaf))


def decoded_widths(source: Any, group: int, columns: Collection[str]) -> list[float]:
    """Return the mean bytes per row of each of ``columns``, decoded, over the first rows of a row group.

    :param source: path of a local file, or an open file.
    :param group: number of the row group.
    """
    rows, sizes = 0, dict.fromkeys(columns, 0)
    with pq.ParquetFile(source, buffer_size=1 << 16, pre_buffer=False) as file:
        for batch in file.iter_batches(64, row_groups=[group], columns=list(columns), use_threads=False):
            rows += batch.num_rows
            for name in columns:
                sizes[name] += batch.column(name).nbytes
            if rows >= SAMPLED_ROWS or sum(sizes.values()) > SAMPLED_BYTES:
                break
    return [sizes[name] / max(rows, 1) for name in columns]


_FUNCTIONS: dict[str, Callable[..., Any]] = {"exercise": exercise, "decoded_widths": decoded_widths}


def _paths(metadata: pq.FileMetaData) -> list[str]:
    return [metadata.schema.column(leaf).path for leaf in range(len(metadata.schema))]


def _bounds(chunk: Any) -> None:
    _ = chunk.path_in_schema
    statistics = chunk.statistics
    if statistics is not None and statistics.has_min_max:
        with suppress(ValueError, OverflowError, TypeError):
            _ = statistics.min, statistics.max, statistics.null_count


def _be_quiet() -> None:
    """Suppress the message of a C++ exception, and core dumps."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
