"""DuckDB. Only one process can have a file open for writing: others wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.sinks.sql.database import LOCK_SECONDS, Database, ExistingColumn, TableName, quoted
from pipeline.storage.urls import storage_errors

_PAUSE = 0.05
"""Seconds between two attempts to open a file that another process writes."""
_ROWS = "pipeline_rows"
"""Name under which Arrow tables are seen by statements."""


class DuckDB(Database):
    """A file of DuckDB."""

    kind = "duckdb"
    title = "DuckDB"
    handled = (duckdb.Error,)

    def __init__(
        self,
        path: str,
        *,
        where: str,
        read_only: bool = False,
        lock_seconds: float = LOCK_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        super().__init__(where=where)
        end = clock() + lock_seconds
        with self.errors(), storage_errors(path):
            if not read_only:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    self._connection = duckdb.connect(path, read_only=read_only)
                    break
                except duckdb.IOException as error:
                    if "lock" not in str(error) or clock() >= end:
                        raise
                pause(_PAUSE)

    def begin(self, lock: str) -> None:
        """Begin a transaction. No other process has the file open."""
        self.run("BEGIN")

    def commit(self) -> None:
        """Commit the transaction."""
        self.run("COMMIT")

    def rollback(self) -> None:
        """Roll the transaction back, if there is one."""
        try:
            self._connection.execute("ROLLBACK")
        except duckdb.Error:
            return  # none was begun, or a failed statement has ended it

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def run(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Execute a statement."""
        with self.errors():
            return self._connection.execute(statement, list(parameters)).fetchall()

    def columns(self, table: TableName) -> dict[str, ExistingColumn] | None:
        """Return the columns; see `Database.columns`."""
        rows = self.run(
            "SELECT column_name, data_type, column_default FROM duckdb_columns() WHERE table_name = ? AND NOT internal "
            "AND database_name = current_database() AND schema_name = coalesce(nullif(?, ''), current_schema()) "
            "ORDER BY column_index",
            (table.name, table.schema),
        )
        return {name: ExistingColumn(kind, has_default=default is not None) for name, kind, default in rows} or None

    def create_staging(self, name: str, columns: str) -> str:
        """Create a temporary table."""
        self.run(f"CREATE TEMP TABLE {quoted(name)} ({columns})")
        return f"temp.{quoted(name)}"

    def fill(self, staging: str, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        """Insert whole Arrow tables."""
        for table in tables:
            with self.errors():
                self._connection.register(_ROWS, table)
                try:
                    self._connection.execute(f"INSERT INTO {staging} SELECT * FROM {_ROWS}")
                finally:
                    self._connection.unregister(_ROWS)

    def is_conflict(self, error: BaseException) -> bool:
        """True for a constraint that the rows break."""
        return isinstance(error, (duckdb.ConstraintException, duckdb.ConversionException))
