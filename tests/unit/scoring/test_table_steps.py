"""Steps that take Arrow tables or Polars frames: as with pandas, their result for a row depends on the row alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StepFailed
from pipeline.report.verify import verify
from pipeline.scoring.frame_schemas import FrameSchemas
from pipeline.scoring.rows import Rows
from pipeline.scoring.step_frames import map_rows
from pipeline.scoring.step_plan import plan_steps
from pipeline.scoring.steps import Step
from pipeline.scoring.table_steps import frame_kind
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.inline import plan_inline, publish_inline, score_inline
from pipeline.testing.oracle import make_table

if TYPE_CHECKING:
    import polars as hidden

TABLE = pa.table(
    {
        "a": pa.array([1, None, 3, 4], pa.int64()),
        "text": pa.array(["x", "y", None, "x"]).dictionary_encode(),
        "list": pa.array([[1], [], None, [2, 3]], pa.list_(pa.int32())),
    }
)


def double(table: pa.Table) -> pa.Table:
    return table.set_column(0, "a", pc.multiply(table["a"], 2))


def double_polars(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(a=pl.col("a") * 2)


BOTH = pytest.mark.parametrize("function", [double, double_polars], ids=["arrow", "polars"])


def step_of(function: Callable[..., Any], **fields: Any) -> Step:
    return Step("m:f", function, kind=frame_kind(function), **fields)


def run(function: Callable[..., Any], table: pa.Table = TABLE, **fields: Any) -> tuple[pa.Table, list[int], list[str]]:
    parts, failures = map_rows([step_of(function, **fields)], Rows.from_table(table))
    made = Rows.concat(parts, table.schema)
    return made.table, made.position.tolist(), list(failures.reasons)


@BOTH
def test_columns_keep_their_types_and_rows_their_places(function: Callable[..., Any]) -> None:
    made, position, _ = run(function)
    assert made.schema.equals(TABLE.schema)
    assert made["a"].to_pylist() == [2, None, 6, 8]
    assert made.drop_columns(["a"]).equals(TABLE.drop_columns(["a"]))
    assert position == [0, 1, 2, 3]


def test_rows_may_be_dropped_and_sorted() -> None:
    def step(table: pa.Table) -> pa.Table:
        return table.filter(pc.is_valid(table["a"])).sort_by([("a", "descending")])

    made, position, _ = run(step)
    assert (made["a"].to_pylist(), position) == ([1, 3, 4], [0, 2, 3])


@BOTH
def test_a_row_that_raises_is_found(function: Callable[..., Any]) -> None:
    def arrow(table: pa.Table) -> pa.Table:
        if 3 in table["a"].to_pylist():
            raise ValueError("three")
        return function(table)

    def polars(frame: pl.DataFrame) -> pl.DataFrame:
        if 3 in frame["a"].to_list():
            raise ValueError("three")
        return function(frame)

    made, position, reasons = run(arrow if function is double else polars)
    assert (made["a"].to_pylist(), position, reasons) == ([2, None, 8], [0, 1, 3], ["step:m:f:ValueError"])


@BOTH
def test_batches_of_any_size_give_the_planned_types(function: Callable[..., Any]) -> None:
    plan = plan_steps([step_of(function)], TABLE)
    assert plan.schemas[0].names == TABLE.column_names
    for start in range(4):
        part = Rows.from_table(TABLE.slice(start, 1))
        (made,), _ = map_rows([step_of(function)], part, schemas=FrameSchemas(after=plan.schemas))
        assert made.table.schema.equals(plan.schemas[0].remove_metadata())
        assert made.table["a"].to_pylist() == [None if (a := TABLE["a"][start].as_py()) is None else 2 * a]


def test_a_step_that_is_not_row_wise_is_refused() -> None:
    def centre(table: pa.Table) -> pa.Table:
        return table.set_column(0, "a", pc.subtract(table["a"], pc.sum(table["a"])))

    with pytest.raises(StepFailed, match="depend"):
        plan_steps([step_of(centre)], pa.table({"a": np.arange(50)}))


def test_results_that_are_refused() -> None:
    def without_rows(table: pa.Table) -> pa.Table:
        return table.select(["a"])

    def twice(table: pa.Table) -> pa.Table:
        return pa.concat_tables([table, table])

    def frame(table: pa.Table) -> Any:
        return table.to_pandas()

    def nothing(table: pa.Table) -> pa.Table:
        return table.select(["__row__"])

    for function, message in [
        (without_rows, "lost the column"),
        (twice, "added rows"),
        (frame, "must return a pyarrow.Table"),
        (nothing, "returned no columns"),
    ]:
        with pytest.raises(StepFailed, match=message):
            run(function)
    assert run(without_rows, row_wise="unchecked")[1] == [0, 1, 2, 3]


def test_a_value_that_does_not_fit_the_planned_type_fails_the_step() -> None:
    def grow(table: pa.Table) -> pa.Table:
        return table.append_column("made", pc.cast(table["a"], pa.float64() if len(table) == 3 else pa.int64()))

    planned = FrameSchemas(after=(pa.schema([("made", pa.int64())]),))
    rows = Rows.from_table(pa.table({"a": [0.5, 1.5, 2.5]}))
    with pytest.raises(StepFailed, match="another type than in the sample"):
        map_rows([step_of(grow)], rows, schemas=planned)


def test_what_a_step_takes_is_told_by_its_annotation() -> None:
    def quoted(frame: pl.DataFrame) -> pl.DataFrame: ...  # quoted by the import from __future__

    def unknown_here(frame: hidden.DataFrame) -> hidden.DataFrame: ...

    def pandas(frame: pd.DataFrame) -> pd.DataFrame: ...

    class Callable_:
        def __call__(self, table: pa.Table) -> pa.Table: ...

    kinds = [frame_kind(one) for one in (quoted, unknown_here, pandas, lambda frame: frame, Callable_(), len)]
    assert kinds == ["polars", "pandas", "pandas", "pandas", "arrow", "pandas"]


def test_a_job_with_steps_of_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kinds.py").write_text(
        "import pyarrow as pa, pyarrow.compute as pc, polars as pl\n"
        "def arrow(table: pa.Table) -> pa.Table:\n"
        "    return table.append_column('b', pc.add(table['age'], 1))\n"
        "def frame(frame):\n"
        "    return frame.assign(c=frame['b'] * 2)\n"
        "def polars(frame: pl.DataFrame) -> pl.DataFrame:\n"
        "    return frame.filter(pl.col('c') > 60).with_columns(d=pl.col('c') - pl.col('age'))\n"
        "async def waits(table: pa.Table) -> pa.Table:\n"
        "    return table.append_column('e', pc.negate(table['d']))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = make_table(2500, seed=5)
    pq.write_table(source, tmp_path / "part.parquet")
    steps = [{"map": f"kinds:{name}"} for name in ("arrow", "frame", "polars")]
    spec = JobSpec.build(
        name="kinds",
        source={"path": str(tmp_path / "part.parquet")},
        steps=[*steps, {"map": "kinds:waits", "concurrency": 4, "rows_per_call": 64}, {"select": ["id", "d", "e"]}],
        sink={"path": str(tmp_path / "out")},
    )
    job = score_inline(plan_inline(spec, directory=tmp_path / "jobs"), directory=tmp_path / "jobs", job="k-1")
    publish_inline(job)
    ages = source["age"].to_numpy()
    kept = 2 * (ages + 1) > 60
    expected = 2 * (ages[kept] + 1) - ages[kept]
    found = pq.read_table(tmp_path / "out")
    assert found["id"].to_numpy().tolist() == np.flatnonzero(kept).tolist()
    assert found["d"].to_numpy().tolist() == expected.tolist()
    assert found["e"].to_numpy().tolist() == (-expected).tolist()
    assert verify(job, sample=500, seed=1).ok
