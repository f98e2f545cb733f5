"""Postgres, with the ADBC driver: rows are copied in binary form, several connections at a time.

A publication copies its rows into a staging table ``pipeline_stage_<tag>`` beside the target, one transaction a file,
with a mark in ``pipeline_staged``. Both tables are unlogged: a crash of the server empties both, and the rows are
staged again. The commit moves the rows inside the server.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import adbc_driver_manager
import pyarrow as pa
from adbc_driver_postgresql import dbapi

from pipeline.sinks.sql.database import (
    LOCK_SECONDS,
    ExistingColumn,
    StagingDatabase,
    TableName,
    column_list,
    quoted,
    text_literal,
)
from pipeline.sinks.types import ColumnType

_SETUP = "pipeline setup"
"""Lock of those that create tables: ``IF NOT EXISTS`` alone fails when two create one at a time."""
_COLUMNS = """
SELECT a.attname::text, format_type(a.atttypid, a.atttypmod)::text,
       (a.attidentity <> '' OR a.attgenerated <> '' OR a.atthasdef)
FROM pg_attribute a WHERE a.attrelid = to_regclass({table}) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
_CONFLICTS = ("22", "23")
"""First digits of the SQLSTATEs that blame the rows: data exceptions and constraints."""
_opening = threading.Lock()


class Postgres(StagingDatabase):
    """A connection to a server."""

    kind = "postgresql"
    title = "Postgres"
    handled = (adbc_driver_manager.Error,)

    def __init__(self, url: str, *, where: str, lock_seconds: float = LOCK_SECONDS) -> None:
        super().__init__(where=where)
        with self.errors(), _opening:
            self._connection = dbapi.connect(url, autocommit=True)
        self._is_open = False
        milliseconds = max(1, round(1000 * lock_seconds))
        self.run(f"SET lock_timeout = '{milliseconds}ms'")

    def begin(self, lock: str) -> None:
        """Begin a transaction, and wait for other publishers to the table."""
        self._begin()
        self.run(f"SELECT pg_advisory_xact_lock(hashtextextended({text_literal(lock)}, 0))::text")

    def _begin(self) -> None:
        with self.errors():
            self._connection.adbc_connection.set_autocommit(False)
        self._is_open = True

    def commit(self) -> None:
        """Commit the transaction."""
        with self.errors():
            self._connection.commit()
            self._connection.adbc_connection.set_autocommit(True)
        self._is_open = False

    def rollback(self) -> None:
        """Roll the transaction back, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        with self.errors():
            self._connection.rollback()
            self._connection.adbc_connection.set_autocommit(True)

    def close(self) -> None:
        """Close the connection. The server rolls back what is open."""
        self._connection.close()

    def run(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Execute a statement. Parameters become literals: the driver would have to know their types."""
        for value in parameters:
            literal = text_literal(value) if isinstance(value, str) else repr(value)
            statement = statement.replace("?", literal.replace("?", "\0"), 1)
        with self.errors(), self._connection.cursor() as cursor:
            cursor.execute(statement.replace("\0", "?"))
            return cursor.fetchall() if cursor.description else []

    def columns(self, table: TableName) -> dict[str, ExistingColumn] | None:
        """Return the columns; see `Database.columns`."""
        rows = self.run(_COLUMNS.format(table=text_literal(table.sql)))
        return {name: ExistingColumn(kind, has_default=has_default) for name, kind, has_default in rows} or None

    def create_staging(self, name: str, columns: str) -> str:
        """Create a temporary table."""
        self.run(f"CREATE TEMPORARY TABLE {quoted(name)} ({columns}) ON COMMIT DROP")
        return quoted(name)

    def fill(self, staging: str, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        """Copy rows into a temporary table that `create_staging` has made."""
        self._copy(staging.strip('"'), tables, schema, temporary=True)

    def _copy(
        self, name: str, tables: Iterable[pa.Table], schema: pa.Schema, *, temporary: bool = False, folder: str = ""
    ) -> None:
        reader = pa.RecordBatchReader.from_batches(schema, (batch for table in tables for batch in table.to_batches()))
        place: dict[str, Any] = {"temporary": True} if temporary else {"db_schema_name": folder or None}
        with self.errors(), self._connection.cursor() as cursor:
            cursor.adbc_ingest(name, reader, mode="append", **place)

    def create_publications(self, table: TableName) -> None:
        """Create the table of publications, unless it exists."""
        if self.columns(table) is None:
            self.begin(_SETUP)
            super().create_publications(table)
            self.commit()

    def prepare_staging(self, staging: TableName, types: Mapping[str, ColumnType], *, marks: TableName) -> None:
        """Create the staging table and the table of marks, unless they exist."""
        if self.columns(staging) is not None and self.columns(marks) is not None:
            return
        self.begin(_SETUP)
        mark_columns = "tag text NOT NULL, part text NOT NULL, rows bigint NOT NULL, PRIMARY KEY (tag, part)"
        self.run(f"CREATE UNLOGGED TABLE IF NOT EXISTS {marks.sql} ({mark_columns})")
        self.run(f"CREATE UNLOGGED TABLE IF NOT EXISTS {staging.sql} ({column_list(types)})")
        self.commit()

    def clear_staging(self, staging: TableName, *, marks: TableName, tag: str) -> None:
        """Remove all staged rows and their marks."""
        self._begin()
        self.run(f"DELETE FROM {marks.sql} WHERE tag = {text_literal(tag)}")
        self.run(f"TRUNCATE {staging.sql}")
        self.commit()

    def drop_staging(self, staging: TableName, *, marks: TableName, tag: str) -> None:
        """Drop the staging table, and remove its marks."""
        if self.columns(staging) is None and self.columns(marks) is None:
            return
        self._begin()
        if self.columns(marks) is not None:
            self.run(f"DELETE FROM {marks.sql} WHERE tag = {text_literal(tag)}")
        self.run(f"DROP TABLE IF EXISTS {staging.sql}")
        self.commit()

    def stage(
        self,
        staging: TableName,
        tables: Iterable[pa.Table],
        schema: pa.Schema,
        *,
        marks: TableName,
        mark: tuple[str, str, int],
        reached: Callable[[str], None],
    ) -> None:
        """Copy rows and their mark in one transaction. A second process waits for the first, and finds the mark."""
        self._begin()
        try:
            is_first = self.run(
                f"INSERT INTO {marks.sql} VALUES (?, ?, ?) ON CONFLICT DO NOTHING RETURNING rows::text", mark
            )
            reached("marked")
            if is_first:
                self._copy(staging.name, tables, schema, folder=staging.schema)
                reached("copied")
            self.commit()
        except BaseException:
            self.rollback()
            raise

    def is_conflict(self, error: BaseException) -> bool:
        """True for a constraint that the rows break, and for values that do not fit."""
        return (getattr(error, "sqlstate", None) or "")[:2] in _CONFLICTS
