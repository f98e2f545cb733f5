"""Listing and finding jobs under a root."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SpecError
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.listing import find_job, list_jobs
from pipeline.jobs.status import Status
from pipeline.testing.jobs import SmallJob

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def make_jobs(tmp_path: Path, job: SmallJob) -> Path:
    root = tmp_path / "jobs"
    for number, name in enumerate(("alpha-1", "alpha-2", "beta-1")):
        JobDirectory.create(
            root, job.plan, job=name, options=JobOptions(now=lambda n=number: NOON + timedelta(hours=n))
        )  # type: ignore[misc]
    (root / "no-job").mkdir()
    return root


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"limit": 2}, ["beta-1", "alpha-2"]),
        ({"limit": 9}, ["beta-1", "alpha-2", "alpha-1"]),
        ({"name": "alpha-*"}, ["alpha-2", "alpha-1"]),
        ({"name": "small"}, ["beta-1", "alpha-2", "alpha-1"]),
        ({"statuses": {Status.FAILED}}, ["alpha-1"]),
        ({"statuses": {Status.PLANNED}, "limit": 1}, ["beta-1"]),
        ({"statuses": {Status.RUNNING}}, []),
    ],
)
def test_some_jobs_are_listed(tmp_path: Path, job: SmallJob, wanted: dict[str, Any], found: list[str]) -> None:
    """Name patterns, statuses and the limit select from the newest jobs on."""
    root = make_jobs(tmp_path, job)
    JobDirectory.open(root / "alpha-1").set_status(Status.FAILED)
    (root / ".queue").mkdir()
    assert [one.record.job for one in list_jobs(root, **wanted)] == found


def test_jobs_are_listed_newest_first(tmp_path: Path, job: SmallJob) -> None:
    """Jobs are listed newest first, with age and partitions; damaged jobs are skipped."""
    root = make_jobs(tmp_path, job)
    assert [one.record.job for one in list_jobs(root)] == ["beta-1", "alpha-2", "alpha-1"]
    (root / "alpha-2" / "job.json").write_text("{")
    shown = [one.to_dict(now=NOON + timedelta(hours=3)) for one in list_jobs(root)]
    assert [one["job"] for one in shown] == ["beta-1", "alpha-1"]
    assert [one["age"] for one in shown] == [3600.0, 3 * 3600.0]
    assert shown[0]["partitions"] == {"done": 0, "planned": 3}
    assert list_jobs(tmp_path / "nowhere") == ()


def test_jobs_are_found_by_last_prefix_and_path(tmp_path: Path, job: SmallJob) -> None:
    """A job is found by ``@last``, by a unique prefix, by its id and by its path."""
    root = make_jobs(tmp_path, job)
    assert find_job(root, "@last").id == "beta-1"
    assert find_job(root, "b").id == "beta-1"
    assert find_job(root, "alpha-1").id == "alpha-1"
    assert find_job(tmp_path, str(root / "alpha-2")).id == "alpha-2"


def test_ambiguous_and_unknownmake_jobs(tmp_path: Path, job: SmallJob) -> None:
    """An ambiguous prefix names its matches; an unknown or empty name and an empty root raise `SpecError`."""
    root = make_jobs(tmp_path, job)
    with pytest.raises(SpecError, match=r"alpha-2.*alpha-1") as caught:
        find_job(root, "alpha")
    assert "more than one" in caught.value.message
    with pytest.raises(SpecError, match="beta-1"):
        find_job(root, "gamma")
    with pytest.raises(SpecError, match="no jobs yet"):
        find_job(tmp_path / "nowhere", "@last")
    with pytest.raises(SpecError, match="unknown job"):
        find_job(root, "")
