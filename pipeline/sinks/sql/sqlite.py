"""SQLite, with Python's own driver."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import OutputConflict
from pipeline.sinks.sql.database import LOCK_SECONDS, Database, ExistingColumn, TableName, quoted
from pipeline.storage.urls import storage_errors


class Sqlite(Database):
    """A file of SQLite."""

    kind = "sqlite"
    title = "SQLite"
    same = "IS"
    handled = (sqlite3.Error,)

    def __init__(self, path: str, *, where: str, read_only: bool = False, lock_seconds: float = LOCK_SECONDS) -> None:
        super().__init__(where=where)
        with self.errors(), storage_errors(path):
            if not read_only:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            uri = f"{Path(path).absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._connection = sqlite3.connect(uri, timeout=lock_seconds, isolation_level=None, uri=True)

    def begin(self, lock: str) -> None:
        """Take the only right to write."""
        self.run("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Commit the transaction."""
        self.run("COMMIT")

    def rollback(self) -> None:
        """Roll the transaction back."""
        if self._connection.in_transaction:
            self.run("ROLLBACK")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def run(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Execute a statement."""
        with self.errors():
            return self._connection.execute(statement, tuple(parameters)).fetchall()

    def columns(self, table: TableName) -> dict[str, ExistingColumn] | None:
        """Return the columns with their affinities; see `Database.columns`."""
        schema = f"{quoted(table.schema)}." if table.schema else ""
        rows = self.run(f"PRAGMA {schema}table_info({quoted(table.name)})")
        # SQLite numbers rows in a column that is declared INTEGER PRIMARY KEY.
        return {
            name: ExistingColumn(
                _affinity(declared), has_default=default is not None or (key == 1 and declared.upper() == "INTEGER")
            )
            for _, name, declared, _, default, key in rows
        } or None

    def create_staging(self, name: str, columns: str) -> str:
        """Create a temporary table."""
        self.run(f"CREATE TEMP TABLE {quoted(name)} ({columns})")
        return f"temp.{quoted(name)}"

    def fill(self, staging: str, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        """Insert rows one by one in one statement."""
        places = ", ".join("?" for _ in schema.names)
        for table in tables:
            columns = [column.to_pylist() for column in table.columns]
            with self.errors():
                self._connection.executemany(f"INSERT INTO {staging} VALUES ({places})", zip(*columns, strict=True))

    def check_types(self, table: pa.Table) -> None:
        """Refuse NaN, which SQLite would store as null."""
        for name, column in zip(table.column_names, table.columns, strict=True):
            if pa.types.is_floating(column.type) and pc.any(pc.is_nan(column)).as_py():
                raise OutputConflict(
                    "SQLite stores NaN as null",
                    where=f"{self.where}, column {name}",
                    found="NaN",
                    expected="numbers or null",
                    next_step="replace NaN in a map step, or publish to another database",
                )

    def is_conflict(self, error: BaseException) -> bool:
        """True for a constraint that the rows break."""
        return isinstance(error, (sqlite3.IntegrityError, sqlite3.DataError))


def _affinity(declared: str) -> str:
    """Return the affinity of a column by its declared type, by SQLite's rules."""
    text = declared.upper()
    if "INT" in text:
        return "INTEGER"
    if any(word in text for word in ("CHAR", "CLOB", "TEXT")):
        return "TEXT"
    if "BLOB" in text or not text:
        return "BLOB"
    return "REAL" if any(word in text for word in ("REAL", "FLOA", "DOUB")) else "NUMERIC"
