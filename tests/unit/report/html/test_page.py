from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.common.sketch import Sketches
from pipeline.errors import PipelineError, StateCorrupt, TooManyRejects
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.report.build import make_report
from pipeline.report.distributions import read_sketches, write_sketches
from pipeline.report.html.page import report_page, write_page
from pipeline.report.html.spans import receipts_of
from pipeline.testing.jobs import REASON, small_job, write_receipts

_VOID = {"meta", "br", "path", "rect"}


class Page(HTMLParser):
    """The texts and tags of a page; raises if tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    made = small_job(tmp_path / "lake", sink=str(tmp_path / "out"), bad_every=10)
    directory = JobDirectory.create(tmp_path / "jobs", made.plan, job="small-1")
    write_receipts(directory, made)
    return directory


def page_of(job: JobDirectory, **options) -> tuple[str, Page]:
    text = report_page(job, make_report(job), **options)
    return text, Page(text)


def test_the_numbers_are_those_of_the_receipts(job):
    _, page = page_of(job)
    receipts = list(receipts_of(job))
    assert f"{sum(r.rows.input for r in receipts):,}" in page.texts
    assert f"{sum(r.rows.output for r in receipts):,}" in page.texts
    assert f"8 × {REASON}" in page.texts
    for path in {file.path for receipt in receipts for file in receipt.files}:
        assert path in page.texts


def test_nothing_comes_from_a_network(job):
    text, page = page_of(job)
    assert page.links == []
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)
    assert "<script" not in text


def test_values_are_shown_on_request_only(job):
    hidden, shown = page_of(job)[0], page_of(job, shows_values=True)[0]
    assert "x is null" not in hidden
    assert "python -m pipeline rejects small-1" in hidden
    assert "x is null" in shown
    assert "id=0" in shown


def test_a_failed_job_says_why_and_what_next(job):
    error = TooManyRejects("too many rows", where="job <x>", found="8 rows", expected="0", next_step="look at them")
    report = make_report(job, status=Status.FAILED, error=error)
    text = report_page(job, report)
    texts = Page(text).texts
    assert 'class="bad"' in text
    assert {"too many rows", "job <x>", "look at them", "FAILED"} <= set(texts)
    # The error quotes rejected rows.
    assert f"8 of 75 rows: 8 × {REASON}" in texts
    assert "8 rows" not in texts
    assert "8 rows" in Page(report_page(job, report, shows_values=True)).texts
    assert "<x>" not in text.replace("&lt;x&gt;", "")


def test_a_job_without_receipts_has_a_page(tmp_path):
    made = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    directory = JobDirectory.create(tmp_path / "jobs", made.plan, job="small-2")
    text, page = page_of(directory)
    assert "PLANNED" in page.texts
    assert "Throughput" not in text


def test_receipts_without_times_have_no_timeline(job, monkeypatch):
    from pipeline.report.html import page as module

    assert "Partitions by worker" in page_of(job)[0]
    older = [replace(receipt, ended=0.0) for receipt in receipts_of(job)]
    monkeypatch.setattr(module, "receipts_of", lambda *_: iter(older))
    assert "Partitions by worker" not in page_of(job)[0]


def test_the_page_is_compared_with_an_earlier_job(job):
    before = replace(make_report(job), job="small-0", retries=4)
    _, page = page_of(job, before=before)
    assert "Compared with small-0" in page.texts
    row = page.texts.index("retries", page.texts.index("Compared with small-0"))
    assert page.texts[row + 1 : row + 3] == ["4", "0"]


def test_secrets_are_masked(job, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sentinel-5521-secret")
    job.events.append("status", before="", after="RUNNING", reason="key sentinel-5521-secret was refused")
    assert "sentinel-5521" not in page_of(job)[0]


def test_the_page_lies_beside_the_report(job):
    write_page(job, make_report(job))
    assert Path(job.root, "report.html").read_text().startswith("<!doctype html>")


def test_an_error_of_the_page_fails_no_job(job, monkeypatch, caplog):
    from pipeline.driver.job_run import JobRun

    def fails(*_: object, **__: object) -> None:
        raise PipelineError("no page")

    monkeypatch.setattr("pipeline.report.html.page.write_page", fails)
    JobRun._write_page(type("Run", (), {"job": job, "page_ledger": lambda self: None})(), make_report(job))
    assert "report.html of job small-1 could not be written" in caplog.text


class TestDistributions:
    def sketches(self, shift: float = 0.0) -> Sketches:
        numbers, sketches = np.random.default_rng(1), Sketches()
        plans = pa.array(["basic", "<gold>", "basic", None] * 250)
        sketches.add(
            pa.table({"score": numbers.random(1000), "age": numbers.normal(40 + shift, 9, 1000), "plan": plans})
        )
        return sketches

    def test_each_column_has_a_picture_and_its_figures(self, job):
        text, page = page_of(job, sketches=self.sketches())
        assert text.count('<svg class="small"') == 3
        assert "basic 50.0%, <gold> 25.0%" in page.texts
        assert "PSI" not in page.texts

    def test_drift_from_the_job_before_is_named(self, job):
        text, page = page_of(job, sketches=self.sketches(shift=9), baseline=self.sketches(), before=make_report(job))
        assert "PSI" in page.texts
        assert text.count('class="before"') == 3
        age = page.texts[page.texts.index("age") :]
        assert float(age[7]) > 0.5  # mean, three quantiles, null, not finite, PSI
        assert 0.3 < float(age[8]) < 0.5

    def test_they_are_stored_beside_the_report_and_left_out_without_any(self, job, monkeypatch):
        assert "Distributions" not in page_of(job)[1].texts
        write_sketches(job, self.sketches())
        monkeypatch.setattr(JobDirectory, "is_ended", True)
        assert "Distributions" in page_of(job)[1].texts
        stored = read_sketches(job)
        assert stored is not None
        assert stored.pack() == self.sketches().pack()
        job.store.replace("sketches.json", b"{")
        with pytest.raises(StateCorrupt, match=r"sketches\.json"):
            read_sketches(job)
