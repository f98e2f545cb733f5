from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from pipeline.common.content import Content, content_of


def rows(count: int = 400) -> pa.Table:
    random = np.random.default_rng(5)
    return pa.table(
        {
            "key": pa.array(random.integers(-9, 90, count)),
            "big": pa.array(random.integers(0, 2**64, count, dtype=np.uint64)),
            "score": pa.array(random.random(count)),
            "short": pa.array(random.random(count, dtype=np.float32)),
            "text": pa.array([f"t{n % 50}" if n % 7 else None for n in range(count)]),
            "kind": pa.array(["a", "b", None, "c"] * (count // 4)).dictionary_encode(),
            "flag": pa.array([True, False, None, True] * (count // 4)),
            "day": pa.array([date(2024, 1, 1), None] * (count // 2)),
            "at": pa.array([datetime(2024, 1, 1), None] * (count // 2), pa.timestamp("us", "UTC")),
            "price": pa.array([Decimal("1.10"), None] * (count // 2)),
            "list": pa.array([[1, 2], None] * (count // 2)),
            "bytes": pa.array([b"x", None] * (count // 2)),
            "none": pa.nulls(count),
        }
    )


def changed(table: pa.Table, name: str) -> pa.Table:
    """Return the table with the first two different values of a column exchanged."""
    values = table.column(name).to_pylist()
    other = next(number for number, value in enumerate(values) if value != values[0])
    values[0], values[other] = values[other], values[0]
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def test_order_and_layout_change_nothing():
    table = rows()
    content = content_of(table)
    shuffled = table.take(np.random.default_rng(1).permutation(table.num_rows))
    cut = pa.concat_tables([table.slice(300), table.slice(0, 300)])
    for other in (shuffled, cut):
        assert content_of(other).agrees(content)
        assert content_of(other).digest == content.digest
    assert Content.from_dict(content.to_dict()) == content


@pytest.mark.parametrize("name", [n for n in rows().column_names if n not in ("score", "short", "none")])
def test_values_in_other_rows_are_found(name):
    content = content_of(changed(rows(), name))
    assert content.difference(content_of(rows())) == "other values in the same number of rows"
    assert not content.agrees(content_of(rows()))


@pytest.mark.parametrize(
    ("name", "nudge", "agrees"), [("score", 1e-12, True), ("score", 1e-3, False), ("short", 1e-5, True)]
)
def test_floats_agree_within_rounding(name, nudge, agrees):
    table = rows()
    column = table.column(name)
    moved = pa.array(np.asarray(column) + np.array(nudge, np.asarray(column).dtype))
    other = content_of(table.set_column(table.schema.get_field_index(name), name, moved))
    assert other.agrees(content_of(table)) == agrees
    if not agrees:
        assert other.difference(content_of(table)) == f"other values of {name}"


def test_rows_nulls_names_and_types_count():
    table = rows()
    assert content_of(table.slice(1)).difference(content_of(table)) == "399 rows, not 400"
    score = table.column("score").to_pylist()
    for value in (None, float("nan"), float("inf")):
        other = table.set_column(2, "score", pa.array([value, *score[1:]]))
        assert content_of(other).digest != content_of(table).digest
    assert content_of(table.rename_columns(["k", *table.column_names[1:]])).digest != content_of(table).digest
    assert content_of(table.set_column(0, "key", table.column("key").cast("int32"))).digest != content_of(table).digest


def test_no_rows():
    empty = rows().slice(0, 0)
    assert content_of(empty).rows == 0
    assert content_of(empty).agrees(content_of(rows().schema.empty_table()))
