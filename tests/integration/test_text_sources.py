"""A job over CSV and JSON Lines on real Dask processes: scores as over Parquet, and rejects with their lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.jobs.listing import find_job
from pipeline.report.rejects import read_rejected
from pipeline.report.verify import verify
from pipeline.runner import resume, retry, run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.jobs import read_output
from pipeline.testing.oracle import Lake, oracle

Make = Callable[..., JobSpec]
KEEP = ["id", "prediction"]


@pytest.fixture
def columns(model_path: Path, lake: Lake) -> list[str]:
    """Columns of the lake that text can hold."""
    schema = pq.read_schema(lake.files[0])
    return [
        field.name for field in schema if not pa.types.is_nested(field.type) and not pa.types.is_dictionary(field.type)
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_scores_equal_those_of_parquet(
    kind: str, make_spec: Make, settings: Settings, lake: Lake, model_path: Path, columns: list[str], tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    types: dict[str, str] = {}
    for number, file in enumerate(lake.files):
        table = pq.read_table(file, columns=columns)
        types |= {f.name: str(f.type) for f in table.schema if pa.types.is_floating(f.type) or f.name == "id"}
        if kind == "csv":
            pcsv.write_csv(table, texts / f"{number}.csv")
        else:
            table.to_pandas().to_json(
                texts / f"{number}.jsonl", orient="records", lines=True, double_precision=15, date_format="iso"
            )
    bad = texts / f"0.{kind}"
    with bad.open("a") as file:
        file.write("x\n" if kind == "csv" else '{"id": "x"}\n')
    rename = {"float": "float32", "double": "float64"}
    source = {"path": str(texts), "format": kind, "types": {n: rename.get(t, t) for n, t in types.items()}}
    spec = make_spec(source=source, score={"keep": ["id"]}, errors={"max_rows": 1})
    report = run(spec, settings=settings)
    assert report.rows.to_dict() == {"in": lake.rows + 1, "out": lake.rows, "rejected": 1, "filtered": 0}
    expected = oracle(lake.files, model_path)[KEEP]
    out = read_output(tmp_path / "out")
    found = out.select(KEEP).sort_by("id").to_pandas(ignore_metadata=True)
    pd.testing.assert_frame_equal(found, expected.sort_values("id", ignore_index=True), check_exact=kind == "csv")
    job = find_job(settings.directory, "@last")
    assert [check for check in verify(job).checks if not check.ok] == []
    reject = pa.Table.from_batches(read_rejected(job)).to_pylist()[0]
    lines = bad.read_bytes().count(b"\n")
    assert reject["_file"] == str(bad)
    assert reject["_reason"] == ("line:columns" if kind == "csv" else "cell:id:int64")
    assert reject["_message"].startswith(f"line {lines:,}")
    # What could not be read is not scored as nulls by a retry.
    again = retry("@last", settings=settings)
    assert again.rows == report.rows
    for file in texts.iterdir():
        file.rename(file.with_suffix(".gone"))  # a finished job opens no input file
    assert resume("@last", settings=settings).rows == report.rows


def test_preview_and_frames(
    make_spec: Make, settings: Settings, lake: Lake, model_path: Path, columns: list[str], tmp_path: Path
) -> None:
    table = pq.read_table(lake.files[0], columns=columns)
    pcsv.write_csv(table, tmp_path / "a.csv")
    spec = make_spec(source={"path": str(tmp_path / "a.csv"), "format": "csv"}, score={"keep": ["id"]})
    job = pipeline.Job(**spec.to_dict())
    assert len(job.preview(5)) == 5
    frame = job.to_dask().compute()
    assert len(frame) == table.num_rows
