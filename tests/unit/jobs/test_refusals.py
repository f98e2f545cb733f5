"""Runs that were refused before there was a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import MissingInput
from pipeline.jobs import refusals
from pipeline.jobs.listing import list_jobs
from pipeline.jobs.refusals import read_refusals, record_refusal

ERROR = MissingInput("the source's path does not exist", where="/nowhere/x")


def test_newest_first_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "KEPT", 3)
    for number in range(5):
        record_refusal(str(tmp_path), f"job-{number}", ERROR)
    found = read_refusals(str(tmp_path))
    assert {refusal.name for refusal in found} <= {f"job-{number}" for number in range(5)}
    assert len(found) == 3
    assert [refusal.time for refusal in found] == sorted((refusal.time for refusal in found), reverse=True)
    assert found[0].text().endswith(": the source's path does not exist: /nowhere/x")
    assert list_jobs(tmp_path) == ()


def test_damaged_one_is_left_out_and_a_failing_disk_hides_no_error(tmp_path: Path) -> None:
    record_refusal(str(tmp_path), "job", ERROR)
    (tmp_path / refusals.FOLDER / "x.json").write_text("{")
    assert len(read_refusals(str(tmp_path))) == 1
    (tmp_path / "file").write_text("")
    record_refusal(str(tmp_path / "file"), "job", ERROR)


def test_nothing_is_written_where_no_job_ever_was(tmp_path: Path) -> None:
    record_refusal(str(tmp_path / "jobs"), "job", ERROR)
    assert not (tmp_path / "jobs").exists()
