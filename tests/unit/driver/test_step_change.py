"""The policy ``step_change``: a job whose code was edited between its start and its resume."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.common import step_modules
from pipeline.driver.prepare import prepare, work_digest
from pipeline.driver.retry import RetryRequest, open_retry
from pipeline.driver.step_change import MAX_RESTARTS, StepMonitor
from pipeline.errors import StepChanged
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.lease import hold_lease
from pipeline.jobs.rounds import RoundReason
from pipeline.plan.describe import plan_summary
from pipeline.report.build import make_report
from pipeline.report.verify import verify
from pipeline.scoring.partition import score_partition
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.inline import publish_inline
from pipeline.testing.oracle import Lake

BUILD = "import tools\n\ndef build(frame):\n    return frame.assign(flag=tools.FLAG)\n"
StartJob = Callable[..., JobDirectory]


def edit(folder: Path, flag: str, *, more: str = "") -> None:
    (folder / "tools.py").write_text(f"FLAG = {flag!r}\n{more}")


def start(folder: Path, lake: Lake, model: Path, *, helper: str = "", **fields: Any) -> JobDirectory:
    """A job whose first partition is done with the flag ``old``; then its helper module is edited to ``new``.

    :param helper: more code of the helper module.
    """
    (folder / "feat.py").write_text(BUILD)
    edit(folder, "old", more=helper)
    spec = JobSpec.build(
        name="j",
        source={"path": str(lake.path)},
        steps=[{"map": "feat:build"}, {"score": {"model": str(model), "keep": ["id", "flag"]}}],
        sink={"path": str(folder / "out")},
        **fields,
    )
    settings = settings_of(folder)
    plan = prepare(spec, settings=settings).plan
    options = JobOptions(import_paths=settings.import_paths, fsync=False)
    job = JobDirectory.create(settings.directory, plan, job="j-1", options=options)
    score_partition(job.recipe, plan.partitions[0], plan.versions)
    edit(folder, "new")
    return JobDirectory.open(job.root, fsync=False)


def settings_of(folder: Path) -> Settings:
    return Settings(
        directory=str(folder / "jobs"), workers=2, threads=2, memory_limit="4 GiB", import_paths=(str(folder),)
    )


def apply_policy(job: JobDirectory, folder: Path) -> None:
    with hold_lease(job.store, lease_seconds=30) as lease:
        StepMonitor(job, lease, settings_of(folder)).apply_policy(job.ledger())


def score_rest(job: JobDirectory) -> None:
    ledger = job.ledger()
    for partition in ledger.todo:
        score_partition(job.recipe_of(ledger.last), partition, ledger.last.plan.versions)


def forget_modules() -> None:
    """Remove imported modules, so that this process is like a worker that was just started."""
    with step_modules._lock:
        step_modules._switch(None)
        step_modules._cache.clear()


def flags(job: JobDirectory) -> set[str]:
    import pyarrow.dataset as ds

    published = publish_inline(job)
    files = [f"{published.path}/{file.name}" for file in published.files]
    return set(ds.dataset(files).to_table(columns=["flag"]).column(0).to_pylist())


@pytest.mark.fault(76)
def test_fail_names_the_file_and_publishes_nothing(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    job = start(tmp_path, lake, model_path)
    with pytest.raises(StepChanged, match="the code of step feat changed since the job was planned") as caught:
        apply_policy(job, tmp_path)
    assert str(tmp_path / "tools.py") in caught.value.found
    assert "step_change: fail" in caught.value.expected
    assert f"resume {job.id}" in caught.value.next_step
    forget_modules()
    with pytest.raises(StepChanged):
        score_rest(job)
    edit(tmp_path, "old")
    apply_policy(job, tmp_path)
    forget_modules()
    score_rest(job)
    assert flags(job) == {"old"}


def test_fail_does_not_stop_a_job_whose_rows_are_all_scored(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    job = start(tmp_path, lake, model_path)
    edit(tmp_path, "old")
    score_rest(job)
    edit(tmp_path, "new")
    apply_policy(job, tmp_path)
    assert flags(job) == {"old"}


@pytest.mark.fault(76)
def test_pin_continues_with_the_planned_code(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    job = start(tmp_path, lake, model_path, step_change="pin")
    apply_policy(job, tmp_path)
    forget_modules()
    score_rest(job)
    assert flags(job) == {"old"}
    assert [event["step"] for event in job.events.read() if event["event"] == "step_change"] == ["feat"]


def test_pin_works_without_the_folder(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    job = start(tmp_path, lake, model_path, step_change="pin")
    (tmp_path / "feat.py").unlink()
    (tmp_path / "tools.py").unlink()
    apply_policy(job, tmp_path)
    forget_modules()
    score_rest(job)
    assert flags(job) == {"old"}


@pytest.mark.fault(49)
def test_a_source_with_a_secret_is_not_kept(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    helper = 'URL = "postgresql://me:hidden-in-code-4711@db/x"\n'
    job = start(tmp_path, lake, model_path, step_change="pin", helper=helper)
    assert b"hidden-in-code" not in b"".join(
        zipfile.ZipFile(path).read(name)
        for path in Path(job.root, "code").glob("*.zip")
        for name in zipfile.ZipFile(path).namelist()
    )
    apply_policy(job, tmp_path)
    forget_modules()
    with pytest.raises(StepChanged, match="the code of step feat changed") as caught:
        score_rest(job)
    assert "the job keeps no copy of it" in str(caught.value.found)


@pytest.mark.fault(76)
def test_restart_scores_every_row_with_the_new_code(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    job = start(tmp_path, lake, model_path, step_change="restart")
    apply_policy(job, tmp_path)
    last = job.rounds.all()[-1]
    assert (last.reason, last.rescore_all) == (RoundReason.STEP_CHANGE, True)
    assert last.record is not None
    assert last.record.step_code == {step.module: step.digest for step in last.plan.code}
    assert last.record.step_code != {step.module: step.digest for step in job.plan.code}
    assert "tools.py changed" in last.record.changes[0]
    apply_policy(job, tmp_path)
    assert len(job.rounds.all()) == 2
    score_rest(job)
    assert flags(job) == {"new"}


def test_restarts_end(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    job = start(tmp_path, lake, model_path, step_change="restart")
    for number in range(MAX_RESTARTS):
        edit(tmp_path, f"new {number}")
        apply_policy(job, tmp_path)
    edit(tmp_path, "once more")
    with pytest.raises(StepChanged) as caught:
        apply_policy(job, tmp_path)
    assert f"after {MAX_RESTARTS} restarts" in caught.value.expected


def test_retry_takes_the_new_code_and_records_it(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    job = start(tmp_path, lake, model_path)
    done = job.ledger().rows.output
    opened = open_retry(job, RetryRequest(), epoch=2, settings=settings_of(tmp_path))
    assert opened is not None
    assert opened.reason is RoundReason.RETRY
    assert opened.record is not None
    assert "tools.py changed" in opened.record.changes[0]
    apply_policy(job, tmp_path)
    score_rest(job)
    assert job.ledger().rows.output > done
    assert flags(job) == {"old", "new"}


def test_round_trip_keeps_the_code(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    job = start(tmp_path, lake, model_path)
    planned = job.plan.code
    assert [[file.module for file in step.files] for step in planned] == [["feat", "tools"]]
    assert JobDirectory.open(job.root).plan.code == planned
    assert job.recipe.code == planned


@pytest.mark.fault(76)
def test_verify_scores_with_the_planned_code_and_reports_the_change(
    tmp_path: Path, lake: Lake, model_path: Path
) -> None:
    job = start(tmp_path, lake, model_path)
    edit(tmp_path, "old")
    score_rest(job)
    publish_inline(job)
    edit(tmp_path, "new")
    checked = verify(job, sample=50, seed=1)
    (sample,) = [check for check in checked.checks if check.name == "sample"]
    assert sample.ok, sample.detail
    assert "the code of step feat changed since" in sample.detail
    for archive in (Path(job.root) / "code").iterdir():
        archive.unlink()
    forget_modules()
    (sample,) = [check for check in verify(job, sample=50, seed=1).checks if check.name == "sample"]
    assert not sample.ok
    assert "the code of step feat changed since" in sample.detail
    assert "ranges differ" not in sample.detail


class TestDigests:
    def test_edited_step_is_other_work_for_incremental_jobs_and_another_submission(
        self, tmp_path: Path, lake: Lake, model_path: Path
    ) -> None:
        job = start(tmp_path, lake, model_path)
        edit(tmp_path, "old")
        same = prepare(job.plan.spec, settings=settings_of(tmp_path)).plan
        edit(tmp_path, "new")
        other = prepare(job.plan.spec, settings=settings_of(tmp_path)).plan
        before, after = (work_digest(plan.spec, plan.models, plan.code) for plan in (job.plan, other))
        assert before != after
        assert job.plan.submission_digest == same.submission_digest != other.submission_digest
        assert job.plan.digest == same.digest != other.digest
        assert job.plan.work_digest == other.work_digest, "step_change decides about a job that exists"

    def test_plan_and_report_show_the_digest(self, tmp_path: Path, lake: Lake, model_path: Path) -> None:
        job = start(tmp_path, lake, model_path)
        (code,) = job.plan.code
        prepared = prepare(job.plan.spec, settings=settings_of(tmp_path))
        summary = plan_summary(replace(prepared.plan, code=job.plan.code), prepared.limits)
        assert f"feat, 2 files (sha256 {code.digest[:16]})" in summary.text()
        assert make_report(job).to_dict()["step_code"] == summary.to_dict()["step_code"] == {"feat": code.digest}
