from __future__ import annotations

import datetime as dt
import decimal
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.errors import StepFailed
from pipeline.scoring.bisection import RowsError
from pipeline.scoring.rows import Rows
from pipeline.scoring.step_frames import ROW_INDEX, run_steps
from pipeline.scoring.steps import Step

NAN = float("nan")


def everything() -> pa.Table:
    """A column of every kind of type that pandas may spoil, with nulls."""
    text = pa.array(["a", None, "c", "a"])
    stamps = [dt.datetime(2026, 1, 1, 0, 0, 0, 7), None, dt.datetime(1700, 5, 5), dt.datetime(2300, 1, 1)]
    return pa.table(
        {
            "int64": pa.array([1, None, 2**62 + 1, -4]),
            "full": pa.array([1, 2, 3, 4], pa.int8()),
            "uint8": pa.array([1, None, 255, 0], pa.uint8()),
            "bool": pa.array([True, None, False, True]),
            "float32": pa.array([0.1, None, NAN, -0.0], pa.float32()),
            "float64": pa.array([0.1, NAN, None, 1e300]),
            "float16": pa.array(np.array([1, 2, 3, 4], np.float16)),
            "text": text,
            "large": text.cast(pa.large_string()),
            "view": text.cast(pa.string_view()),
            "binary": pa.array([b"\0\1", None, b"", b"x"]),
            "decimal": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-2.00"), decimal.Decimal("0.05")]),
            "dictionary": pa.DictionaryArray.from_arrays(pa.array([0, None, 1, 0], pa.int8()), ["x", "y"]),
            "date": pa.array([dt.date(2026, 1, 1), None, dt.date(1, 1, 1), dt.date(9999, 1, 1)]),
            "time": pa.array([dt.time(1), None, dt.time(2, 3, 4, 5), dt.time(0)]),
            "us": pa.array(stamps, pa.timestamp("us")),
            "zoned": pa.array(stamps, pa.timestamp("us", "Europe/Berlin")),
            "seconds": pa.array([1, None, 3, 4], pa.duration("s")),
            "list": pa.array([[1.0, NAN, None], None, [], [2.0]]),
            "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": None}, {"a": 2, "b": ""}]),
            "map": pa.array([[("k", 1)], None, [], [("l", None)]], pa.map_(pa.string(), pa.int64())),
            "null": pa.nulls(4),
        }
    )


def run(function: Callable[..., Any], table: pa.Table, backend: str = "numpy") -> tuple[pa.Table, list[int]]:
    rows = run_steps([Step("features:build", function, backend)], Rows.from_table(table))
    return rows.table, rows.position.tolist()


def same(one: pa.Table, other: pa.Table) -> bool:
    """Types, nulls and values, NaN included."""
    return one.schema.equals(other.schema) and repr(one.to_pylist()) == repr(other.to_pylist())


@pytest.mark.parametrize("backend", ["numpy", "pyarrow"])
def test_untouched_columns_come_out_as_they_went_in(backend: str) -> None:
    table = everything()
    result, rows = run(lambda frame: frame, table, backend)
    assert same(result, table)
    assert rows == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", ["numpy", "pyarrow"])
@pytest.mark.parametrize(
    "step",
    [
        lambda frame: frame[frame.full > 1],
        lambda frame: frame.iloc[[3, 1, 2]],
        lambda frame: frame.drop(0).copy(),
        lambda frame: frame.query("full > 1").assign(new=1),
    ],
)
def test_rows_may_be_dropped_and_keep_their_order(backend: str, step: Callable[..., Any]) -> None:
    table = everything()
    result, rows = run(step, table, backend)
    assert rows == [1, 2, 3]
    assert same(result.select(table.column_names), table.slice(1))


def test_what_a_step_changed_is_what_it_says() -> None:
    def step(frame: pd.DataFrame) -> pd.DataFrame:
        frame["int64"] = frame["int64"].fillna(0)
        frame.loc[frame["text"] == "a", "text"] = "b"
        frame["twice"] = frame["full"] * 2.5
        frame["word"] = "w"
        return frame.rename(columns={"bool": "flag"})

    table = everything()
    result, _ = run(step, table)
    assert result.column("int64").to_pylist() == [1.0, 0.0, float(2**62), -4.0]
    assert result.column("text").to_pylist() == ["b", None, "c", "b"]
    assert result.schema.field("text").type == pa.string()
    assert result.schema.field("word").type == pa.string()
    assert result.column("twice").to_pylist() == [2.5, 5.0, 7.5, 10.0]
    assert "bool" not in result.column_names
    for name in ("zoned", "decimal", "list", "uint8"):
        assert same(result.select([name]), table.select([name]))


def test_a_change_of_the_sign_of_zero_is_a_change() -> None:
    result, _ = run(lambda frame: frame.assign(x=frame.x + 0.0), pa.table({"x": [-0.0, 1.0]}))
    assert str(result.column("x").to_pylist()) == "[0.0, 1.0]"


def test_writing_in_place_reaches_the_result_and_not_the_input() -> None:
    def step(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[0, "full"] = 100
        frame["float32"] += 1
        frame["list"].iloc[3][0] = 5.0
        frame["struct"].iloc[0]["a"] = 9
        return frame

    table = everything()
    before = repr(table.to_pylist())
    result, _ = run(step, table)
    assert result.column("full").to_pylist() == [100, 2, 3, 4]
    assert result.column("float32")[0].as_py() == pytest.approx(1.1)
    assert result.column("list")[3].as_py() == [5.0]
    assert result.column("struct")[0].as_py() == {"a": 9, "b": "x"}
    assert repr(table.to_pylist()) == before


def test_the_index_is_the_position_in_the_batch() -> None:
    seen: list[pd.Index[Any]] = []
    run(lambda frame: seen.append(frame.index) or frame, everything().slice(1, 2))
    assert seen[0].name == ROW_INDEX
    assert seen[0].dtype == np.int64
    assert seen[0].tolist() == [0, 1]


def test_a_lost_index_is_fine_while_all_rows_are_there() -> None:
    lookup = pd.DataFrame({"full": [1, 2, 3, 4], "weight": [0.1, 0.2, 0.3, 0.4]})
    table = everything()
    result, rows = run(lambda frame: frame.merge(lookup, on="full", how="left"), table)
    assert rows == [0, 1, 2, 3]
    assert result.column("weight").to_pylist() == [0.1, 0.2, 0.3, 0.4]
    assert same(result.select(table.column_names), table)


def test_steps_of_one_or_two_backends_follow_each_other() -> None:
    steps = [
        Step("f:one", lambda frame: frame[frame.full != 2]),
        Step("f:two", lambda frame: frame[frame.full != 3].assign(n=frame.index.max())),
        Step("f:three", lambda frame: frame.assign(kind=str(frame.dtypes["full"])), "pyarrow"),
        Step("f:four", lambda frame: frame[frame.full > 1]),
    ]
    rows = run_steps(steps, Rows.from_table(everything()))
    assert rows.position.tolist() == [3]
    assert rows.table.column("n").to_pylist() == [2]
    assert rows.table.column("kind").to_pylist() == ["int8[pyarrow]"]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda frame: None, "must return a DataFrame"),
        (lambda frame: frame["full"], "must return a DataFrame"),
        (lambda frame: frame.iloc[:2].reset_index(drop=True), "lost the index"),
        (lambda frame: pd.concat([frame, frame]), "added rows"),
        (lambda frame: frame.set_index(frame.index + 1), "added rows"),
        (lambda frame: frame.set_index(pd.Index(list("abcd"), name="row")), "changed the index"),
        (lambda frame: frame.set_axis([1] * len(frame.columns), axis=1), "cannot be written"),
        (lambda frame: frame[["full", "full"]], "cannot be written"),
        (lambda frame: frame[[]], "no columns"),
        (lambda frame: frame.assign(x=[1, "a", None, 2.5]), "cannot be written"),
    ],
)
def test_a_broken_promise_is_named(step: Callable[..., Any], message: str) -> None:
    with pytest.raises(StepFailed, match=message) as caught:
        run(step, everything())
    assert caught.value.where == "features:build"


def test_what_a_step_raises_may_be_about_rows() -> None:
    with pytest.raises(RowsError) as caught:
        run(lambda frame: frame["nothing"], everything())
    assert caught.value.reason == "step:features:build:KeyError"


def test_warnings_do_not_fail_a_step() -> None:
    def step(frame: pd.DataFrame) -> pd.DataFrame:
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return frame

    with pytest.warns(DeprecationWarning, match="old"):
        result, _ = run(step, everything())
    assert result.num_rows == 4


def test_no_rows_go_through() -> None:
    result, rows = run(lambda frame: frame.assign(y=frame.full * 2.0), everything().slice(0, 0))
    assert rows == []
    assert result.schema.field("y").type == pa.float64()


def test_made_categories_have_one_type_whatever_is_in_them() -> None:
    result, _ = run(lambda frame: frame.assign(c=frame.text.astype("category")), everything())
    assert result.schema.field("c").type == pa.dictionary(pa.int32(), pa.string())
