"""Provide a sample report: `sample_report`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.common.rows import RowCounts
from pipeline.jobs.status import Status
from pipeline.report.figures import BatchRows, JobTimings, ModelId, PartitionCounts, Skew, StragglerCounts
from pipeline.report.report import Report


def sample_report(**changes: Any) -> Report:
    """Return the report of a job of 1,000 rows that succeeded, with ``changes``."""
    report = Report(
        job="churn-1",
        name="churn",
        status=Status.SUCCEEDED,
        reason="",
        rows=RowCounts(1000, 990, 10, 0),
        model=ModelId("churn", "3", "ab" * 32),
        output="/out",
        directory="/jobs/churn-1",
        seconds=JobTimings(total=8.1, provision=2.0, read=1.2, model_load=0.2),
        partitions=PartitionCounts(done=4, planned=4),
        skew=Skew(before=3.5, after=1.1, slowest_seconds=2.0, mean_seconds=1.5),
        retries=0,
        batch=BatchRows(planned=65_536, smallest=65_536),
        stragglers=StragglerCounts(),
        reasons={"contract:age": 8, "step:features:build:ValueError": 2},
        next=("python -m pipeline verify churn-1", "python -m pipeline rejects churn-1"),
    )
    return replace(report, **changes)
