"""The list of jobs as a table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

import pipeline
from pipeline.api.job_table import since_text
from pipeline.errors import SpecError
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.receipts import Totals
from pipeline.jobs.status import Status
from pipeline.settings import Settings
from pipeline.testing.jobs import small_job, write_receipts

NOW = datetime(2026, 1, 9, 12, tzinfo=UTC)


@dataclass(frozen=True)
class FixedClock:
    time: datetime

    def __call__(self) -> datetime:
        return self.time


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A job that has ended and two that have not begun."""
    small = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    for number in range(3):
        time = NOW - timedelta(days=number)
        options = JobOptions(now=FixedClock(time))
        job = JobDirectory.create(tmp_path / "jobs", small.plan, job=f"small-{number}", options=options)
        if number == 0:
            write_receipts(job, small)
            job.set_status(Status.RUNNING)
            job.set_status(Status.FAILED, reason="a test")
            report = {
                "status": "FAILED",
                "rows": {"in": 75, "out": 72, "rejected": 3, "filtered": 0},
                "seconds": {"total": 1.5},
                "rows_per_second": 50.0,
                "peak_memory": 3 << 30,
            }
            job.store.replace("report.json", json.dumps(report).encode())
    return Settings.load(directory=str(tmp_path / "jobs"))


def test_figures_are_columns_to_compute_with(settings: Settings) -> None:
    jobs = pipeline.list_jobs(settings=settings)
    assert list(jobs["id"]) == ["small-0", "small-1", "small-2"]
    first = jobs.iloc[0]
    assert (first["rejected"], first["rows_per_second"], first["peak_memory"]) == (3, 50.0, 3 << 30)
    assert first["duration"] == pd.Timedelta(seconds=1.5)
    assert jobs["created"].dt.tz is not None
    assert jobs["rejected"].isna().tolist() == [False, True, True]
    assert jobs.groupby("status")["rows"].sum().to_dict() == {"FAILED": 75, "PLANNED": 150}
    assert type(jobs[["id"]]) is pd.DataFrame


def test_the_card_has_every_job(settings: Settings) -> None:
    html = pipeline.list_jobs(settings=settings)._repr_html_()
    assert "3 jobs" in html
    assert html.count("<tr>") == 4
    assert "3.0 GiB" in html
    assert "small-2" in html


@pytest.mark.parametrize(("since", "count"), [("", 3), ("2026-01-08", 2), ("2026-01-09T12:00", 1), (NOW, 1)])
def test_jobs_since_a_time(settings: Settings, since: str, count: int) -> None:
    assert len(pipeline.list_jobs(since=since, settings=settings)) == count


def test_a_span_is_before_now() -> None:
    assert since_text("36h", now=NOW) == since_text(timedelta(hours=36), now=NOW) == "2026-01-08T00:00:00.000Z"
    with pytest.raises(SpecError, match="not a time"):
        since_text("yesterday-ish", now=NOW)


def test_an_empty_list_is_a_table(tmp_path: Path) -> None:
    jobs = pipeline.list_jobs(settings=Settings.load(directory=str(tmp_path)))
    assert len(jobs) == 0
    assert "0 jobs" in jobs._repr_html_()


def test_totals_have_the_peak_of_the_workers(tmp_path: Path) -> None:
    small = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    receipts = write_receipts(JobDirectory.create(tmp_path / "jobs", small.plan, job="small-1"), small)
    assert Totals.of(receipts).peak_memory == max(receipt.peak_memory for receipt in receipts)
