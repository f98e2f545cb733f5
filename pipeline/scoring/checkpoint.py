"""Write a checkpoint file: Parquet with row groups of a bounded size, page checksums and a checksum of its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.checksum import ChecksumFile
from pipeline.common.stopwatch import Stopwatch
from pipeline.errors import PipelineError
from pipeline.jobs.receipts import DataFile
from pipeline.plan.memory import MOST_GROUP_BYTES
from pipeline.storage.store import Store
from pipeline.storage.urls import storage_errors


class _AbandonedError(PipelineError):
    """Signal to the store to remove the file that is being written."""


class CheckpointWriter:
    """A writer of tables of one schema to one new file. No file is created before the first row."""

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        schema: pa.Schema,
        metadata: Mapping[str, str],
        compression: str = "snappy",
        row_group_rows: int = 1 << 20,
        row_group_bytes: int = MOST_GROUP_BYTES,
    ) -> None:
        """Prepare a file; nothing is written yet.

        :param row_group_bytes: decoded bytes that are held at most, a table more or less, until a row group is written.
        """
        self.name = name
        self.watch = Stopwatch()
        """Wall time of all calls."""
        self.rows = 0
        self._store = store
        self._schema = schema.with_metadata({**(schema.metadata or {}), **metadata})
        self._options: dict[str, Any] = {
            "compression": compression,
            "write_page_checksum": True,
        }
        self._row_group_rows = row_group_rows
        self._row_group_bytes = row_group_bytes
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._waiting_bytes = 0
        self._context: AbstractContextManager[IO[bytes]] | None = None
        self._file: ChecksumFile | None = None
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Append the rows of ``table``."""
        with self.watch:
            if table.num_rows:
                self._waiting.append(table)
                self._waiting_rows += table.num_rows
                self._waiting_bytes += table.nbytes
                self.rows += table.num_rows
            if self._waiting_rows >= self._row_group_rows or self._waiting_bytes >= self._row_group_bytes:
                self._write_waiting()

    def finish(self) -> DataFile | None:
        """Write the remaining rows and make the file durable. Return None if there were no rows, and so no file."""
        with self.watch:
            self._write_waiting()
            if self._context is None or self._file is None or self._writer is None:
                return None
            with storage_errors(self._store.url(self.name)):
                self._writer.close()
            context, self._context = self._context, None
            context.__exit__(None, None, None)
        return DataFile(self.name, self.rows, self._file.size, self._file.checksum)

    def abandon(self) -> None:
        """Remove the file, whether it is finished or not. Never raises."""
        self._waiting.clear()
        if self._context is None:
            if self._file is not None:
                with suppress(Exception):
                    self._store.remove(self.name)
            return
        context, self._context = self._context, None
        if self._file is not None:
            self._file.is_abandoned = True
        if self._writer is not None:
            with suppress(Exception):
                self._writer.close()
        error = _AbandonedError("abandoned")
        with suppress(Exception):
            context.__exit__(_AbandonedError, error, None)

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        self._waiting.clear()
        self._waiting_rows = self._waiting_bytes = 0
        with storage_errors(self._store.url(self.name)):
            if self._writer is None:
                self._open_file()
            assert self._writer is not None
            self._writer.write_table(table, row_group_size=table.num_rows)

    def _open_file(self) -> None:
        self._context = self._store.open_output(self.name)
        self._file = ChecksumFile(self._context.__enter__())
        dictionaries = dictionary_columns(self._schema)
        self._writer = pq.ParquetWriter(self._file, self._schema, use_dictionary=dictionaries, **self._options)


def dictionary_columns(schema: pa.Schema) -> list[str]:
    """Return the columns worth a Parquet dictionary: text, and types that have few values.

    Trying a dictionary on numbers, which rarely repeat, costs 5 times as much as writing them (measured).
    """
    types = schema.types
    repeating = {kind for kind in set(types) if _has_few_values(kind)}
    return [name for name, kind in zip(schema.names, types, strict=True) if kind in repeating]


def _has_few_values(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_integer(kind):
        return bool(kind.bit_width <= 16)
    tests = (types.is_dictionary, types.is_string, types.is_large_string, types.is_string_view, types.is_date)
    return any(test(kind) for test in tests)
