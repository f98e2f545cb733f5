"""`Database`: the few operations that publishing to a table needs, each database in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from pipeline.common.secrets import redact
from pipeline.errors import OutputConflict, SpecError, StorageError
from pipeline.sinks.types import ColumnType

LOCK_SECONDS = 600.0
"""Seconds to wait for another publisher."""
MARKS = "pipeline_staged"
"""Table of the files that are staged."""
PUBLICATIONS = "pipeline_publications"
"""Table of the last publication of each job, beside the tables that it publishes to."""
_PUBLICATION_COLUMNS = (
    "target text NOT NULL, job text NOT NULL, manifest bigint NOT NULL, rows bigint NOT NULL, plan text NOT NULL, "
    "mode text NOT NULL, region text NOT NULL, sequence bigint NOT NULL, published text NOT NULL, "
    "PRIMARY KEY (target, job)"
)


@dataclass(frozen=True)
class TableName:
    """Name of a table."""

    schema: str
    """Empty: the default schema of the connection."""
    name: str

    @staticmethod
    def parse(text: str) -> TableName:
        """Return the name in ``text``: ``table`` or ``schema.table``.

        :raises SpecError: for another form.
        """
        schema, _, name = text.rpartition(".")
        if not name or "." in schema or "\0" in text:
            raise SpecError(
                "not a valid name of a table", where="sink.table", found=text, expected="table, or schema.table"
            )
        return TableName(schema, name)

    def beside(self, name: str) -> TableName:
        """Return another table in the same schema."""
        return TableName(self.schema, name)

    @property
    def sql(self) -> str:
        """The name in quotes."""
        return ".".join(quoted(part) for part in (self.schema, self.name) if part)

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}" if self.schema else self.name


@dataclass(frozen=True)
class ExistingColumn:
    """A column of a table that exists."""

    type: str
    """Type as the database names it, in the form that `ColumnType.accepts` takes."""
    has_default: bool = False
    """True if rows may be inserted without a value for it, and get one that is not simply null."""


class Database(ABC):
    """A connection to a database that holds the target of a sink. The rows go in within the transaction."""

    kind: ClassVar[str]
    """Name among the targets of `pipeline.sinks.types`."""
    title: ClassVar[str]
    """Name for people."""
    same: ClassVar[str] = "IS NOT DISTINCT FROM"
    """Operator of equality that also holds for two nulls."""
    handled: ClassVar[tuple[type[BaseException], ...]] = ()
    """Errors of the database's driver."""

    def __init__(self, *, where: str) -> None:
        self.where = where
        """Place of the sink, for messages."""

    @abstractmethod
    def begin(self, lock: str) -> None:
        """Begin a transaction that may write. Publishers to one table take turns.

        :param lock: name that all publishers to the table give.
        """

    @abstractmethod
    def commit(self) -> None:
        """Commit the transaction."""

    @abstractmethod
    def rollback(self) -> None:
        """Roll the transaction back."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""

    @abstractmethod
    def run(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Execute a statement with ``?`` for parameters. Return its rows, if it has some."""

    @abstractmethod
    def columns(self, table: TableName) -> dict[str, ExistingColumn] | None:
        """Return the columns of a table, in order; None if there is no such table."""

    @abstractmethod
    def create_staging(self, name: str, columns: str) -> str:
        """Create a table that readers do not see, inside the transaction. Return its name for statements."""

    @abstractmethod
    def fill(self, staging: str, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        """Insert rows into the table that `create_staging` returned."""

    def create_publications(self, table: TableName) -> None:
        """Create the table of publications, unless it exists."""
        self.run(f"CREATE TABLE IF NOT EXISTS {table.sql} ({_PUBLICATION_COLUMNS})")

    def check_types(self, table: pa.Table) -> None:  # noqa: B027
        """Refuse values that the database would change.

        :raises OutputConflict: with the column.
        """

    def create_table(self, table: TableName, types: Mapping[str, ColumnType], *, key: Sequence[str] = ()) -> None:
        """Create a table with these columns."""
        self.run(f"CREATE TABLE {table.sql} ({column_list(types, key=key)})")

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn errors of the driver into those of this package, without secrets."""
        try:
            yield
        except self.handled as error:
            text = " ".join(redact(str(error)).split())[:500]
            if self.is_conflict(error):
                raise OutputConflict(
                    f"{self.title} refused the rows",
                    where=self.where,
                    found=text,
                    expected="rows that the table's constraints allow",
                    next_step="change the rows, the table or sink.mode, then resume the job",
                ) from None
            raise StorageError(
                f"{self.title} failed",
                where=self.where,
                found=text,
                next_step="when the database is there again: resume the job",
            ) from None

    def is_conflict(self, error: BaseException) -> bool:
        """True if the rows are at fault, and not the database."""
        return False


class StagingDatabase(Database):
    """A database in which several connections fill a staging table at a time, before the transaction."""

    @abstractmethod
    def prepare_staging(self, staging: TableName, types: Mapping[str, ColumnType], *, marks: TableName) -> None:
        """Create the staging table and the table of marks, unless they exist."""

    @abstractmethod
    def clear_staging(self, staging: TableName, *, marks: TableName, tag: str) -> None:
        """Remove all staged rows and their marks."""

    @abstractmethod
    def drop_staging(self, staging: TableName, *, marks: TableName, tag: str) -> None:
        """Drop the staging table, and remove its marks."""

    @abstractmethod
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
        """Copy rows into the staging table with a mark in one transaction, unless the mark is there.

        :param mark: digest of job and place, name of the file, its number of rows.
        """


def quoted(name: str) -> str:
    """Return a name as an identifier of SQL."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def text_literal(text: str) -> str:
    """Return a text as a literal of SQL."""
    escaped = text.replace("'", "''")
    return f"'{escaped}'"


def column_list(types: Mapping[str, ColumnType], *, key: Sequence[str] = ()) -> str:
    """Return the columns of a CREATE TABLE statement."""
    columns = [f"{quoted(name)} {kind.name}" for name, kind in types.items()]
    if key:
        columns.append(f"PRIMARY KEY ({names(key)})")
    return ", ".join(columns)


def names(columns: Iterable[str], *, of: str = "") -> str:
    """Return columns in quotes, with commas between."""
    prefix = f"{of}." if of else ""
    return ", ".join(f"{prefix}{quoted(column)}" for column in columns)
