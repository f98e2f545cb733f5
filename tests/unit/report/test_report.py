"""The report: the decision at the limit, the cause of rejects, and numbers from the receipts alone."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.common.rows import RowCounts
from pipeline.errors import PipelineError, ReconciliationFailed, SpecError, StepFailed, TooManyRejects
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.manifest import make_manifest
from pipeline.jobs.receipts import DeviceTotals, Receipt, SpooledReceipts
from pipeline.jobs.status import Status
from pipeline.models.engines import EngineUse
from pipeline.report.build import (
    decide_status,
    device_text,
    device_uses,
    engine_warnings,
    make_report,
    status_for,
    straggler_counts,
    too_many_rejects,
)
from pipeline.report.figures import DeviceUse, PartitionCounts, StragglerCounts
from pipeline.report.report import Report
from pipeline.testing.jobs import REASON, SmallJob, small_job, write_receipts


@pytest.mark.parametrize(
    ("rejected", "limit", "status"),
    [
        (0, 0.0, Status.SUCCEEDED),
        (1, 0.0, Status.FAILED),
        (1, 0.001, Status.SUCCEEDED_WITH_WARNINGS),
        (2, 0.001, Status.FAILED),
        (1000, 1.0, Status.SUCCEEDED_WITH_WARNINGS),
    ],
)
def test_limit_decides(rejected: int, limit: float, status: Status) -> None:
    assert status_for(RowCounts(1000, 1000 - rejected, rejected, 0), max_fraction=limit) is status


def test_no_rows_succeed() -> None:
    assert status_for(RowCounts(), max_fraction=0.0) is Status.SUCCEEDED


@pytest.mark.parametrize(
    ("rejected", "fraction", "most", "status"),
    [
        (5, 0.0, 5, Status.SUCCEEDED_WITH_WARNINGS),
        (6, 0.0, 5, Status.FAILED),
        (1, 0.0, 0, Status.FAILED),
        (5, 0.01, 5, Status.SUCCEEDED_WITH_WARNINGS),
        (5, 0.001, 5, Status.FAILED),
        (6, 0.01, 5, Status.FAILED),
    ],
)
def test_a_number_of_rows_limits_the_rejects_alone_or_beside_the_share(
    rejected: int, fraction: float, most: int, status: Status
) -> None:
    rows = RowCounts(1000, 1000 - rejected, rejected, 0)
    assert status_for(rows, max_fraction=fraction, max_rows=most) is status


def test_the_error_names_the_limits_that_count() -> None:
    rows = RowCounts(9, 4, 5, 0)
    only = too_many_rejects(rows, max_fraction=0, max_rows=1, reasons={}, job="j")
    assert only.expected == "at most 1 row (errors.max_rows: 1)"
    both = too_many_rejects(rows, max_fraction=0.5, max_rows=3, reasons={}, job="j")
    assert both.expected == "at most 50.0000% (errors.max_fraction: 0.5) and at most 3 rows (errors.max_rows: 3)"


def test_message_names_reasons_and_the_next_command() -> None:
    reasons = {"contract:age:null": 6, "contract:age:max": 3, "step:f:g:KeyError": 1, "contract:z:min": 1}
    examples = {"contract:age:null": "a.parquet row 7: age is null"}
    rows = RowCounts(1000, 989, 11, 0)
    error = too_many_rejects(rows, max_fraction=0.001, reasons=reasons, job="j-1", examples=examples)
    assert type(error) is TooManyRejects
    assert error.exit_code == 4
    text = str(error)
    for part in (
        "11 of 1,000 rows to be scored (1.1000%)",
        "6 contract:age:null (a.parquet row 7: age is null)",
        "1 more reason",
    ):
        assert part in text
    assert "0.1000%" in text
    assert "python -m pipeline rejects j-1" in text


@pytest.mark.parametrize("reason", ["step:f:g:KeyError", "score:ValueError"])
def test_mostly_code_is_the_codes_fault(reason: str) -> None:
    error = too_many_rejects(RowCounts(9, 4, 5, 0), max_fraction=0, reasons={reason: 3, "contract:x:min": 2}, job="j")
    assert type(error) is StepFailed
    assert error.exit_code == 5


def test_values_that_no_frame_holds_are_the_data() -> None:
    """The unknown reason ended the driver as a defect."""
    error = too_many_rejects(RowCounts(9, 4, 5, 0), max_fraction=0, reasons={"frame:day:ValueError": 5}, job="j")
    assert type(error) is TooManyRejects


@pytest.fixture
def job(tmp_path: Path) -> SmallJob:
    return small_job(tmp_path / "lake", sink=str(tmp_path / "out"), bad_every=10, pruned=1)


@pytest.fixture
def directory(tmp_path: Path, job: SmallJob) -> JobDirectory:
    return JobDirectory.create(tmp_path / "jobs", job.plan, job="small-1")


class CountedBook(SpooledReceipts):
    """Counts how often a receipt is read."""

    reads = 0

    def _give(self, kept: Any) -> Receipt:
        self.reads += 1
        return super()._give(kept)


def test_the_end_of_a_job_looks_at_each_receipt_three_times(directory: JobDirectory, job: SmallJob) -> None:
    receipts = CountedBook(write_receipts(directory, job))
    ledger = directory.ledger(receipts)
    assert ledger.rows.rejected == 7
    manifest = directory.manifests.prepare(ledger)
    report = make_report(directory, ledger=ledger, status=Status.SUCCEEDED_WITH_WARNINGS)
    assert (manifest.rows, report.rows) == (ledger.rows, ledger.rows)
    assert receipts.reads == 3 * len(receipts), "once each for the sums, the distributions and the list of files"


def test_report_of_a_finished_job(tmp_path: Path, directory: JobDirectory, job: SmallJob) -> None:
    receipts = write_receipts(directory, job)
    report = make_report(
        directory, ledger=directory.ledger(receipts), status=Status.SUCCEEDED_WITH_WARNINGS, seconds=2.0, retries=1
    )
    details = json.loads(json.dumps(report.to_dict()))
    assert details["rows"] == {"in": 75, "out": 58, "rejected": 7, "filtered": 10}
    assert details["schema_version"] == 1
    assert details["status"] == "SUCCEEDED_WITH_WARNINGS"
    assert details["model"] == directory.record.model
    assert details["output"] == str(tmp_path / "out")
    assert details["directory"] == directory.root
    assert details["rows_per_second"] == 37.5
    assert details["partitions"] == {"done": 3, "planned": 3}
    assert details["seconds"]["total"] == 2.0
    assert details["seconds"]["score"] == pytest.approx(0.6)
    assert details["reasons"] == {REASON: 7}
    assert details["skew"]["before"] == pytest.approx(1.6)
    assert details["retries"] == 1
    assert "7 rows were rejected" in details["warnings"][0]
    assert details["error"] is None
    assert "python -m pipeline verify small-1" in details["next"]
    assert Report.from_dict(details) == report


def test_report_read_back_says_when_the_path_of_its_job_is_masked(directory: JobDirectory, job: SmallJob) -> None:
    report = make_report(
        directory, ledger=directory.ledger(write_receipts(directory, job)), status=Status.SUCCEEDED_WITH_WARNINGS
    )
    stored = replace(report, directory="/lake/token=abcdef/jobs/small-1").to_dict()
    assert stored["directory"] == "/lake/token=[secret]/jobs/small-1"
    again = Report.from_dict(stored)
    for read in (again.frame, again.to_dask, again.rejects, again.verify):
        with pytest.raises(SpecError, match="part of the path of its job is masked") as caught:
            read()
        assert "pipeline.attach" in caught.value.next_step


def test_report_of_an_unfinished_job(directory: JobDirectory, job: SmallJob) -> None:
    write_receipts(directory, job)
    directory.store.remove("rounds/0/receipts/00001.json")
    report = make_report(directory)
    assert report.status == "PLANNED"
    assert report.partitions == PartitionCounts(done=2, planned=3)
    assert "python -m pipeline resume small-1" in report.next


@pytest.mark.parametrize(
    ("status", "first"), [(Status.QUEUED, "watch"), (Status.RUNNING, "watch"), (Status.PLANNED, "resume")]
)
def test_next_step_of_a_job_that_may_have_a_driver_is_to_watch_it(
    directory: JobDirectory, status: Status, first: str
) -> None:
    """A job that was just submitted has a driver that starts: a second one is not the first thing to try."""
    assert make_report(directory, status=status).next[0] == f"python -m pipeline {first} small-1"


def test_report_has_the_error(directory: JobDirectory) -> None:
    report = make_report(directory, status=Status.FAILED, error=TooManyRejects("too many", found="9 of 10"))
    assert report.reason == "too many"
    assert report.to_dict()["error"]["found"] == "9 of 10"


def test_time_of_a_running_job_extends_until_now(tmp_path: Path, job: SmallJob) -> None:
    """Completed partitions are no events: the last event is ten minutes old, and the rate is that of ten minutes."""
    options = JobOptions(now=lambda: datetime.now(UTC) - timedelta(minutes=10))
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="long-1", options=options)
    with directory.hold():
        directory.set_status(Status.PROVISIONING)
        directory.set_status(Status.RUNNING)
        directory.events.append("cluster", workers=2, threads=2, dashboard="http://127.0.0.1:1/status")
        directory.events.append("round_started", round=0, partitions=4, done=0, rows_done=0)
        write_receipts(directory, job)
        report = make_report(directory)
    assert report.running is not None
    assert (report.running.workers, report.running.dashboard) == (2, "http://127.0.0.1:1/status")
    assert report.next == ("python -m pipeline watch long-1", "python -m pipeline cancel long-1")
    assert Report.from_dict(report.to_dict()) == report
    assert 600 <= report.seconds.total < 1200
    assert 0 < report.rows_per_second < 1
    # Nobody knows when a driver died; its time is no shorter than that of its slowest partition.
    assert make_report(directory).seconds.total >= report.skew.slowest_seconds > 0


def test_time_is_what_drivers_spent(tmp_path: Path, job: SmallJob) -> None:
    """A driver that was killed and resumed a day later did not work for a day."""
    clock = [datetime(2026, 1, 1, tzinfo=UTC)]
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="slow-1", options=JobOptions(now=lambda: clock[0]))

    def after(seconds: float, status: Status | None) -> None:
        clock[0] += timedelta(seconds=seconds)
        if status is None:
            directory.events.append("partition", outcome="retry")
        else:
            directory.set_status(status)

    after(100, Status.PROVISIONING)
    after(5, Status.RUNNING)
    after(10, None)
    after(86400, Status.PROVISIONING)
    after(1, Status.RUNNING)
    after(2, Status.INTERRUPTED)
    after(86400, Status.PUBLISHING)
    after(4, Status.SUCCEEDED)
    report = make_report(directory)
    assert report.seconds.total == 15 + 3 + 4
    assert report.seconds.provision == 5 + 1
    directory.events.append("driver", epoch=2)
    assert make_report(directory, seconds=7.0).seconds.total == 15 + 3 + 4 + 7
    assert report.retries == 1


def test_decide_status_raises_over_the_limit(tmp_path: Path, directory: JobDirectory, job: SmallJob) -> None:
    receipts = write_receipts(directory, job)
    assert decide_status(directory.ledger(receipts), job="small-1") is Status.SUCCEEDED_WITH_WARNINGS
    bad = small_job(tmp_path / "lake2", sink=str(tmp_path / "out"), bad_every=1)
    other = JobDirectory.create(tmp_path / "jobs", bad.plan, job="bad-1")
    with pytest.raises(TooManyRejects, match="75 of 75"):
        decide_status(other.ledger(write_receipts(other, bad)), job="bad-1", examples={REASON: "here"})


def test_rows_that_do_not_add_up_are_never_committed(directory: JobDirectory, job: SmallJob) -> None:
    from dataclasses import replace

    receipts = write_receipts(directory, job)
    lost = replace(receipts[0], rows=replace(receipts[0].rows, output=receipts[0].rows.output - 1))
    make_manifest(directory.ledger(receipts), number=1, job="j", plan="p", created="")
    with pytest.raises(ReconciliationFailed, match="do not add up") as caught:
        make_manifest(directory.ledger((lost, *receipts[1:])), number=1, job="j", plan="p", created="")
    assert caught.value.exit_code == 74


def test_stragglers_are_counted_from_the_events() -> None:
    def event(action: str, **fields: object) -> dict[str, object]:
        return {"event": "straggler", "action": action, "is_over": False, **fields}

    events = [
        event("backup"),
        event("backup", is_over=True, won=True, seconds_won=7.5),
        event("split", split_reason="slow"),
        event("split", split_reason="slow", is_over=True, won=True, seconds_won=2.0),
        event("split", split_reason="frozen"),
        event("split", split_reason="frozen", is_over=True, won=False, seconds_won=0.0),
        event("reassign"),
        {"event": "partition", "outcome": "split", "split_reason": "slow"},
    ]
    assert straggler_counts(events) == StragglerCounts(
        backups=1, split_slow=1, split_frozen=1, reassigned=1, won=2, seconds_won=9.5
    )


class TestDevices:
    """GPUs in a report, from receipts and events."""

    EVENTS = (
        {"event": "device", "requested": "cuda", "reasons": [], "workers": {"a": {"uuid": "GPU-1", "name": "old"}}},
        {
            "event": "device",
            "requested": "auto",
            "reasons": ["one", "two"],
            "workers": {
                "a": {"uuid": "GPU-1", "name": "NVIDIA H200", "memory": 1, "driver": "580"},
                "b": {"driver": "", "problem": "no gpu", "found": "NVML Shared Library Not Found"},
            },
        },
    )

    def test_names_are_those_that_workers_reported_last(self) -> None:
        totals = {"GPU-9": DeviceTotals(5, 6), "GPU-1": DeviceTotals(3, 4)}
        assert device_uses(totals, self.EVENTS) == (
            DeviceUse("GPU-1", "NVIDIA H200", "580", 3, 4),
            DeviceUse("GPU-9", "GPU-9", "", 5, 6),
        )

    def test_reason_is_that_of_the_last_driver(self) -> None:
        assert device_text(self.EVENTS) == "cpu: one; two"
        assert device_text(self.EVENTS[:1]) == "cuda"
        assert device_text([{"event": "status"}]) == ""

    def test_what_stopped_a_gpu_is_a_warning(self) -> None:
        use = EngineUse(rows={"xgboost-cuda": 5, "trees": 3}, compared_rows=4, device_reasons=("a", "b"))
        assert engine_warnings(use) == ("a worker stopped using its GPU: a", "a worker stopped using its GPU: b")
        (_, _, wrong) = engine_warnings(replace(use, mismatches=1))
        assert wrong.startswith("1 of 4 compared rows came out otherwise than from xgboost")
        assert wrong.endswith("3 rows have the tree engine's, 5 those of GPUs: score again with device: cpu")


def test_failed_job_names_the_partition_and_keeps_its_error_in_its_events(tmp_path: Path, job: SmallJob) -> None:
    """A driver that is killed before it writes its report has still said why it failed."""
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="failed-1")
    directory.set_status(Status.RUNNING)
    directory.events.append("partition", partition="00001", outcome="failed", attempt=1, reason="bad file")
    error = PipelineError("the file is damaged", where="a.parquet", next_step="repair it")
    directory.set_status(Status.FAILED, reason=error.message, error=error.to_dict())
    report = make_report(directory)
    assert report.error is not None
    assert report.culprit.startswith("partition 00001: ")
    text = report.text()
    assert "  where      a.parquet\n" in text
    assert "  next       repair it\n             python -m pipeline logs failed-1 --errors\n" in text
    assert " rows " in report.culprit
