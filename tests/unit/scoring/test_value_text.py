"""Values of Arrow columns that Python cannot hold, in messages, comparisons and rejects."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from pipeline.plan.recipe import ColumnRule
from pipeline.report.rejects import export, summarise
from pipeline.report.same_values import same_values
from pipeline.scoring.arrow import LossyCastError, cast_exactly, first_difference
from pipeline.scoring.contract import check
from pipeline.scoring.value_text import python_value, value_text
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.inline import plan_inline, score_inline
from pipeline.testing.oracle import FEATURES, train_model


def int64(value: int, kind: pa.DataType) -> pa.Array:
    return pa.array([value, 0, None], pa.int64()).view(kind)


BROKEN = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
BEYOND = [
    int64(2**62, pa.timestamp("s")),
    int64(2**62, pa.timestamp("us", "Europe/Berlin")),
    int64(1, pa.timestamp("us", "Mars/X")),
    int64(2**62, pa.date64()),
    pa.array([2**31 - 1, 0, None], pa.int32()).view(pa.date32()),
    int64(-(2**62), pa.time64("us")),
    int64(-(2**63), pa.time64("ns")),
    int64(2**62, pa.duration("s")),
    BROKEN,
]
NAMES = [f"{array.type}" for array in BEYOND]


@pytest.mark.parametrize("array", BEYOND, ids=NAMES)
def test_a_value_that_python_cannot_hold_is_shown_as_arrow_shows_it(array: pa.Array) -> None:
    with pytest.raises((ValueError, OverflowError, KeyError)):  # KeyError: unknown zones, with pyarrow before 26
        array[0].as_py()
    nested = pa.StructArray.from_arrays([array], ["a"])
    for column in (array, pa.chunked_array([array]), array.dictionary_encode(), nested):
        assert value_text(column, 0)
        assert isinstance(python_value(column, 0), str)
        assert len(value_text(column, 0, limit=5)) <= 5


@pytest.mark.parametrize("value", [None, 1.5, "x", dt.date(2020, 1, 1), [1], {"a": None}], ids=repr)
def test_other_values_are_those_of_python(value: Any) -> None:
    assert (python_value(pa.array([value]), 0), value_text(pa.array([value]), 0)) == (value, repr(value))


@pytest.mark.fault(114)
@pytest.mark.parametrize("array", BEYOND, ids=NAMES)
def test_a_row_with_such_a_value_is_rejected(array: pa.Array) -> None:
    """The message of the rejected row raised on the worker, and the partition failed."""
    for rule in (ColumnRule("c", dtype="int8"), ColumnRule("c", allowed=())):
        failures = check(pa.table({"c": array}), [rule])
        assert failures.rows[0] == 0
        assert failures.messages[0].startswith("c is ")


@pytest.mark.parametrize("array", BEYOND, ids=NAMES)
def test_columns_with_such_values_compare(array: pa.Array) -> None:
    for column in (array, pa.StructArray.from_arrays([array], ["a"])):
        assert first_difference(column, column) is None
        assert same_values(pa.chunked_array([column]), pa.chunked_array([column]))
        other = pa.concat_arrays([column.slice(1), column.slice(0, 1)])
        if len(column) > 1:
            assert first_difference(column, other) == 0
            assert not same_values(pa.chunked_array([column]), pa.chunked_array([other]))


def test_a_cast_that_loses_such_a_value_says_so() -> None:
    with pytest.raises(LossyCastError, match="out of range"):
        cast_exactly(int64(2**62, pa.timestamp("s")), pa.timestamp("ns"))


@pytest.mark.fault(114)
def test_rejects_show_and_export_such_values(tmp_path: Path) -> None:
    """Both were called a defect of the pipeline package."""
    far = pa.array([2**31 - 1, 0, 5], pa.int32()).view(pa.date32())
    days = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), far)
    table = pa.table({"day": far, "days": days, **{name: [1.0, 2.0, 3.0] for name in FEATURES}})
    (tmp_path / "lake").mkdir()
    pq.write_table(table, tmp_path / "lake" / "a.parquet")
    spec = JobSpec.build(
        name="far",
        source={"path": str(tmp_path / "lake")},
        steps=[{"score": {"model": str(train_model(tmp_path / "m.ubj"))}}],
        sink={"path": str(tmp_path / "out")},
        contract={"day": {"max": "9999-12-31"}},
        errors={"max_fraction": 1.0},
    )
    job = score_inline(plan_inline(spec, directory=tmp_path / "jobs"), directory=tmp_path / "jobs", job="far")
    (group,) = summarise(job).groups
    assert group.count == 1
    assert "out of range" in group.examples[0].values["day"]
    export(job, str(tmp_path / "rejects.csv"))
    assert csv.read_csv(tmp_path / "rejects.csv")["_row"].to_pylist() == [0]
