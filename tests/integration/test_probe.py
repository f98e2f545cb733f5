"""A probe scores a few partitions of a job that is kept, and estimates the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.driver.prepare import prepare
from pipeline.jobs.listing import find_job
from pipeline.runner import probe_plan, resume
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import make_lake, oracle


def test_a_probe_is_a_part_of_the_job_that_follows(
    make_spec: Callable[..., JobSpec], settings: Settings, tmp_path: Path, model_path: Path
) -> None:
    lake = make_lake(tmp_path / "larger", rows=(9000,) * 12)
    prepared = prepare(make_spec(source={"path": str(lake.path)}), settings=settings)
    planned = len(prepared.plan.partitions)
    assert planned > 4
    name, estimate = probe_plan(prepared, settings=settings, count=3)
    assert (estimate.sampled, estimate.partitions) == (3, planned)
    assert estimate.seconds.low <= estimate.seconds.expected <= estimate.seconds.high
    assert estimate.peak_memory > 50 << 20
    job = find_job(settings.directory, name)
    assert str(job.status()) == "PLANNED"
    probed = {receipt.partition: receipt.attempt for receipt in job.receipts.all()}
    assert len(probed) == 3
    assert not (tmp_path / "out").exists()
    report = resume(name, settings=settings)
    assert report.status == "SUCCEEDED"
    attempts = {receipt.partition: receipt.attempt for receipt in job.receipts.all()}
    assert probed.items() <= attempts.items(), "what the probe did was done again"
    assert report.estimate.actual.output_bytes > 0
    assert set(report.estimate.held) == {"seconds", "task_seconds", "output_bytes"}
    out = pa.concat_tables(pq.read_table(file) for file in sorted((tmp_path / "out").glob("*.parquet"))).to_pandas()
    assert out.equals(oracle(lake.files, model_path))
