"""Differences between two jobs: spec, model, input, rows, rejects, times."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.jobs.directory import JobDirectory
from pipeline.report.compare import Changed, changes, compare, comparison_text, flatten
from pipeline.testing.jobs import small_job, write_receipts


def make(folder: Path, name: str, *, lake: str, **options: int) -> JobDirectory:
    small = small_job(folder / lake, sink=str(folder / f"out-{name}"), **options)  # type: ignore[arg-type]
    job = JobDirectory.create(folder / "jobs", small.plan, job=name)
    write_receipts(job, small)
    return job


def test_a_job_differs_in_nothing_from_itself(tmp_path: Path) -> None:
    job = make(tmp_path, "one", lake="lake")
    found = compare(job, job)
    assert found.is_same_work
    assert "the same spec and model over the same 3 files" in comparison_text(found)


def test_differences_are_reported(tmp_path: Path) -> None:
    one = make(tmp_path, "one", lake="lake")
    other = make(tmp_path, "two", lake="lake", bad_every=10)
    found = compare(one, other)
    assert found.spec == {"sink.path": Changed(str(tmp_path / "out-one"), str(tmp_path / "out-two"))}
    # Written again, so that the times of the files differ.
    assert len(found.files.changed) == 3
    assert found.rows["rejected"] == (0, 8)
    assert found.reasons == {"contract:x:null": (0, 8)}
    assert not found.is_same_work
    text = comparison_text(found)
    assert "rejected: 0 -> 8 (+8)" in text
    assert "sink.path" in text
    assert found.to_dict()["rows"]["out"] == [75, 67]


def test_files_that_came_and_went(tmp_path: Path) -> None:
    one, other = make(tmp_path, "one", lake="a"), make(tmp_path, "two", lake="b")
    found = compare(one, other)
    assert (found.files.same, len(found.files.added), len(found.files.removed)) == (0, 3, 3)


@pytest.mark.parametrize(
    ("value", "flat"),
    [
        ({"a": {"b": 1, "c": [1, 2]}}, {"a.b": 1, "a.c": [1, 2]}),
        ({"steps": [{"map": "f:g"}, {"score": {"model": "m"}}]}, {"steps.0.map": "f:g", "steps.1.score.model": "m"}),
        ({"a": {}}, {}),
    ],
)
def test_flatten(value: object, flat: dict[str, object]) -> None:
    assert flatten(value) == flat


def test_changes_name_what_one_side_has_not() -> None:
    assert changes({"a": 1, "b": 2}, {"b": 3, "c": 4}) == {
        "a": Changed(1, None),
        "b": Changed(2, 3),
        "c": Changed(None, 4),
    }
