"""Every Arrow type in every database: stored with all its values, or refused by name."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.errors import OutputConflict, SpecError
from pipeline.sinks.sql.connect import open_database
from pipeline.sinks.sql.statements import columns
from pipeline.sinks.types import TARGETS, column_types, stored_schema, stored_table
from pipeline.testing.arrow_types import typed_columns

COLUMNS = typed_columns()
REFUSED_EVERYWHERE = ("null", "duration", "struct", "map", "decimal256(70, 2)")


def _read(database: Any, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    if database.kind == "duckdb":
        return database._connection.sql(f"SELECT * FROM {name}").to_arrow_table()["c"]
    return pa.chunked_array([[value for (value,) in database.run(f"SELECT * FROM {name}")]], kind)


def _for_sqlite(array: pa.Array) -> pa.Array:
    """Replace NaN and -0.0, which SQLite has not."""
    if not pa.types.is_floating(array.type):
        return array
    wide = array.cast(pa.float64())
    return pc.add(pc.if_else(pc.is_nan(wide), None, wide), 0.0).cast(array.type)


@pytest.mark.parametrize("target", ["sqlite", "duckdb"])
def test_values_come_back(target: str, tmp_path: Path) -> None:
    stored = []
    with closing(open_database(f"{target}:///{tmp_path / 'a.db'}", where="sink")) as database:
        for number, (text, array) in enumerate(COLUMNS.items()):
            table = pa.table({"c": _for_sqlite(array) if target == "sqlite" else array})
            try:
                types = column_types(table.schema, target=target)
                rows = stored_table(table, types, where="sink")
            except (SpecError, OutputConflict):
                continue
            database.begin("t")
            name = database.create_staging(f"t{number}", columns(types))
            database.fill(name, [rows], stored_schema(table.schema, types))
            back = _read(database, name, stored_schema(table.schema, types).field("c").type)
            # As texts NaN is equal to itself, and -0.0 is not 0.0.
            assert repr(back.cast(rows["c"].type).to_pylist()) == repr(rows["c"].to_pylist()), text
            database.rollback()
            stored.append(text)
    assert {"bool", "int64", "uint32", "float", "double", "string", "binary", "date32[day]"} <= set(stored)
    assert ("uint64" in stored) == (target == "duckdb")


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("text", [text for text in COLUMNS if text.startswith(REFUSED_EVERYWHERE)])
def test_types_that_none_can_store(target: str, text: str) -> None:
    with pytest.raises(SpecError, match="without loss") as caught:
        column_types(pa.schema([("good", pa.int64()), ("bad", COLUMNS[text].type)]), target=target)
    assert caught.value.found == f"bad: {COLUMNS[text].type}"


def test_nanoseconds_are_not_cut_off() -> None:
    table = pa.table({"t": pa.array([1_000, 1_001], pa.timestamp("ns"))})
    types = column_types(table.schema, target="postgresql")
    assert stored_table(table.slice(0, 1), types, where="sink")["t"].type == pa.timestamp("us")
    with pytest.raises(OutputConflict) as caught:
        stored_table(table, types, where="sink")
    assert "column t" in caught.value.where
