"""Rejects for a person: counts from the receipts, the first rows from the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import StateCorrupt
from pipeline.jobs.directory import JobDirectory
from pipeline.report.rejects import first_examples, summarise
from pipeline.testing.jobs import REASON, small_job, write_receipts


@pytest.fixture
def directory(tmp_path: Path) -> JobDirectory:
    job = small_job(tmp_path / "lake", sink=str(tmp_path / "out"), bad_every=10)
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="small-1")
    write_receipts(directory, job)
    return directory


def test_counts_and_first_rows(directory: JobDirectory) -> None:
    summary = summarise(directory)
    assert summary.total == 8
    (group,) = summary.groups
    assert (group.reason, group.count, len(group.examples)) == (REASON, 8, 3)
    assert [example.values["id"] for example in group.examples] == [0, 10, 20]
    assert group.examples[0].file.endswith("in-0.parquet")
    assert [Path(name).exists() for name in summary.files] == [True] * len(summary.files)
    assert first_examples(summary)[REASON].endswith("in-0.parquet row 0: x is null")


def test_details_are_json(directory: JobDirectory) -> None:
    details = json.loads(json.dumps(summarise(directory, examples=1).to_dict(), allow_nan=False))
    assert details["groups"][0]["examples"][0]["values"] == {"id": 0, "x": None}
    assert details["total"] == 8


def test_files_are_read_no_further_than_needed(directory: JobDirectory) -> None:
    last = [receipt for receipt in directory.receipts.all() if receipt.rejects][-1]
    assert last.rejects
    directory.store.replace(f"rounds/0/{last.rejects.name}", b"")
    assert len(summarise(directory).groups[0].examples) == 3
    with pytest.raises(StateCorrupt, match="rejects"):
        summarise(directory, examples=100)


def test_none(tmp_path: Path) -> None:
    job = small_job(tmp_path / "lake2", sink=str(tmp_path / "out"))
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="small-2")
    write_receipts(directory, job)
    lists: dict[str, object] = {key: [] for key in ("groups", "files", "quarantined_files", "rounds")}
    assert summarise(directory).to_dict() == {"job": "small-2", "total": 0, **lists}
