"""Reports and plans as text."""

from __future__ import annotations

from typing import Any

from pipeline.report.text import plan_text, reconciliation, rejects_text, summary_text, table_text, verification_text


def report(**changes: Any) -> dict[str, Any]:
    return {
        "job": "churn-1",
        "status": "SUCCEEDED",
        "rows": {"in": 1000, "out": 990, "rejected": 10, "filtered": 0},
        "model": {"name": "churn", "version": "3", "digest": "ab" * 32},
        "output": "/out",
        "directory": "/jobs/churn-1",
        "seconds": {"total": 8.1, "provision": 2.0, "read": 1.2, "steps": 0.0, "model_load": 0.2},
        "partitions": {"done": 4, "planned": 4},
        "skew": {"before": 3.5, "after": 1.1},
        "retries": 0,
        "reasons": {"contract:age": 8, "step:features:build:ValueError": 2},
        "rows_per_second": 123456.7,
        "next": ["python -m pipeline verify churn-1", "python -m pipeline rejects churn-1"],
        **changes,
    }


def test_the_summary_is_one_screen_with_everything_on_it() -> None:
    assert summary_text(report()).splitlines() == [
        "SUCCEEDED  churn-1",
        "  rows       1,000 in = 990 out + 10 rejected + 0 filtered",
        "  rejects    8 × contract:age, 2 × step:features:build:ValueError",
        "  speed      123,457 rows/s, 8.10 s in all, 2.00 s of it waiting for workers",
        "  time       read 1.20 s, model load 0.20 s (summed over partitions)",
        "  balance    4 partitions, largest is 3.5 × the mean in files, 1.1 × in partitions, 0 retries",
        "  model      churn version 3 (sha256 abababababababab)",
        "  output     /out",
        "  directory  /jobs/churn-1",
        "  next       python -m pipeline verify churn-1",
        "             python -m pipeline rejects churn-1",
    ]


def test_a_failed_job_says_why_and_that_nothing_was_published() -> None:
    error = {"message": "too many rows were rejected", "found": "10 of 1,000 rows"}
    text = summary_text(report(status="FAILED", error=error))
    assert "  error      too many rows were rejected\n  found      10 of 1,000 rows\n" in text
    assert "/out (nothing published by this job)" in text


def test_a_job_that_runs_says_how_far_it_is() -> None:
    text = summary_text(report(status="RUNNING", partitions={"done": 4, "planned": 16}))
    assert "  done       4 of 16 partitions\n" in text


def test_rows_that_do_not_add_up_are_not_said_to() -> None:
    assert "≠" in reconciliation({"in": 10, "out": 8, "rejected": 1, "filtered": 0})


def test_a_report_with_little_in_it_is_shown_as_far_as_it_goes() -> None:
    rows = {"in": 0, "out": 0, "rejected": 0, "filtered": 0}
    text = summary_text({"job": "j", "status": "PLANNED", "rows": rows, "model": {}})
    assert text.splitlines()[1] == "  rows       0 in = 0 out + 0 rejected + 0 filtered"


def test_a_plan_is_one_screen_too() -> None:
    details = {
        "rows": 300_000,
        "bytes": 30 << 20,
        "files": 7,
        "partitions": 16,
        "batch_rows": 65_536,
        "pruned_rows": 25_000,
        "skew": {"before": 3.6, "after": 1.2},
        "memory": {"task": 200 << 20, "limit": 4 << 30},
        "model": {"name": "churn", "version": "3", "digest": "cd" * 32, "features": [f"f{i}" for i in range(14)]},
        "output": {"path": "/out", "mode": "error", "bytes": 5 << 20, "columns": ["customer_id", "churn"]},
    }
    text = plan_text(details)
    assert "300,000, 25,000 of them in row groups that the filter rules out" in text
    assert "30.0 MiB to read" in text
    assert "200 MiB a task projected, 4.0 GiB a worker" in text
    assert "14: f0, f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11 and 2 more" in text
    assert "/out, mode error, about 5.0 MiB" in text
    assert "customer_id, churn" in text


def test_checks_and_rejects_are_lines() -> None:
    checks = [{"name": "rows", "ok": True, "detail": "1,000"}, {"name": "sample", "ok": False, "detail": "3 differ"}]
    assert verification_text("j", ok=False, checks=checks).splitlines() == [
        "NOT AS IT SHOULD BE  j",
        "  ok      rows    1,000",
        "  FAILED  sample  3 differ",
    ]
    assert rejects_text("j", {"total": 0, "groups": [], "files": []}) == "0 rejected rows  j"


def test_a_table_is_as_wide_as_it_must_be() -> None:
    assert table_text(["A", "BB"], [["long", "x"]]) == "A     BB\nlong  x"


def test_stragglers_and_smaller_batches_are_told_where_there_were_any() -> None:
    helped = {"backups": 1, "cuts": 2, "divided": 0, "moved": 1, "won": 2, "seconds_won": 41.2}
    text = summary_text(report(stragglers=helped))
    assert "0 retries, 3 stragglers helped, about 41.2 s won" in text
    assert "straggler" not in summary_text(report(stragglers={**helped, "backups": 0, "cuts": 0}))
    text = summary_text(report(batch={"planned": 65536, "remembered": 4096, "smallest": 2048}))
    assert (
        "batch      began with 4,096 rows, remembered from an earlier job; down to 2,048 rows; planned were 65,536"
        in text
    )
    assert "batch" not in summary_text(report(batch={"planned": 65536, "remembered": None, "smallest": 65536}))
