"""Statements in the SQL that Postgres, SQLite and DuckDB have in common. Names are always in quotes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.sinks.sql.database import TableName, column_list, names, quoted, text_literal
from pipeline.sinks.types import ColumnType

SHOWN_KEYS = 5
"""Keys of several rows that are looked for."""
JobValue = tuple[str, str] | None
"""Column of the job and the id of the job, if the table has one."""


def columns(types: Mapping[str, ColumnType]) -> str:
    """Return the columns of a staging table."""
    return column_list(types)


def insert(table: TableName, staging: str, columns: Sequence[str], *, job: JobValue) -> str:
    """Return the statement that adds all rows of ``staging``."""
    into, values = _values(columns, job)
    return f"INSERT INTO {table.sql} ({into}) SELECT {values} FROM {staging} AS s"


def merge(table: TableName, staging: str, columns: Sequence[str], *, key: Sequence[str], job: JobValue) -> list[str]:
    """Return the statements that replace rows with the same key, and add the others. No index is needed."""
    own = "s"
    equal = " AND ".join(f"{table.sql}.{quoted(name)} = {own}.{quoted(name)}" for name in key)
    others = [f"{quoted(name)} = {own}.{quoted(name)}" for name in columns if name not in key]
    if job is not None:
        others.append(f"{quoted(job[0])} = {text_literal(job[1])}")
    into, values = _values(columns, job)
    update = f"UPDATE {table.sql} SET {', '.join(others)} FROM {staging} AS {own} WHERE {equal}"
    add = (
        f"INSERT INTO {table.sql} ({into}) SELECT {values} FROM {staging} AS {own} "
        f"WHERE NOT EXISTS (SELECT 1 FROM {table.sql} WHERE {equal})"
    )
    return [update, add] if others else [add]


def null_keys(staging: str, key: Sequence[str]) -> str:
    """Return the query for a key with a null in it."""
    condition = " OR ".join(f"{quoted(name)} IS NULL" for name in key)
    return f"SELECT {names(key)} FROM {staging} WHERE {condition} LIMIT 1"


def double_keys(staging: str, key: Sequence[str]) -> str:
    """Return the query for keys of several rows, each with their number."""
    return (
        f"SELECT {names(key)}, count(*) FROM {staging} GROUP BY {names(key)} HAVING count(*) > 1 "
        f"ORDER BY {names(key)} LIMIT {SHOWN_KEYS}"
    )


def missing(table: TableName, sample: str, columns: Sequence[str], *, same: str) -> str:
    """Return the query for the number of rows of ``sample`` that ``table`` does not have with all their values."""
    equal = " AND ".join(f"t.{quoted(name)} {same} s.{quoted(name)}" for name in columns)
    return f"SELECT count(*) FROM {sample} AS s WHERE NOT EXISTS (SELECT 1 FROM {table.sql} AS t WHERE {equal})"


def own_rows(job: JobValue) -> str:
    """Return the condition for rows of the job."""
    assert job is not None
    return f"{quoted(job[0])} = {text_literal(job[1])}"


def _values(columns: Sequence[str], job: JobValue) -> tuple[str, str]:
    into, values = names(columns), names(columns, of="s")
    if job is not None:
        into, values = f"{into}, {quoted(job[0])}", f"{values}, {text_literal(job[1])}"
    return into, values
