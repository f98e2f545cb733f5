"""Types of columns in targets that do not have Arrow's types, decided before anything runs. Pure.

A value is stored as it is, in a wider type, or not at all: a type that the target would have to narrow is refused by
the name of its column. Casts are checked: nanoseconds that a target cannot store are an error, and are never cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import OutputConflict, SpecError

_LONGEST_DECIMAL = 38
"""Digits of the widest decimals of DuckDB and of Arrow's decimal128."""


@dataclass(frozen=True)
class ColumnType:
    """The type of a column in a target."""

    name: str
    """As the target itself names it."""
    casts: tuple[pa.DataType, ...] = ()
    """Types that the column is cast to, one after the other, before it is stored. Empty: as it is."""
    wider: frozenset[str] = frozenset()
    """Other types of the target that hold every value."""

    def accepts(self, name: str) -> bool:
        """True if a column of the target's type ``name`` holds every value."""
        return name == self.name or name in self.wider

    @property
    def stored(self) -> pa.DataType | None:
        """Type that is handed to the target; None: the column's own."""
        return self.casts[-1] if self.casts else None


TypeOf = Callable[[pa.DataType], "ColumnType | None"]


def column_types(schema: pa.Schema, *, target: str) -> dict[str, ColumnType]:
    """Return the type of each column in ``target``: ``postgresql``, ``sqlite`` or ``duckdb``.

    :raises SpecError: for columns that the target cannot store without loss, all by name.
    """
    found = {field.name: TARGETS[target](_plain(field.type)) for field in schema}
    refused = [f"{field.name}: {field.type}" for field in schema if found[field.name] is None]
    if refused:
        raise SpecError(
            f"columns have types that {NAMES[target]} cannot store without loss",
            where="sink",
            found="; ".join(refused),
            expected=EXPECTED[target],
            next_step="cast them in a map step, or leave them out with a select step",
        )
    return {name: kind for name, kind in found.items() if kind is not None}


def stored_schema(schema: pa.Schema, types: Mapping[str, ColumnType]) -> pa.Schema:
    """Return the Arrow schema of the rows as the target gets them."""
    return pa.schema([(field.name, types[field.name].stored or _plain(field.type)) for field in schema])


def stored_table(table: pa.Table, types: Mapping[str, ColumnType], *, where: str) -> pa.Table:
    """Return ``table`` with the types that the target gets.

    :raises OutputConflict: for a value that the target's type cannot hold, with the name of its column.
    """
    columns = []
    for field, column in zip(table.schema, table.columns, strict=True):
        values = column.cast(_plain(field.type)) if _plain(field.type) != field.type else column
        for kind in types[field.name].casts:
            values = _cast(values, kind, name=field.name, where=where)
        columns.append(values)
    return pa.table(columns, schema=stored_schema(table.schema, types))


def _cast(values: pa.ChunkedArray, kind: pa.DataType, *, name: str, where: str) -> pa.ChunkedArray:
    try:
        return pc.cast(values, kind, safe=True)
    except pa.ArrowInvalid as error:
        raise OutputConflict(
            "a value does not fit into the type that the target has for it",
            where=f"{where}, column {name}",
            found=" ".join(str(error).split())[:200],
            expected=f"values that {kind} holds",
            next_step="round or cast the column in a map step, and run the job again",
        ) from error


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values, whatever their encoding in Arrow."""
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return pa.binary()
    if types.is_date64(kind):
        return pa.date32()
    if types.is_float16(kind):
        return pa.float32()
    if _is_list(kind):
        return pa.list_(_plain(kind.value_type))
    return kind


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _is_timestamp(kind: pa.DataType, *, has_zone: bool) -> bool:
    return bool(pa.types.is_timestamp(kind)) and (kind.tz is not None) == has_zone


def _postgresql(kind: pa.DataType) -> ColumnType | None:
    types = pa.types
    if (number := _POSTGRESQL.get(kind)) is not None:
        return number
    if types.is_decimal(kind):
        digits = f"numeric({kind.precision},{kind.scale})"
        # A negative scale rounds to tens: Postgres knows it from version 15 on, its drivers do not.
        is_wide = types.is_decimal256(kind) or kind.scale < 0
        return None if is_wide else ColumnType(digits, _decimal128(kind), frozenset({"numeric"}))
    if _is_timestamp(kind, has_zone=False):
        return ColumnType("timestamp without time zone", _unless(kind, pa.timestamp("us")))
    if _is_timestamp(kind, has_zone=True):
        return ColumnType("timestamp with time zone", _unless(kind, pa.timestamp("us", "UTC")))
    if types.is_time(kind):
        return ColumnType("time without time zone", _unless(kind, pa.time64("us")))
    if types.is_list(kind):
        item = _postgresql(kind.value_type)
        is_simple = item is not None and item.name in _POSTGRESQL_ITEMS
        return ColumnType(f"{item.name}[]", _items(kind, item)) if item is not None and is_simple else None
    return None


def _sqlite(kind: pa.DataType) -> ColumnType | None:  # noqa: PLR0911
    types, text = pa.types, pa.string()
    if types.is_boolean(kind):
        return ColumnType("INTEGER", (pa.int8(),), frozenset({"NUMERIC"}))
    if types.is_integer(kind) and kind != pa.uint64():
        return ColumnType("INTEGER", (), frozenset({"NUMERIC"}))
    if types.is_floating(kind):
        return ColumnType("REAL")
    if types.is_string(kind):
        return ColumnType("TEXT")
    if types.is_binary(kind):
        return ColumnType("BLOB")
    if types.is_decimal(kind) and not types.is_decimal256(kind):
        return ColumnType("TEXT", (text,))
    # Texts that are no numbers stay texts in columns of numeric affinity, such as DATE.
    if _is_timestamp(kind, has_zone=True):
        return ColumnType("TEXT", (pa.timestamp(kind.unit, "UTC"), text), frozenset({"NUMERIC"}))
    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind):
        return ColumnType("TEXT", (text,), frozenset({"NUMERIC"}))
    return None


def _duckdb(kind: pa.DataType) -> ColumnType | None:  # noqa: PLR0911
    types = pa.types
    if (simple := _DUCKDB.get(kind)) is not None:
        return simple
    if types.is_decimal(kind):
        if kind.precision > _LONGEST_DECIMAL or kind.scale < 0:
            return None
        return ColumnType(f"DECIMAL({kind.precision},{kind.scale})", _decimal128(kind))
    if _is_timestamp(kind, has_zone=False):
        if kind.unit == "ns":
            return ColumnType("TIMESTAMP_NS")
        return ColumnType("TIMESTAMP", _unless(kind, pa.timestamp("us")), frozenset({"TIMESTAMP_NS"}))
    if _is_timestamp(kind, has_zone=True):
        return ColumnType("TIMESTAMP WITH TIME ZONE", _unless(kind, pa.timestamp("us", "UTC")))
    if types.is_time(kind):
        return ColumnType("TIME", _unless(kind, pa.time64("us")))
    if types.is_list(kind):
        item = _duckdb(kind.value_type)
        return ColumnType(f"{item.name}[]", _items(kind, item)) if item is not None else None
    return None


def _items(kind: pa.DataType, item: ColumnType) -> tuple[pa.DataType, ...]:
    return tuple(pa.list_(one) for one in item.casts)


def _unless(kind: pa.DataType, wanted: pa.DataType) -> tuple[pa.DataType, ...]:
    return () if kind == wanted else (wanted,)


def _decimal128(kind: pa.DataType) -> tuple[pa.DataType, ...]:
    return _unless(kind, pa.decimal128(kind.precision, kind.scale)) if kind.precision <= _LONGEST_DECIMAL else ()


def _chain(*names: str) -> dict[str, frozenset[str]]:
    """Return the types after each of ``names``, which hold all values of those before."""
    return {name: frozenset(names[number + 1 :]) for number, name in enumerate(names)}


_PG_WHOLE = _chain("smallint", "integer", "bigint", "numeric")
_POSTGRESQL = {
    pa.bool_(): ColumnType("boolean"),
    pa.int8(): ColumnType("smallint", (pa.int16(),), _PG_WHOLE["smallint"]),
    pa.uint8(): ColumnType("smallint", (pa.int16(),), _PG_WHOLE["smallint"]),
    pa.int16(): ColumnType("smallint", (), _PG_WHOLE["smallint"]),
    pa.uint16(): ColumnType("integer", (pa.int32(),), _PG_WHOLE["integer"]),
    pa.int32(): ColumnType("integer", (), _PG_WHOLE["integer"]),
    pa.uint32(): ColumnType("bigint", (pa.int64(),), _PG_WHOLE["bigint"]),
    pa.int64(): ColumnType("bigint", (), _PG_WHOLE["bigint"]),
    pa.uint64(): ColumnType("numeric(20,0)", (pa.decimal128(20, 0),), frozenset({"numeric"})),
    pa.float32(): ColumnType("real", (), frozenset({"double precision"})),
    pa.float64(): ColumnType("double precision"),
    pa.string(): ColumnType("text", (), frozenset({"character varying"})),
    pa.binary(): ColumnType("bytea"),
    pa.date32(): ColumnType("date"),
}
_POSTGRESQL_ITEMS = {"smallint", "integer", "bigint", "real", "double precision", "text"}
_SIGNED = _chain("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
_UNSIGNED = _chain("UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT")
_DUCKDB = {
    pa.bool_(): ColumnType("BOOLEAN"),
    pa.int8(): ColumnType("TINYINT", (), _SIGNED["TINYINT"]),
    pa.int16(): ColumnType("SMALLINT", (), _SIGNED["SMALLINT"]),
    pa.int32(): ColumnType("INTEGER", (), _SIGNED["INTEGER"]),
    pa.int64(): ColumnType("BIGINT", (), _SIGNED["BIGINT"]),
    pa.uint8(): ColumnType("UTINYINT", (), _UNSIGNED["UTINYINT"] | _SIGNED["TINYINT"]),
    pa.uint16(): ColumnType("USMALLINT", (), _UNSIGNED["USMALLINT"] | _SIGNED["SMALLINT"]),
    pa.uint32(): ColumnType("UINTEGER", (), _UNSIGNED["UINTEGER"] | _SIGNED["INTEGER"]),
    pa.uint64(): ColumnType("UBIGINT", (), _UNSIGNED["UBIGINT"]),
    pa.float32(): ColumnType("FLOAT", (), frozenset({"DOUBLE"})),
    pa.float64(): ColumnType("DOUBLE"),
    pa.string(): ColumnType("VARCHAR"),
    pa.binary(): ColumnType("BLOB"),
    pa.date32(): ColumnType("DATE"),
}
TARGETS: dict[str, TypeOf] = {"postgresql": _postgresql, "sqlite": _sqlite, "duckdb": _duckdb}
NAMES = {"postgresql": "Postgres", "sqlite": "SQLite", "duckdb": "DuckDB"}
EXPECTED = {
    "postgresql": "numbers, decimals of up to 38 digits, booleans, texts, bytes, dates, times, timestamps, and lists "
    "of numbers or texts",
    "sqlite": "numbers up to int64, decimals of up to 38 digits, booleans, texts, bytes, dates, times and timestamps",
    "duckdb": "numbers, decimals of up to 38 digits, booleans, texts, bytes, dates, times, timestamps, and lists of "
    "these",
}
