"""Conversion between Arrow tables and pandas frames for map steps."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.errors import StepFailed
from pipeline.scoring.bisection import RowsError
from pipeline.scoring.frame_conversion import to_frame
from pipeline.scoring.frame_schemas import FrameSchemas
from pipeline.scoring.rows import Rows
from pipeline.scoring.step_frames import map_rows
from pipeline.scoring.step_plan import plan_steps
from pipeline.scoring.steps import Step

NAN = float("nan")
BIG = 2**53 + 1
INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


def table() -> pa.Table:
    return pa.table(
        {
            "id": pa.array([BIG, None, BIG + 2, 4]),
            "n": pa.array([1, 2, 3, 4], pa.int32()),
            "flag": pa.array([True, None, False, True]),
            "x": pa.array([0.5, NAN, None, -0.0]),
            "code": pa.array(["a", "b", None, "a"]).dictionary_encode(),
            "at": pa.array([1, None, 3, 4], pa.timestamp("us", "UTC")),
            "day": pa.array([dt.date(2026, 1, 1), None, dt.date(1, 1, 1), dt.date(9999, 12, 31)]),
        }
    )


def mapped(
    function: Callable[..., Any], rows: pa.Table, *, planned: pa.Schema | None = None, backend: str = "numpy"
) -> pa.Table:
    schemas = FrameSchemas(frozenset(), () if planned is None else (planned,))
    parts, _ = map_rows([Step("f:step", function, backend)], Rows.from_table(rows), schemas=schemas)
    return pa.concat_tables([part.table for part in parts])


@pytest.mark.fault(81)
@pytest.mark.parametrize("backend", ["numpy", "pyarrow"])
def test_dtypes_do_not_depend_on_the_rows(backend: str) -> None:
    frames = [to_frame(table().slice(row, count), backend=backend, never_null={"n"}) for row, count in
              [(0, 4), (0, 1), (1, 1), (2, 2), (4, 0)]]  # fmt: skip
    for frame in frames[1:]:
        pd.testing.assert_series_equal(frame.dtypes, frames[0].dtypes)


def test_dtypes_are_numpys_where_there_can_be_no_null() -> None:
    dtypes = to_frame(table(), backend="numpy", never_null={"n"}).dtypes.astype(str).to_dict()
    assert dtypes == {
        "id": "Int64", "n": "int32", "flag": "boolean", "x": "float64", "code": "str",
        "at": "datetime64[us, UTC]", "day": "object",
    }  # fmt: skip
    assert [str(dtype) for dtype in to_frame(table(), backend="pyarrow").dtypes] == [
        "int64[pyarrow]", "int32[pyarrow]", "bool[pyarrow]", "double[pyarrow]", "string[pyarrow]",
        "timestamp[us, tz=UTC][pyarrow]", "date32[day][pyarrow]",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_integers_of_every_width_stay_exact_beside_a_null(kind: pa.DataType) -> None:
    top = 2**kind.bit_width - 1 if "u" in str(kind) else 2 ** (kind.bit_width - 1) - 1
    rows = pa.table({"id": pa.array([top, None, top - 2, 0], kind)})
    result = mapped(lambda frame: frame.rename(columns={"id": "customer"}), rows)
    assert result.schema.field("customer").type == kind
    assert result.column("customer").to_pylist() == [top, None, top - 2, 0]


def test_ids_beyond_the_floats_are_filled_exactly() -> None:
    result = mapped(lambda frame: frame.assign(id=frame.id.fillna(0)), table().select(["id"]))
    assert result.column("id").to_pylist() == [BIG, 0, BIG + 2, 4]


def test_a_float_is_nan_or_null_row_by_row() -> None:
    rows = pa.table({"x": pa.array([NAN, None, -5.0, NAN, None, 1.0])})
    result = mapped(lambda frame: frame.assign(x=frame.x.clip(lower=0), y=frame.x * 2), rows)
    assert str(result.column("x").to_pylist()) == "[nan, None, 0.0, nan, None, 1.0]"
    assert result.column("y").to_pylist() == [None, None, -10.0, None, None, 2.0]
    alone = [mapped(lambda frame: frame.assign(x=frame.x.clip(lower=0)), rows.slice(row, 1)) for row in range(6)]
    assert str(pa.concat_tables(alone).column("x").to_pylist()) == "[nan, None, 0.0, nan, None, 1.0]"


def test_a_float_that_a_step_makes_missing_is_null() -> None:
    rows = pa.table({"x": pa.array([NAN, 1.0, 2.0, None])})
    result = mapped(lambda frame: frame.assign(x=frame.x.where(frame.x > 1)), rows)
    assert str(result.column("x").to_pylist()) == "[nan, None, 2.0, None]"


def test_cells_that_a_step_leaves_keep_what_python_cannot_hold() -> None:
    rows = pa.table({"pair": pa.array([[NAN, None], [1.0], None, [2.0]]), "n": [1, 2, 3, 4]})

    def step(frame: pd.DataFrame) -> pd.DataFrame:
        frame["pair"].iloc[1][0] = 9.0
        return frame[frame.n != 3]

    result = mapped(step, rows)
    assert str(result.column("pair").to_pylist()) == "[[nan, None], [9.0], [2.0]]"


def test_categories_keep_their_order_and_new_ones_follow() -> None:
    codes = pa.DictionaryArray.from_arrays(pa.array([1, 0, None], pa.int32()), ["low", "high"], ordered=True)
    rows = pa.table({"level": codes})
    result = mapped(lambda frame: frame.replace({"level": {"low": "none"}}), rows)
    column = result.column("level").chunk(0)
    assert column.type == codes.type
    assert column.dictionary.to_pylist() == ["low", "high", "none"]
    assert column.to_pylist() == ["high", "none", None]


@pytest.mark.fault(82)
@pytest.mark.parametrize(
    ("column", "hint"),
    [
        (pa.array([1, 3_000_000, 3], pa.date32()), "date"),
        (pa.array([1, -1, 3], pa.time64("us")), "time"),
        (pa.array([1000, 1001, 3000], pa.time64("ns")), "time64[ns]"),
        (pa.array([1, 86_400_000_001, 3], pa.time64("us")), "time"),
        (pa.array([{"t": 1}, {"t": 2**62}, {"t": 3}], pa.struct([("t", pa.timestamp("us"))])), "timestamp"),
    ],
)
def test_a_value_that_pandas_cannot_hold_rejects_its_row(column: pa.Array, hint: str) -> None:
    rows = pa.table({"when": column, "n": [1, 2, 3]})
    parts, failures = map_rows([Step("f:step", lambda frame: frame)], Rows.from_table(rows))
    assert [row for part in parts for row in part.position.tolist()] == [0, 2]
    assert failures.rows.tolist() == [1]
    assert failures.reasons[0].startswith("frame:when:")
    assert hint in failures.messages[0]
    assert "dtype_backend: pyarrow" in failures.messages[0]
    assert mapped(lambda frame: frame, rows, backend="pyarrow").equals(rows)


@pytest.mark.fault(82)
@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2**62, -(2**62)], pa.timestamp("us")),
        pa.array([[1], [None, 2**62], None], pa.list_(pa.timestamp("us"))),
    ],
)
def test_a_far_instant_that_numpy_can_hold_is_kept(column: pa.Array) -> None:
    rows = pa.table({"when": column})
    assert mapped(lambda frame: frame, rows).equals(rows)


@pytest.mark.fault(82)
def test_a_zone_that_is_unknown_rejects_each_row() -> None:
    rows = pa.table({"when": pa.array([1, None, 3], pa.timestamp("us", "Mars/Olympus")), "n": [1, 2, 3]})
    parts, failures = map_rows([Step("f:step", lambda frame: frame)], Rows.from_table(rows))
    assert (sum(len(part.position) for part in parts), failures.rows.tolist()) == (0, [0, 1, 2])
    assert "Mars/Olympus" in failures.messages[0]


def test_a_null_that_was_not_planned_rejects_its_row() -> None:
    rows = pa.table({"n": pa.array([1, None, 3])})
    schemas = FrameSchemas(frozenset({"n"}))
    parts, failures = map_rows([Step("f:step", lambda frame: frame)], Rows.from_table(rows), schemas=schemas)
    assert [row for part in parts for row in part.position.tolist()] == [0, 2]
    assert "statistics of the planned files" in failures.messages[0]


@pytest.mark.fault(83)
@pytest.mark.parametrize(
    ("planned", "made", "value"),
    [
        (pa.float32(), 0.1, "0.1"),
        (pa.int64(), "007", "'007'"),
        (pa.bool_(), 2, "2"),
        (pa.int64(), 2.5, "2.5"),
        (pa.string(), 1, "1"),
    ],
)
def test_a_value_of_another_type_than_planned_is_refused(planned: pa.DataType, made: Any, value: str) -> None:
    rows = pa.table({"n": [1, 2]})
    schema = pa.schema([("n", pa.int64()), ("y", planned)])
    with pytest.raises(StepFailed, match="column 'y' that a step made has another type") as caught:
        mapped(lambda frame: frame.assign(y=made), rows, planned=schema)
    assert caught.value.found.startswith(value)
    assert caught.value.expected.startswith(str(planned))
    assert "astype" in caught.value.next_step


def test_a_column_that_is_there_for_some_rows_only_is_refused() -> None:
    schema = pa.schema([("n", pa.int64()), ("y", pa.int64())])
    with pytest.raises(StepFailed, match="other columns than for the sample") as caught:
        mapped(lambda frame: frame, pa.table({"n": [1, 2]}), planned=schema)
    assert caught.value.expected == "y"


def plan(rows: pa.Table, *functions: Callable[..., Any]) -> tuple[pa.Schema, ...]:
    steps = tuple(Step(f"f:step{number}", function) for number, function in enumerate(functions))
    return plan_steps(steps, rows, never_null={"n"}).schemas


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda frame: frame.assign(y=None), pa.null()),
        (lambda frame: frame.assign(y=np.nan), pa.float64()),
        (lambda frame: frame.assign(y="w"), pa.string()),
        (lambda frame: frame.assign(y=frame.day.map(lambda day: day.isoformat(), na_action="ignore")), pa.string()),
        (lambda frame: frame.assign(y=frame.code.astype("category")), pa.dictionary(pa.int32(), pa.string())),
        (lambda frame: frame.assign(y=frame.id.isna()), pa.bool_()),
        (lambda frame: frame.assign(y=frame.id % 7), pa.int64()),
        (lambda frame: frame.assign(y=frame.n / 7), pa.float64()),
    ],
)
def test_the_type_of_a_new_column_is_that_of_its_dtype(function: Callable[..., Any], kind: pa.DataType) -> None:
    (schema,) = plan(table(), function)
    assert schema.field("y").type == kind


def test_a_column_that_keeps_its_dtype_keeps_its_type() -> None:
    for rows in (table(), table().slice(0, 0), table().slice(1, 1)):
        (schema,) = plan(rows, lambda frame: frame.assign(x=frame.x + 1, id=frame.id * 2))
        assert [(field.name, field.type) for field in schema] == [(field.name, field.type) for field in table().schema]


def test_the_next_step_gets_the_planned_dtypes() -> None:
    seen: list[set[str]] = [set(), set()]

    def first(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(y=frame.n.where(frame.n > 1))

    def second(frame: pd.DataFrame) -> pd.DataFrame:
        seen[1].add(str(frame["y"].dtype))
        return frame.assign(z="v" + frame["y"].astype(str))

    first_schema, second_schema = plan(table(), first, second)
    assert (first_schema.field("y").type, second_schema.field("z").type) == (pa.float64(), pa.string())
    assert seen[1] == {"float64"}


@pytest.mark.parametrize("backend", ["numpy", "pyarrow"])
def test_texts_of_more_than_two_gib_are_an_error_of_their_rows(backend: str) -> None:
    """A step gets a single row twice, and the offsets of a text have 32 bits. The zeros take no memory."""
    size = 2**30 + 1
    offsets = pa.py_buffer(np.array([0, size], np.int32))
    text = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(np.zeros(size, np.uint8)))
    rows = pa.table({"n": [1], "text": text})
    with pytest.raises(RowsError, match="frame:text") as caught:
        to_frame(pa.concat_tables([rows, rows]), backend=backend)
    assert "cannot hold 2 GiB of the column 'text'" in caught.value.message()


UUIDS = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"a" * 16, b"b" * 16, b"c" * 16], pa.binary(16)))
NARROW = pa.array([1, 2, 3]).cast(pa.decimal128(19)).cast(pa.decimal32(5))
OFFSETS = pa.array([0, 1, 1, 3], pa.int32())
NESTED = (
    pa.StructArray.from_arrays([UUIDS], ["id"]),
    pa.ListArray.from_arrays(OFFSETS, UUIDS),
    pa.LargeListArray.from_arrays(OFFSETS.cast(pa.int64()), UUIDS),
    pa.FixedSizeListArray.from_arrays(UUIDS, 1),
    pa.ListArray.from_arrays(OFFSETS, pa.StructArray.from_arrays([UUIDS], ["id"])),
    pa.StructArray.from_arrays([pa.ListArray.from_arrays(OFFSETS, UUIDS)], ["ids"]),
    pa.ListArray.from_arrays(OFFSETS, UUIDS.storage),
    pa.ListArray.from_arrays(OFFSETS, NARROW),
    pa.MapArray.from_arrays(OFFSETS, pa.array(["a", "b", "c"]), UUIDS),
    pa.MapArray.from_arrays(OFFSETS, UUIDS, pa.array(["a", "b", "c"])),
    pa.MapArray.from_arrays(OFFSETS, pa.array(["a", "b", "c"]), pa.ListArray.from_arrays(OFFSETS, UUIDS)),
)
"""Types that Arrow does not convert for pandas as they are, and their neighbours."""


@pytest.mark.parametrize("backend", ["numpy", "pyarrow"])
@pytest.mark.parametrize("column", NESTED, ids=lambda column: str(column.type))
def test_uuids_and_decimals_inside_of_columns_keep_their_type(column: pa.Array, backend: str) -> None:
    rows = pa.table({"n": [1, 2, 3], "nested": column})

    def step(frame: pd.DataFrame) -> pd.DataFrame:
        return frame[frame["n"] != 2]

    (schema,) = plan_steps((Step("f:step", step, backend),), rows, never_null=()).schemas
    assert schema.field("nested").type == column.type
    result = mapped(step, rows, planned=schema, backend=backend)
    assert result["nested"].combine_chunks().equals(column.take(pa.array([0, 2])))


def test_a_step_can_change_a_list_of_uuids() -> None:
    column = pa.ListArray.from_arrays(OFFSETS, UUIDS)

    def turned(frame: pd.DataFrame) -> pd.DataFrame:
        assert frame["ids"][2].tolist() == [b"b" * 16, b"c" * 16]
        return frame.assign(ids=frame["ids"].map(lambda ids: ids[::-1]))

    rows = pa.table({"ids": column})
    result = mapped(turned, rows, planned=rows.schema)
    assert result["ids"].type == column.type
    assert [[one.bytes for one in cell] for cell in result["ids"].to_pylist()] == [
        [b"a" * 16],
        [],
        [b"c" * 16, b"b" * 16],
    ]


def test_a_sample_that_fits_in_no_frame_is_refused_with_the_other_backend() -> None:
    """It was refused as a step that fails on every row, to be fixed."""
    rows = pa.table({"when": pa.array([1001, 1002], pa.time64("ns"))})
    with pytest.raises(StepFailed, match="fits in the frame") as caught:
        plan_steps((Step("f:step", lambda frame: frame),), rows)
    assert (caught.value.next_step or "").startswith("set dtype_backend: pyarrow")
