"""A job of a few rows and its directory, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.jobs.directory import JobDirectory
from pipeline.testing.jobs import SmallJob, small_job


@pytest.fixture
def job(tmp_path: Path) -> SmallJob:
    return small_job(tmp_path / "lake", sink=str(tmp_path / "out"))


@pytest.fixture
def directory(tmp_path: Path, job: SmallJob) -> JobDirectory:
    return JobDirectory.create(tmp_path / "jobs", job.plan, job="small-1")
