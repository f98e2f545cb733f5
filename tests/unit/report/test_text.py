"""Reports, plans, checks and rejects as text and HTML."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.common.rows import QuarantinedFile, RowCounts
from pipeline.common.text import table_text
from pipeline.jobs.ledger import RoundSummary
from pipeline.jobs.status import Status
from pipeline.models.device_options import DeviceOptions
from pipeline.models.engines import EngineUse
from pipeline.plan.describe import PlanSummary, plan_summary, plan_text
from pipeline.plan.plan import Limits
from pipeline.report.figures import (
    BatchRows,
    DeviceUse,
    EngineEvidence,
    JobError,
    JobTimings,
    PartitionCounts,
    StragglerCounts,
)
from pipeline.report.rejects import RejectSummary, rejects_text
from pipeline.report.report import ChildReport, Report, summary_text
from pipeline.report.verify import Check, Verification, verification_text
from pipeline.testing.jobs import small_job
from pipeline.testing.reports import sample_report

FAILED = JobError(
    "TooManyRejects",
    "too many rows were rejected",
    where="job churn-1",
    found="10 of 1,000 rows",
    expected="at most 0%",
    next="python -m pipeline rejects churn-1",
)


class TestSummaryText:
    """The text of a report."""

    def test_is_one_screen_with_all_figures(self) -> None:
        report = sample_report(seconds=JobTimings(total=8.1, provision=2.0, read=1.2, model_load=0.2))
        assert summary_text(report).splitlines() == [
            "SUCCEEDED  churn-1",
            "  rows       1,000 in = 990 out + 10 rejected + 0 filtered",
            "  rejects    8 × contract:age, 2 × step:features:build:ValueError",
            "  speed      123 rows/s, 8.10 s in all, 2.00 s of it waiting for workers",
            "  time       read 1.20 s, model load 0.20 s (summed over partitions)",
            "  balance    4 partitions, largest is 3.5 × the mean in files, 1.1 × in partitions, 0 retries",
            "  model      churn version 3 (sha256 abababababababab)",
            "  output     /out",
            "  directory  /jobs/churn-1",
            "  next       python -m pipeline verify churn-1",
            "             python -m pipeline rejects churn-1",
        ]

    def test_of_a_failed_job_has_the_error_and_no_output(self) -> None:
        text = summary_text(sample_report(status=Status.FAILED, error=FAILED))
        assert (
            "  error      too many rows were rejected\n"
            "  where      job churn-1\n"
            "  found      10 of 1,000 rows\n"
            "  expected   at most 0%\n"
        ) in text
        # The error's next step comes first, and once.
        assert text.count("python -m pipeline rejects churn-1") == 1
        assert "/out (nothing published by this job)" in text

    def test_of_a_running_job_has_its_progress(self) -> None:
        partitions = PartitionCounts(done=4, planned=16)
        text = summary_text(sample_report(status=Status.RUNNING, partitions=partitions))
        assert "  done       4 of 16 partitions\n" in text

    def test_marks_rows_that_do_not_add_up(self) -> None:
        assert "≠" in RowCounts(10, 8, 1, 0).equation()

    def test_of_an_empty_job_leaves_out_what_it_has_not(self) -> None:
        report = sample_report(
            status=Status.PLANNED, rows=RowCounts(), seconds=JobTimings(), partitions=PartitionCounts(0, 0), reasons={}
        )
        text = summary_text(report)
        assert text.splitlines()[1] == "  rows       0 in = 0 out + 0 rejected + 0 filtered"
        assert not {"done", "rejects", "speed", "time"} & {line.split()[0] for line in text.splitlines()}

    def test_counts_stragglers_where_there_were_any(self) -> None:
        helped = StragglerCounts(backups=1, split_slow=2, reassigned=1, won=2, seconds_won=41.2)
        assert "0 retries, 3 stragglers helped, about 41.2 s won" in summary_text(sample_report(stragglers=helped))
        assert "straggler" not in summary_text(sample_report(stragglers=replace(helped, backups=0, split_slow=0)))

    def test_shows_batches_that_differ_from_the_plan(self) -> None:
        text = summary_text(sample_report(batch=BatchRows(planned=65536, remembered=4096, smallest=2048)))
        expected = "began with 4,096 rows, remembered from an earlier job; down to 2,048 rows; planned were 65,536"
        assert f"  batch      {expected}" in text
        assert "batch" not in summary_text(sample_report(batch=BatchRows(planned=65536, smallest=65536)))


class TestReport:
    """Other forms of a report."""

    def test_reads_back_what_it_writes(self) -> None:
        child = ChildReport.from_report("de", sample_report(job="churn-1.de", status=Status.FAILED, reason="bad file"))
        report = sample_report(
            status=Status.FAILED,
            error=FAILED,
            children=(child,),
            quarantined_files=(QuarantinedFile("b.parquet", "file:CorruptInput", "cut", None, (("country", "DE"),)),),
            rounds=(RoundSummary(1, "retry", {"name": "m"}, ("steps",), RowCounts(10, 9, 1, 0), 10, 9),),
            input="1 new, 2 unchanged files",
        )
        stored = json.loads(json.dumps(report.to_dict()))
        assert Report.from_dict(stored) == report
        assert json.loads(json.dumps(Report.from_dict(stored).to_dict())) == stored

    def test_of_a_fan_out_has_no_batches_and_stragglers(self) -> None:
        report = sample_report(batch=None, stragglers=None)
        assert (report.to_dict()["batch"], report.to_dict()["stragglers"]) == ({}, {})
        assert Report.from_dict(report.to_dict()) == report

    def test_shows_gpus_by_name_with_their_rows(self) -> None:
        cards = (DeviceUse("GPU-1", "NVIDIA H200", "580", 600, 3), DeviceUse("GPU-2", "NVIDIA H200", "580", 300, 4))
        use = EngineUse({"xgboost-cuda": 900, "xgboost": 100}, compared_rows=64)
        report = sample_report(devices=cards, device="auto", engines=EngineEvidence(use, 0.0))
        assert "  device     900 rows on 2 × NVIDIA H200; 100 rows on CPUs" in report.text()
        assert "  engine     xgboost-cuda, bit-equal on all 64 compared rows" in report.text()
        assert report.to_dict()["devices"][1] == {
            "uuid": "GPU-2",
            "name": "NVIDIA H200",
            "driver": "580",
            "rows": 300,
            "peak_bytes": 4,
        }
        assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report

    def test_shows_why_no_gpu_was_used(self) -> None:
        assert (
            "  device     cpu: no worker can use a GPU" in sample_report(device="cpu: no worker can use a GPU").text()
        )
        assert "device" not in sample_report().to_dict()
        assert "  device" not in sample_report().text()

    @pytest.mark.parametrize("status", list(Status))
    def test_is_ok_where_the_status_is_a_success(self, status: Status) -> None:
        assert sample_report(status=status).ok is status.is_success

    def test_is_one_line_in_lists_and_a_table_in_notebooks(self) -> None:
        report = sample_report(warnings=("a <b>",))
        assert repr(report) == "<Report churn-1: SUCCEEDED, 1,000 in = 990 out + 10 rejected + 0 filtered>"
        assert str(report) == summary_text(report)
        html = report._repr_html_()
        assert "SUCCEEDED  churn-1</div>" in html
        assert "<tr><th>output</th><td>/out</td></tr>" in html
        assert "a &lt;b&gt;" in html


class TestPlanText:
    """The text of a plan."""

    @pytest.fixture
    def summary(self, tmp_path: Path) -> PlanSummary:
        plan = small_job(tmp_path / "lake", sink=str(tmp_path / "out")).plan
        features = tuple(f"f{number}" for number in range(14))
        return replace(
            plan_summary(replace(plan, features=features), Limits(2, 1, 4 << 30)),
            rows=300_000,
            pruned_rows=25_000,
            bytes=30 << 20,
            task_memory=200 << 20,
            output_bytes=5 << 20,
        )

    def test_is_one_screen_with_all_figures(self, summary: PlanSummary, tmp_path: Path) -> None:
        text = plan_text(summary)
        assert "300,000, 25,000 of them in row groups that the filter rules out" in text
        assert "30.0 MiB to read" in text
        assert "200 MiB a task projected, 4.0 GiB a worker" in text
        assert "14: f0, f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11 and 2 more" in text
        assert f"{tmp_path / 'out'}, mode error, about 5.0 MiB" in text
        assert f"columns    {', '.join(summary.columns)}" in text
        assert len(text.splitlines()) < 20

    def test_says_what_may_use_a_gpu(self, summary: PlanSummary) -> None:
        assert "  device" not in plan_text(summary)
        given = replace(summary, device=DeviceOptions("auto", ("the booster dart",)))
        assert "  device     cpu: the booster dart" in plan_text(given)
        assert given.to_dict()["device"] == {"requested": "auto", "reasons": ["the booster dart"]}
        assert "  device     cuda" in plan_text(replace(summary, device=DeviceOptions("cuda")))
        known = replace(summary, device=DeviceOptions("cuda", expected="2 × NVIDIA H200, 141 GiB"))
        assert "  device     cuda expected: 2 × NVIDIA H200, 141 GiB" in plan_text(known)
        assert known.to_dict()["device"]["expected"] == "2 × NVIDIA H200, 141 GiB"

    def test_names_the_job_of_a_probe(self, summary: PlanSummary) -> None:
        assert plan_text(summary, probe_job="churn-1").splitlines()[0].endswith("a part of the job churn-1.")

    def test_is_one_line_in_lists_and_a_table_in_notebooks(self, summary: PlanSummary) -> None:
        assert repr(summary).startswith(f"<PlanSummary {summary.plan.spec.name}: 300,000 rows in ")
        assert str(summary) == plan_text(summary)
        assert "<th>bytes</th><td>30.0 MiB to read, uncompressed</td>" in summary._repr_html_()


class TestVerificationText:
    """The text of a verification."""

    def test_has_one_line_per_check(self) -> None:
        verification = Verification("j", (Check("rows", True, "1,000"), Check("sample", False, "3 differ")))
        assert verification_text(verification).splitlines() == [
            "VERIFICATION FAILED  j",
            "  ok      rows    1,000",
            "  FAILED  sample  3 differ",
        ]
        assert repr(verification) == "<Verification j: 1 of 2 checks failed>"
        assert "<tr><th>FAILED sample</th><td>3 differ</td></tr>" in verification._repr_html_()


def test_rejects_text_of_a_job_without_rejects_is_one_line() -> None:
    assert rejects_text(RejectSummary("j", groups=(), files=(), total=0)) == "0 rejected rows  j"


def test_a_table_is_as_wide_as_its_longest_cell() -> None:
    assert table_text(["A", "BB"], [["long", "x"]]) == "A     BB\nlong  x"
