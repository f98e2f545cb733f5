"""Checks of map steps on a sample at planning."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.errors import SpecError, StepFailed
from pipeline.scoring.step_plan import plan_steps
from pipeline.scoring.steps import Step

LOOKUP = pd.DataFrame({"k": [0, 1, 1, 3], "w": [1.0, 2.0, 2.0, 4.0]})
RANDOM = np.random.default_rng(3)
CALLS = count()


def sample(rows: int = 64) -> pa.Table:
    number = np.arange(rows)
    return pa.table(
        {
            "id": pa.array(2**53 + 1 + number, mask=number % 11 == 0),
            "x": np.random.default_rng(1).normal(size=rows),
            "code": pa.array(number, mask=number % 9 == 0),
            "k": pa.array(number % 4),
            "segment": pa.array([f"s{row * 7 % 5}" for row in range(rows)]).dictionary_encode(),
            "text": pa.array([None if row % 5 == 0 else f"t{row}" for row in range(rows)]),
        }
    )


def plan(function: Callable[..., Any], *, rows: pa.Table | None = None, **options: Any) -> tuple[pa.Schema, ...]:
    steps = (Step("features:build", function, **options),)
    return plan_steps(steps, sample() if rows is None else rows).schemas


def raising(frame: pd.DataFrame) -> pd.DataFrame:
    if (frame["k"] == 2).any():
        raise ValueError("two")
    return frame.assign(y=frame["x"] + 1)


HONEST = {
    "same": lambda frame: frame,
    "values": lambda frame: frame.assign(y=frame.x * 2, z=frame.k.astype("float32")),
    "key": lambda frame: frame.assign(key="c" + frame["code"].astype(str)),
    "text beside a null": lambda frame: frame.assign(y=frame["text"].str.upper()),
    "drops": lambda frame: frame[frame["x"] > 0],
    "drops all": lambda frame: frame[frame["x"] > 100],
    "reorders": lambda frame: frame.sort_values("x"),
    "join": lambda frame: frame.join(LOOKUP.drop_duplicates("k").set_index("k"), on="k"),
    "merge that keeps the order": lambda frame: frame.merge(LOOKUP.drop_duplicates("k"), on="k", how="left").set_index(
        frame.index
    ),
    "raises on some rows": raising,
    "row by row": lambda frame: frame.assign(y=frame.apply(lambda row: row["x"] * 2, axis=1)),
    "mean over columns": lambda frame: frame.assign(y=frame[["x", "k"] * 6].mean(axis=1)),
    "rare dtype": lambda frame: frame.assign(y=frame["k"].where(frame["k"] > 0)),
    "category": lambda frame: frame.assign(y=frame["segment"].astype("category")),
    "cut at fixed edges": lambda frame: frame.assign(y=pd.cut(frame["x"], [-9, 0, 9], labels=["low", "high"])),
}
DEPENDENT = {
    "shuffled": lambda frame: frame.sample(frac=1, random_state=1).set_axis(frame.index),
    "mean": lambda frame: frame.assign(y=frame.x - frame.x.mean()),
    "rank": lambda frame: frame.assign(y=frame.x.rank()),
    "cumsum": lambda frame: frame.assign(y=frame.x.cumsum()),
    "shift": lambda frame: frame.assign(y=frame.x.shift()),
    "row number": lambda frame: frame.assign(y=frame.index),
    "random": lambda frame: frame.assign(y=RANDOM.random(len(frame))),
    "clock": lambda frame: frame.assign(y=time.perf_counter_ns()),
    "calls": lambda frame: frame.assign(y=next(CALLS)),
    "transform": lambda frame: frame.assign(y=frame.groupby("k").x.transform("mean")),
    "codes": lambda frame: frame.assign(y=frame.segment.astype("category").cat.codes),
    "fill with the median": lambda frame: frame.assign(y=frame.code.fillna(frame.code.median())),
    "first of each": lambda frame: frame.drop_duplicates("k"),
    "head": lambda frame: frame.head(10),
    "largest": lambda frame: frame.nlargest(20, "x"),
    "number of rows": lambda frame: frame.assign(y=len(frame)),
}
LOSES_THE_INDEX = {
    "inner merge": lambda frame: frame.merge(LOOKUP, on="k"),
    "sorted": lambda frame: frame.sort_values("x", ignore_index=True),
    "groups": lambda frame: pd.concat([part for _, part in frame.groupby("k")], ignore_index=True),
}


@pytest.mark.parametrize("backend", ["numpy", "pyarrow"])
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_step_passes(name: str, backend: str) -> None:
    plan(HONEST[name], dtype_backend=backend)


@pytest.mark.fault(80)
@pytest.mark.parametrize("backend", ["numpy", "pyarrow"])
@pytest.mark.parametrize("name", DEPENDENT)
def test_a_step_that_looks_at_other_rows_is_refused(name: str, backend: str) -> None:
    with pytest.raises(StepFailed, match="depends on the other rows") as caught:
        plan(DEPENDENT[name], dtype_backend=backend)
    assert caught.value.where == "features:build"
    assert "row" in caught.value.found
    assert "row_wise: unchecked" in caught.value.next_step
    plan(DEPENDENT[name], dtype_backend=backend, row_wise="unchecked")


@pytest.mark.fault(79)
@pytest.mark.parametrize("name", LOSES_THE_INDEX)
def test_a_step_that_loses_the_index_is_refused(name: str) -> None:
    with pytest.raises(StepFailed, match="lost the index"):
        plan(LOSES_THE_INDEX[name])


def test_the_difference_is_shown() -> None:
    rows = pa.table({"x": [1.0, 2.0, 3.0, 4.0]})
    with pytest.raises(StepFailed) as caught:
        plan(lambda frame: frame.assign(y=frame.x - frame.x.mean()), rows=rows)
    assert caught.value.found == (
        "column 'y', row 0 of a sample: -1.5 with all rows, -0.5 with the first half of the rows"
    )
    with pytest.raises(StepFailed) as caught:
        plan(lambda frame: frame.head(3), rows=rows)
    assert caught.value.found == "row 3 of a sample is dropped with all rows, returned with the second half of the rows"


def test_a_step_is_called_seven_times() -> None:
    sizes: list[int] = []
    plan(lambda frame: sizes.append(len(frame)) or frame)
    assert sizes == [64, 64, 32, 32, 32, 64, 2]
    sizes.clear()
    plan(lambda frame: sizes.append(len(frame)) or frame, row_wise="unchecked")
    assert sizes == [64]


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_small_samples_are_planned(rows: int) -> None:
    (schema,) = plan(lambda frame: frame.assign(y=frame.x * 2), rows=sample().slice(0, rows))
    assert schema.field("y").type == pa.float64()


def test_a_source_column_with_the_name_of_the_index_is_refused() -> None:
    with pytest.raises(SpecError, match="__row__"):
        plan(lambda frame: frame, rows=pa.table({"__row__": [1], "x": [2.0]}))
