"""Jobs of one name over time."""

from __future__ import annotations

from pathlib import Path

from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.status import Status
from pipeline.report.trend import trend, trend_text
from pipeline.testing.jobs import small_job, write_receipts


def test_oldest_first_with_the_figures_of_the_reports(tmp_path: Path) -> None:
    small = small_job(tmp_path, sink=str(tmp_path / "out"), bad_every=10)
    for name in ("small-1", "small-2"):
        job = JobDirectory.create(tmp_path / "jobs", small.plan, job=name, options=JobOptions())
        job.set_status(Status.RUNNING)
        write_receipts(job, small)
        job.set_status(Status.FAILED)
    points = trend(tmp_path / "jobs", "small")
    assert [point.job for point in points] == ["small-1", "small-2"]
    rows = job.ledger().rows
    assert (points[1].rows, points[1].rejected) == (rows.input, rows.rejected)
    assert points[1].rejected_share == round(rows.rejected / (rows.output + rows.rejected), 6)
    assert [point.job for point in trend(tmp_path / "jobs", "small", limit=1)] == ["small-2"]
    assert trend(tmp_path / "jobs", "other") == ()
    lines = trend_text(points).splitlines()
    assert lines[0].split()[:4] == ["CREATED", "JOB", "STATUS", "ROWS"]
    assert len(lines) == 3
