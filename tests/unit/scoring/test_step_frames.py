"""Frames before and after map steps: values, nulls, index, and dropped rows."""

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


def returned(table: pa.Table) -> pa.Table:
    """Return ``table`` after an honest step: dictionaries have indices of one width in all batches."""
    index = table.column_names.index("dictionary")
    plain = table.column("dictionary").cast(pa.string()).combine_chunks().dictionary_encode()
    return table.set_column(index, "dictionary", plain)


def same(one: pa.Table, other: pa.Table) -> bool:
    """Types, nulls and values, NaN included."""
    return one.schema.equals(other.schema) and repr(one.to_pylist()) == repr(other.to_pylist())


@pytest.mark.parametrize("backend", ["numpy", "pyarrow"])
def test_untouched_columns_come_out_as_they_went_in(backend: str) -> None:
    table = everything()
    result, rows = run(lambda frame: frame, table, backend)
    assert same(result, returned(table))
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
    assert same(result.select(table.column_names), returned(table.slice(1)))


def test_changed_columns_have_the_values_of_the_step() -> None:
    def step(frame: pd.DataFrame) -> pd.DataFrame:
        frame["int64"] = frame["int64"].fillna(0)
        frame.loc[frame["text"] == "a", "text"] = "b"
        frame["twice"] = frame["full"] * 2.5
        frame["word"] = "w"
        return frame.rename(columns={"bool": "flag"})

    table = everything()
    result, _ = run(step, table)
    assert result.column("int64").to_pylist() == [1, 0, 2**62 + 1, -4]
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


WEIGHTS = pd.DataFrame({"full": [1, 1, 3, 4], "weight": [0.1, 0.2, 0.3, 0.4]}).astype({"full": "int8"})
"""A key twice and another one missing: an inner join has as many rows as before."""


@pytest.mark.fault(79)
@pytest.mark.parametrize(
    "step",
    [
        lambda frame: frame.merge(WEIGHTS, on="full"),
        lambda frame: frame.merge(WEIGHTS.drop_duplicates("full"), on="full", how="left"),
        lambda frame: frame.sort_values("int64", ignore_index=True),
        lambda frame: frame.sort_values("int64").reset_index(drop=True),
        lambda frame: frame.reset_index(),
        lambda frame: pd.concat([part for _, part in frame.groupby("text")], ignore_index=True),
        lambda frame: frame.set_index("full"),
        lambda frame: frame.rename_axis(None),
        lambda frame: frame.set_index("int64", append=True),
    ],
)
def test_a_lost_index_is_refused_however_many_rows_there_are(step: Callable[..., Any]) -> None:
    with pytest.raises(StepFailed, match="lost the index '__row__'") as caught:
        run(step, everything())
    assert "frame.join(" in caught.value.next_step
    assert ".set_index(frame.index)" in caught.value.next_step


@pytest.mark.parametrize(
    "step",
    [
        lambda frame: frame.join(WEIGHTS.drop_duplicates("full").set_index("full"), on="full"),
        lambda frame: frame.merge(WEIGHTS.drop_duplicates("full"), on="full", how="left").set_index(frame.index),
    ],
)
def test_a_join_that_keeps_the_index_is_row_by_row(step: Callable[..., Any]) -> None:
    result, rows = run(step, everything())
    assert rows == [0, 1, 2, 3]
    assert result.column("weight").to_pylist() == [0.1, None, 0.3, 0.4]


def test_an_unchecked_step_may_lose_the_index_and_keep_all_rows() -> None:
    def run_unchecked(function: Callable[..., Any]) -> Rows:
        step = Step("features:build", function, row_wise="unchecked")
        return run_steps([step], Rows.from_table(everything()))

    rows = run_unchecked(lambda frame: frame.merge(WEIGHTS.drop_duplicates("full"), on="full", how="left"))
    assert rows.position.tolist() == [0, 1, 2, 3]
    for step in (lambda frame: frame.iloc[:2].reset_index(drop=True), lambda frame: frame.set_index("full")):
        with pytest.raises(StepFailed, match="lost the index"):
            run_unchecked(step)


def test_a_column_may_have_the_name_row() -> None:
    table = pa.table({"row": [3, 1, 2]})
    result, rows = run(lambda frame: frame.sort_values("row").query("row > 1"), table)
    assert (result.column("row").to_pylist(), rows) == ([3, 2], [0, 2])


def test_a_row_alone_has_the_bits_that_it_has_in_a_batch() -> None:
    values = np.random.default_rng(5).normal(size=(40, 13))
    table = pa.table({f"x{number}": values[:, number] for number in range(13)})

    def step(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(sum=frame.sum(axis=1), mean=frame.mean(axis=1), std=frame.std(axis=1))

    whole, _ = run(step, table)
    single = [run(step, table.slice(row, 1)) for row in range(40)]
    assert all(rows == [0] for _, rows in single)
    assert pa.concat_tables([one for one, _ in single]).combine_chunks().equals(whole.combine_chunks())


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
        (lambda frame: frame.set_index(pd.Index(list("abcd"), name="__row__")), "changed the index"),
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


def test_exception_of_a_step_may_be_about_rows() -> None:
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
