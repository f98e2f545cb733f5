"""Frames with pandas' default dtypes, of tables of every type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.errors import InputError
from pipeline.scoring.pandas_frame import default_frame, pandas_type
from pipeline.testing.oracle import FEATURES, train_model

UUIDS = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"a" * 16, b"b" * 16, None], pa.binary(16)))
OFFSETS = pa.array([0, 1, 1, 3], pa.int32())
LISTS = pa.ListArray.from_arrays(OFFSETS, UUIDS)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (pa.list_(pa.uuid()), pa.list_(pa.binary())),
        (pa.large_list(pa.binary(3)), pa.large_list(pa.binary())),
        (pa.list_(pa.decimal32(5, 2), 2), pa.list_(pa.decimal128(5, 2), 2)),
        (pa.struct({"a": pa.map_(pa.uuid(), pa.list_(pa.decimal64(9, 1)))}),
         pa.struct({"a": pa.map_(pa.binary(), pa.list_(pa.decimal128(9, 1)))})),
        (pa.list_(pa.string()), pa.list_(pa.string())), (pa.binary(3), pa.binary(3)), (pa.uuid(), pa.uuid()),
    ],
    ids=str,
)  # fmt: skip
def test_types_that_arrow_converts(kind: pa.DataType, expected: pa.DataType) -> None:
    assert pandas_type(kind) == expected
    for rows in (0, 2):
        assert len(default_frame(pa.table({"c": pa.nulls(rows, kind)}), next_step="")) == rows


def test_lists_of_uuids_are_lists_of_bytes() -> None:
    frame = default_frame(pa.table({"ids": LISTS, "n": [1, 2, 3]}), next_step="")
    assert [cell.tolist() for cell in frame["ids"]] == [[b"a" * 16], [], [b"b" * 16, None]]
    assert frame["n"].dtype == "int64"


@pytest.mark.fault(115)
def test_column_that_pandas_cannot_hold_is_named() -> None:
    table = pa.table({"n": [1], "times": pa.array([[1]], pa.list_(pa.time64("ns")))})
    with pytest.raises(InputError, match="'times'") as caught:
        default_frame(table, next_step="read it with Arrow")
    assert caught.value.next_step == "read it with Arrow"


@pytest.mark.fault(115)
@pytest.mark.parametrize("column", [LISTS, pa.array([[1], [], [2]], pa.list_(pa.time64("ns")))], ids=["uuids", "times"])
def test_to_dask_returns_or_names_the_column(tmp_path: Path, column: pa.Array) -> None:
    """Both ended with an error of pyarrow; the first before a row was read."""
    (tmp_path / "lake").mkdir()
    features: dict[str, Any] = {name: [1.0, 2.0, 3.0] for name in FEATURES}
    pq.write_table(pa.table({"c": column, **features}), tmp_path / "lake" / "a.parquet")
    job = pipeline.Job(
        name="j",
        source={"path": str(tmp_path / "lake")},
        steps=[{"score": {"model": str(train_model(tmp_path / "m.ubj")), "keep": ["c"]}}],
        sink={"path": str(tmp_path / "out")},
    )
    lazy = job.to_dask()
    if column is LISTS:
        frame = lazy.compute(scheduler="synchronous")
        assert isinstance(frame, pd.DataFrame)
        assert frame["c"][0].tolist() == [b"a" * 16]
    else:
        with pytest.raises(InputError, match="'c'") as caught:
            lazy.compute(scheduler="synchronous")
        assert "score.keep" in (caught.value.next_step or "")
