"""The description of a plan: its figures, and its differences from another plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.common.rows import QuarantinedFile
from pipeline.plan.describe import EVERYTHING, difference, explain, plan_summary, skew, spec_difference, why_text
from pipeline.plan.plan import Limits
from pipeline.testing.jobs import SmallJob, small_job

LIMITS = Limits(workers=2, threads=3, memory=2 << 30)


@pytest.fixture
def small(tmp_path: Path) -> SmallJob:
    return small_job(tmp_path / "lake", sink=str(tmp_path / "out"))


def test_every_file_and_partition_has_its_reason(small: SmallJob) -> None:
    details = explain(small.plan)
    assert details["counts"] == {EVERYTHING: 3}
    assert [partition["rows"] for partition in details["partitions"]] == [30, 5, 40]
    assert all(partition["reasons"] == [EVERYTHING] for partition in details["partitions"])
    assert "1 more" in why_text(details, shown=2)


def test_figures_are_those_of_the_plan(small: SmallJob) -> None:
    summary = plan_summary(small.plan, LIMITS)
    assert (summary.rows, summary.files, summary.partitions) == (75, 3, 3)
    assert summary.skew_before == summary.skew_after == 40 * 3 / 75
    assert summary.to_dict()["cluster"] == {"workers": 2, "threads": 3}
    assert "2 workers, 3 threads each" in summary.text()
    assert "75" in repr(summary)


def test_first_quarantined_file_is_shown_with_its_error(small: SmallJob) -> None:
    bad = tuple(QuarantinedFile(f"{name}.parquet", "file:CorruptInput", "truncated") for name in "ab")
    text = plan_summary(replace(small.plan, quarantined_files=bad), LIMITS).text()
    assert "a.parquet (rows unknown): truncated, and 1 more" in text


@pytest.mark.parametrize(("rows", "expected"), [([], 1.0), ([0, 0], 1.0), ([5, 5], 1.0), ([30, 10], 1.5)])
def test_skew_is_largest_by_mean(rows: list[int], expected: float) -> None:
    assert skew(rows) == expected


def test_equal_plans_do_not_differ_and_others_do(small: SmallJob, tmp_path: Path) -> None:
    assert difference(small.plan, small.plan) == []
    other = small_job(tmp_path / "lake", sink=str(tmp_path / "out"), rows=(30, 6, 40)).plan
    assert any("file" in text for text in difference(small.plan, other))
    cut = replace(small.plan, partitions=small.plan.partitions[:2])
    assert difference(small.plan, cut) == ["how rows are cut: 3 -> 2 partitions"]
    model = replace(small.plan, model=replace(small.plan.model, digest="0" * 64))
    assert any(text.endswith("-> 000000000000") for text in difference(small.plan, model))


def test_specs_differ_by_field() -> None:
    first = {"sink": {"mode": "error", "path": "out/"}, "steps": [{"map": "a:b"}]}
    second = {"sink": {"mode": "append", "path": "out/"}, "steps": [{"map": "a:c"}], "storage": {"s3": 1}}
    assert spec_difference(first, second) == [
        "sink.mode: error -> append",
        "steps[0].map: a:b -> a:c",
        "storage: default -> {'s3': 1}",
    ]
    assert spec_difference(first, first) == []
