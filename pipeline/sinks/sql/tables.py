"""Look at a table that exists before rows are published to it."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import OutputConflict
from pipeline.sinks.sql.database import Database, TableName
from pipeline.sinks.types import ColumnType

_SHOWN = 5


def has_rows(database: Database, table: TableName) -> bool:
    """True if the table exists and has rows."""
    if database.columns(table) is None:
        return False
    return bool(database.run(f"SELECT 1 FROM {table.sql} LIMIT 1"))


def check_columns(database: Database, table: TableName, types: Mapping[str, ColumnType], *, place: str) -> None:
    """Refuse a table that exists with other columns. Their order does not matter.

    Columns that the output does not have are allowed if the database fills them: with a default, or as an identity.

    :raises OutputConflict: with the differences.
    """
    existing = database.columns(table)
    if existing is None:
        return
    changed = [
        f"{name}: {existing[name].type if name in existing else 'missing'} -> {kind.name}"
        for name, kind in types.items()
        if name not in existing or not kind.accepts(existing[name].type)
    ]
    changed += [
        f"{name}: {column.type} -> missing"
        for name, column in existing.items()
        if name not in types and not column.has_default
    ]
    if not changed:
        return
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    raise OutputConflict(
        f"the table {table} exists with other columns",
        where=place,
        found="; ".join(changed[:_SHOWN]) + more,
        expected="; ".join(f"{name}: {kind.name}" for name, kind in types.items()),
        next_step="change the table, choose another sink.table, or change the columns with a select step",
    )
