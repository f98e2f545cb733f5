"""A published folder, opened with the readers that people use: every row is there, in types that they understand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.driver.prepare import prepare
from pipeline.errors import OutputConflict
from pipeline.jobs.listing import find_job
from pipeline.report.rejects import export
from pipeline.runner import retry
from pipeline.runner import run as run_job
from pipeline.settings import Settings
from pipeline.sources.types import as_type, read_type
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.arrow_types import ROWS, typed_columns
from pipeline.testing.inline import publish_inline, score_inline
from pipeline.testing.oracle import FEATURES, make_table

DAYS, A_DAY = 3, 4200
MERGED: dict[bool, dict[str, str]] = {False: {}, True: {"target_file_size": "1 GiB"}}


def same(frame: pd.DataFrame) -> pd.DataFrame:
    """Map step that changes nothing."""
    return frame


def day(number: int) -> pa.Table:
    """A table with 100 categories of its own, as pandas writes them: codes of one byte."""
    table = make_table(A_DAY, seed=number, start=number * A_DAY).select(["id", *FEATURES])
    values = pa.array([f"{number}-{row % 100:03d}" if row % 7 else None for row in range(A_DAY)])
    codes = values.dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string()))
    items = pa.ListArray.from_arrays(pa.array(range(A_DAY + 1), pa.int32()), codes)
    return table.append_column("sku", codes).append_column("skus", items).append_column("text", values)


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    (tmp_path / "lake").mkdir()
    for number in range(DAYS):
        pq.write_table(day(number), tmp_path / "lake" / f"{number}.parquet", row_group_size=1000)
    return tmp_path / "lake"


def run(source: Path, model: Path, out: Path, *, job: str, steps: bool = False, **sink: Any) -> Path:
    keep = [name for name in pq.read_schema(next(source.glob("*.parquet"))).names if name not in FEATURES]
    maps = [{"map": "tests.integration.test_output_readers:same"}] if steps else []
    spec = JobSpec.build(
        name="j",
        source={"path": str(source)},
        steps=[*maps, {"score": {"model": str(model), "output": "p", "keep": keep}}],
        sink={"path": str(out), **sink},
    )
    directory = out.parent / "jobs"
    plan = prepare(spec, settings=Settings(directory=str(directory), workers=3, threads=1, fsync=False)).plan
    publish_inline(score_inline(plan, directory=directory, job=job))
    return out


def by_dask(out: Path) -> pd.DataFrame:
    import dask.dataframe as dd

    with warnings.catch_warnings(action="ignore"):  # pandas deprecates what Dask calls
        return dd.read_parquet(str(out)).compute(scheduler="synchronous")


def by_polars_folder(out: Path) -> pd.DataFrame:
    polars = pytest.importorskip("polars")
    return polars.scan_parquet(out, hidden_file_prefix="_").collect().to_pandas()


def by_polars_glob(out: Path) -> pd.DataFrame:
    polars = pytest.importorskip("polars")
    return polars.read_parquet(out / "*.parquet").to_pandas()


def by_duckdb(out: Path) -> pd.DataFrame:
    duckdb = pytest.importorskip("duckdb")
    return duckdb.sql(f"SELECT * FROM '{out}/*.parquet'").df()


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    "pandas": pd.read_parquet,
    "dataset": lambda out: ds.dataset(out).to_table().to_pandas(),
    "read_table": lambda out: pq.read_table(out).to_pandas(),
    "dask": by_dask,
    "polars folder": by_polars_folder,
    "polars glob": by_polars_glob,
    "duckdb": by_duckdb,
}


def check(out: Path, expected: list[pa.Table]) -> None:
    """Open ``out`` with every reader and compare all rows."""
    whole = pa.concat_tables([table.select(["id", "sku", "text"]) for table in expected])
    ids = np.sort(whole["id"].to_numpy())
    texts = dict(zip(whole["id"].to_pylist(), whole["text"].to_pylist(), strict=True))
    for name, reader in READERS.items():
        frame = reader(out)
        assert np.array_equal(np.sort(frame["id"].to_numpy()), ids), name
        assert frame["p"].notna().all(), name
        for column in ("sku", "text"):
            values = [None if pd.isna(value) else str(value) for value in frame[column]]
            assert values == [texts[row] for row in frame["id"]], (name, column)


@pytest.mark.fault(86)
@pytest.mark.parametrize("steps", [False, True], ids=["plain", "step"])
@pytest.mark.parametrize("merge", [False, True], ids=["as they are", "merged"])
def test_categories_of_several_files_are_read_by_everybody(
    lake: Path, model_path: Path, tmp_path: Path, merge: bool, steps: bool
) -> None:
    """Three files of 100 categories each, which no index of one byte can number together."""
    out = run(lake, model_path, tmp_path / "out", job="a-1", steps=steps, **MERGED[merge])
    assert len(list(out.glob("*.parquet"))) == (1 if merge else DAYS)
    check(out, [day(number) for number in range(DAYS)])
    written = ds.dataset(out).to_table().sort_by("id")["skus"].to_pylist()
    assert written == [items for number in range(DAYS) for items in day(number)["skus"].to_pylist()]


def test_every_publication_is_read_by_everybody(lake: Path, model_path: Path, tmp_path: Path) -> None:
    """First publication, append, overwrite."""
    days = [day(number) for number in range(DAYS)]
    out = run(lake, model_path, tmp_path / "out", job="a-1")
    (tmp_path / "more").mkdir()
    pq.write_table(day(9), tmp_path / "more" / "9.parquet")
    run(tmp_path / "more", model_path, out, job="a-2", mode="append")
    check(out, [*days, day(9)])
    run(tmp_path / "more", model_path, out, job="a-3", mode="overwrite")
    check(out, [day(9)])


@pytest.mark.fault(91)
def test_append_to_too_narrow_dictionary_codes_is_refused(lake: Path, model_path: Path, tmp_path: Path) -> None:
    """Readers take the types of the first file: codes of one byte cannot number the values of all."""
    out = tmp_path / "out"
    out.mkdir()
    table = day(7).append_column("p", pa.array(np.zeros(A_DAY, np.float32))).drop_columns(list(FEATURES))
    pq.write_table(table, out / "a.parquet")
    with pytest.raises(OutputConflict) as caught:
        run(lake, model_path, out, job="a-1", mode="append")
    assert "indices=int8" in caught.value.found


@pytest.mark.parametrize("stored", [True, False], ids=["arrow schema", "foreign writer"])
@pytest.mark.parametrize("steps", [False, True], ids=["plain", "step"])
@pytest.mark.parametrize("merge", [False, True], ids=["as they are", "merged"])
def test_columns_of_every_type_are_written_as_they_were_read(
    model_path: Path, tmp_path: Path, merge: bool, steps: bool, stored: bool
) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    table = make_table(ROWS, seed=1).select(["id", *FEATURES])
    for name, array in typed_columns().items():
        table = table.append_column(name, array)
    for number in range(2):
        pq.write_table(table, lake / f"{number}.parquet", store_schema=stored)
    if steps:
        # numpy holds no instants before the year 1677 or after 2262, and no times of a day in nanoseconds.
        table = table.drop_columns([name for name in table.column_names if "[" in name and name[0] in "dt"])
        for number in range(2):
            pq.write_table(table, lake / f"{number}.parquet", store_schema=stored)
    out = run(lake, model_path, tmp_path / "out", job="a-1", steps=steps, **MERGED[merge])
    written, read = ds.dataset(out).to_table(), pq.read_table(lake, partitioning=None)
    for name in table.column_names:
        if name in FEATURES:
            continue
        column = read[name].combine_chunks()
        expected = as_type(column, read_type(column.type))
        assert written[name].type == expected.type, name
        assert values_of(written[name].combine_chunks()) == values_of(expected), name


@pytest.mark.parametrize("stored", [True, False], ids=["arrow schema", "foreign writer"])
def test_rejected_rows_of_every_type_are_the_same_after_a_retry(
    model_path: Path, tmp_path: Path, settings: Settings, stored: bool
) -> None:
    """Every other row is rejected by the contract, exported, and scored by a retry with another contract."""
    (tmp_path / "lake").mkdir()
    table = make_table(ROWS, seed=1).select(["id", *FEATURES]).append_column("odd", pa.array(range(ROWS)))
    for name, array in typed_columns().items():
        table = table.append_column(name, array)
    pq.write_table(table, tmp_path / "lake" / "a.parquet", store_schema=stored)
    kept = [name for name in table.column_names if name not in FEATURES]
    spec = JobSpec.build(
        name="j",
        source={"path": str(tmp_path / "lake")},
        contract={"odd": {"allowed": list(range(0, ROWS, 2))}},
        errors={"max_fraction": 0.5},
        steps=[{"score": {"model": str(model_path), "output": "p", "keep": kept}}],
        sink={"path": str(tmp_path / "out")},
    )
    first = run_job(spec, settings=settings)
    assert (first.rows.output, first.rows.rejected) == (ROWS // 2, ROWS // 2)
    export(find_job(settings.directory, "@last"), str(tmp_path / "rejects.parquet"))
    again = retry("@last", overrides=[f"contract.odd.allowed={list(range(ROWS))}"], settings=settings)
    assert (again.rows.output, again.rows.rejected) == (ROWS, 0)
    assert again.verify().ok
    written, rejects = ds.dataset(tmp_path / "out").to_table(), pq.read_table(tmp_path / "rejects.parquet")
    read = pq.read_table(tmp_path / "lake", partitioning=None)
    order = np.argsort(written["odd"].to_numpy())
    assert rejects["odd"].to_pylist() == list(range(1, ROWS, 2))
    for name in kept:
        column = read[name].combine_chunks()
        expected = as_type(column, read_type(column.type))
        assert (written[name].type, rejects[name].type) == (expected.type, expected.type), name
        values = values_of(written[name].combine_chunks())
        assert [values[row] for row in order] == values_of(expected), name
        assert values_of(rejects[name].combine_chunks()) == values_of(expected)[1::2], name


def values_of(array: pa.Array) -> list[str]:
    """Values as text, also of instants that Python cannot hold."""
    if pa.types.is_temporal(array.type):
        array = array.cast(pa.int32() if array.type.bit_width == 32 else pa.int64())
    return list(map(repr, array.to_pylist()))
