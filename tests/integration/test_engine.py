"""The tree engine in a job on real Dask processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ModelError
from pipeline.jobs.listing import find_job
from pipeline.models.trees import kernel_name
from pipeline.report.verify import verify
from pipeline.runner import run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import Lake, oracle


def test_a_job_of_the_tree_engine_equals_the_oracle(
    make_spec: Callable[..., JobSpec], settings: Settings, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    report = run(make_spec(score={"engine": "trees"}), settings=settings)
    out = pd.concat([pq.read_table(file).to_pandas() for file in sorted((tmp_path / "out").glob("*.parquet"))])
    wanted = oracle(lake.files, model_path)
    pd.testing.assert_frame_equal(out.reset_index(drop=True), wanted, check_exact=True)
    engines = report.to_dict()["engines"]
    assert engines["rows"] == {"trees": lake.rows}
    assert engines["mismatches"] == 0
    assert engines["compared_rows"] > 0
    assert engines["kernels"] == [kernel_name()]
    assert "  engine     trees, bit-equal on all " in report.text()
    assert verify(find_job(settings.directory, "@last")).ok


def test_unsupported_engine_is_refused_before_anything_runs(
    make_spec: Callable[..., JobSpec], settings: Settings, tmp_path: Path
) -> None:
    spec = make_spec(score={"engine": "trees", "output": {"column": "p", "kind": "leaf"}})
    with pytest.raises(ModelError, match="the output leaf"):
        run(spec, settings=replace(settings, directory=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()
