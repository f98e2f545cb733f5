"""Metrics of jobs in the text format of Prometheus."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from pipeline.common.metrics import Metric, metrics_text
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.report.live_figures import stored_figures
from pipeline.testing.jobs import small_job, write_receipts

DOCS = Path(__file__).parents[3] / "docs"
SAMPLE = re.compile(r'(\w+)\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\} (-?[\d.e+-]+)')


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    small = small_job(tmp_path, sink=str(tmp_path / "out"), bad_every=10)
    directory = JobDirectory.create(tmp_path / "jobs", small.plan, job="small-1")
    directory.set_status(Status.RUNNING)
    write_receipts(directory, small)
    return directory


def test_every_line_is_a_comment_or_a_sample_and_sums_agree(job: JobDirectory) -> None:
    text = metrics_text([stored_figures(job)])
    lines = [line for line in text.splitlines() if not line.startswith("# ")]
    assert all(SAMPLE.fullmatch(line) for line in lines)
    values = {(m[1], m[2]): float(m[3]) for m in map(SAMPLE.fullmatch, lines) if m}
    of = 'job="small-1",name="small"'
    ledger = job.ledger()
    assert values["pipeline_job_rows", f'{of},kind="rejected"'] == ledger.rows.rejected > 0
    assert values["pipeline_job_partition_seconds_bucket", f'{of},le="+Inf"'] == len(ledger.done)
    assert values["pipeline_job_partition_seconds_count", of] == len(ledger.done)
    # Each takes 0.4 s.
    assert values["pipeline_job_partition_seconds_bucket", f'{of},le="0.3"'] == 0
    assert values["pipeline_job_partition_seconds_bucket", f'{of},le="1"'] == len(ledger.done)


def test_labels_are_escaped() -> None:
    metric = Metric("m", "gauge", "Help.")
    metric.add(1, reason='a "b" \\ c\nd')
    metric.add(None, reason="left out")
    assert metric.text().splitlines()[2:] == [r'm{reason="a \"b\" \\ c\nd"} 1']


def test_documents_name_only_metrics_that_there_are(job: JobDirectory) -> None:
    known = {line.split()[2] for line in metrics_text([stored_figures(job)]).splitlines() if line.startswith("# TYPE")}
    known |= {"pipeline_job_left_seconds", "pipeline_job_peak_memory_bytes"}
    rules = yaml.safe_load((DOCS / "monitoring/alerts.yml").read_text())
    used = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    board = json.loads((DOCS / "monitoring/grafana.json").read_text())
    used += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    names = {name for text in used for name in re.findall(r"\bpipeline_job_\w+", text)}
    assert {name.removesuffix("_bucket") for name in names} <= known
    page = (DOCS / "monitoring.md").read_text()
    assert {name for name in known if name not in page and name.removeprefix("pipeline_job") not in page} == set()
