"""Jobs with ``dask`` steps on a running cluster: planned, published, verified, retried, and as lazy frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.errors import SpecError, StepFailed
from pipeline.jobs.listing import find_job
from pipeline.jobs.stages import stage_states
from pipeline.report.verify import verify
from pipeline.runner import retry, run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec

ROWS = 6000
JOINED = "steps_for_tests:joined"


@pytest.fixture
def tables(tmp_path: Path) -> pd.DataFrame:
    """Write orders and customers; return their join by pandas, sorted by order."""
    random = np.random.default_rng(11)
    orders = pd.DataFrame(
        {"order": np.arange(ROWS), "customer": random.integers(0, 220, ROWS), "price": random.integers(1, 99, ROWS)}
    )
    customers = pd.DataFrame({"customer": np.arange(200), "country": [f"c{n % 5}" for n in range(200)]})
    for name, frame in (("orders", orders), ("customers", customers)):
        (tmp_path / name).mkdir()
        half = len(frame) // 2
        for number in range(2):
            part = pa.Table.from_pandas(frame.iloc[number * half : (number + 1) * half], preserve_index=False)
            pq.write_table(part, tmp_path / name / f"{number}.parquet", row_group_size=1000)
    return orders.merge(customers, on="customer").sort_values("order").reset_index(drop=True)


def spec_of(folder: Path, *steps: Any, **fields: Any) -> JobSpec:
    return JobSpec.build(
        **{
            "name": "joins",
            "source": {"path": str(folder / "orders")},
            "steps": steps,
            "sink": {"path": str(folder / "out"), "mode": "overwrite"},
            **fields,
        }
    )


def dask_step(folder: Path, function: Any, **fields: Any) -> dict[str, Any]:
    table = {"customers": {"path": str(folder / "customers")}}
    return {"dask": function, "inputs": table, "partition_bytes": 30_000, **fields}


def published(folder: Path, key: str = "order") -> pd.DataFrame:
    return pq.read_table(folder / "out").to_pandas().sort_values(key).reset_index(drop=True)


def test_a_step_alone_is_a_job(tables: pd.DataFrame, settings: Settings, tmp_path: Path) -> None:
    """The function travels by value, as that of a notebook's cell."""

    def spent(df, customers):
        together = df.merge(customers, on="customer")
        sums = together.groupby("country").agg({"price": "sum", "order": "count"}).reset_index()
        return sums.rename(columns={"order": "orders"})

    report = run(spec_of(tmp_path, dask_step(tmp_path, spent)), settings=settings)
    expected = tables.groupby("country").agg(price=("price", "sum"), orders=("order", "count")).reset_index()
    pd.testing.assert_frame_equal(published(tmp_path, "country"), expected, check_dtype=False)
    assert (report.rows.input, report.rows.output, report.rows.made) == (ROWS, 5, 5 - ROWS)
    assert f"{ROWS:,} in − {ROWS - 5:,} in dask steps = 5 out" in str(report)
    job = find_job(settings.directory, report.job)
    result = verify(job)
    assert result.ok, result


def test_rows_pass_through_two_joins_and_steps_between(
    tables: pd.DataFrame, settings: Settings, tmp_path: Path
) -> None:
    spec = spec_of(
        tmp_path,
        {"filter": "price > 10"},
        dask_step(tmp_path, JOINED),
        {"map": "steps_for_tests:double_price"},
        {"checkpoint": True},
        {"filter": "twice < 150"},
        {"dask": lambda df: df.drop_duplicates(subset=["customer", "price"])[["customer", "price", "twice"]]},
        {"select": ["customer", "price", "twice"]},
    )
    report = run(spec, settings=settings)
    rows = tables[tables["price"] > 10].assign(twice=lambda frame: frame["price"] * 2)
    rows = rows[rows["twice"] < 150][["customer", "price", "twice"]].drop_duplicates()
    found = published(tmp_path, "customer").sort_values(["customer", "price"]).reset_index(drop=True)
    expected = rows.sort_values(["customer", "price"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    assert report.rows.is_reconciled
    assert [stage.steps for stage in report.stages] == ["0", "1", "2", "4", "5", "6"]
    result = verify(find_job(settings.directory, report.job))
    assert result.ok, result
    with dask.config.set({"scheduler": "synchronous", "dataframe.shuffle.method": "tasks"}):
        lazy = pipeline.Job._of(spec, settings).to_dask().compute()
    lazy = lazy.sort_values(["customer", "price"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(lazy, expected, check_dtype=False)


@pytest.mark.parametrize("origin", [False, True])
def test_a_reject_behind_a_join_names_its_row(
    tables: pd.DataFrame, settings: Settings, tmp_path: Path, origin: bool
) -> None:
    spec = spec_of(
        tmp_path,
        dask_step(tmp_path, JOINED, origin=origin),
        {"map": "steps_for_tests:refuse_order_13"},
        errors={"max_fraction": 0.1},
    )
    report = run(spec, settings=settings)
    (row,) = tables.index[tables["order"] == 13]
    assert report.rows.rejected == 1
    job = find_job(settings.directory, report.job)
    stage = stage_states(job)[-1].job
    assert stage is not None
    (file,) = Path(stage.store.root).glob("rounds/0/rejects/*.parquet")
    reject = pq.read_table(file).to_pylist()[0]
    if origin:
        assert (reject["_file"], reject["_row"]) == (str(tmp_path / "orders" / "0.parquet"), 13)
        assert "_file" not in published(tmp_path).columns
    else:
        assert "/steps/0/" in reject["_file"]
        assert pq.read_table(reject["_file"]).to_pylist()[reject["_row"]]["order"] == 13
    assert list(published(tmp_path)["order"]) == list(tables["order"].drop(row))


def test_rows_that_a_retry_recovers_go_through_the_join(
    tables: pd.DataFrame, settings: Settings, tmp_path: Path
) -> None:
    code = tmp_path / "mending.py"
    text = "def check(frame):\n    if (frame['order'] == 13).any(): raise ValueError('unlucky')\n    return frame\n"
    code.write_text(text)
    own = Settings.load(
        directory=settings.directory,
        cluster=settings.cluster,
        import_paths=[str(tmp_path), *settings.import_paths],
    )
    spec = spec_of(
        tmp_path, {"map": "mending:check"}, dask_step(tmp_path, "steps_for_tests:spent"), errors={"max_fraction": 0.1}
    )
    report = run(spec, settings=own)
    assert report.rows.rejected == 1
    code.write_text(text.replace("if (", "if False and ("))
    again = retry(report.job, settings=own)
    assert again.rows.rejected == 0
    expected = tables.groupby("country").agg(price=("price", "sum"), orders=("order", "count")).reset_index()
    pd.testing.assert_frame_equal(published(tmp_path, "country"), expected, check_dtype=False)
    result = verify(find_job(settings.directory, report.job))
    assert result.ok, result


@pytest.mark.parametrize(
    ("steps", "fields", "error", "message"),
    [
        ([lambda df, customers: df.compute()], {}, StepFailed, "must be lazy"),
        ([lambda df, customers: df["nothing"].to_frame()], {}, StepFailed, "KeyError"),
        (["no_such_module:f"], {}, StepFailed, "cannot be imported"),
        ([JOINED], {"source": {"path": "orders", "incremental": True}}, SpecError, "incremental"),
    ],
)
def test_what_is_refused_when_the_job_is_planned(
    tables: pd.DataFrame, settings: Settings, tmp_path: Path, steps: Any, fields: Any, error: Any, message: str
) -> None:
    if "source" in fields:
        source = {**fields["source"], "path": str(tmp_path / "orders")}
        fields = {"source": source, "sink": {"path": str(tmp_path / "out"), "mode": "append"}}
    spec = spec_of(tmp_path, *(dask_step(tmp_path, step) for step in steps), **fields)
    with pytest.raises(error, match=message):
        pipeline.Job._of(spec, settings).plan()
