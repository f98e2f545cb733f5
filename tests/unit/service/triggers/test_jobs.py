"""The jobs that firings submit, and the commands that show, test and fire triggers."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.errors import SpecError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.service import submit as submitting
from pipeline.service.submit import submit
from pipeline.service.triggers import jobs as firing_module
from pipeline.service.triggers.backfill import backfill_instants
from pipeline.service.triggers.decide import GONE
from pipeline.service.triggers.definitions import WatchedTrigger
from pipeline.service.triggers.jobs import (
    TriggerJobs,
    TriggerWatch,
    render_params,
    spec_of,
    submission_key,
    trigger_task,
)
from pipeline.service.triggers.log import Firing, SeenFile, open_log, to_text
from pipeline.settings import Settings
from pipeline.spec.triggers import ArrivalTrigger, Trigger
from pipeline.testing.jobs import SmallJob, small_job, write_receipts

NIGHT = datetime(2026, 3, 29, 1, 0, tzinfo=UTC)
JOB = """
name: small
params: {day: null, at: never}
source: {path: lake/}
steps:
  - score: {model: model.ubj, output: p, keep: [id]}
sink: {path: "out/${params.day}/${run.date}", mode: append}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a job spec, in which jobs are planned by hand and no driver is started."""
    monkeypatch.chdir(tmp_path)
    small = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))

    def draft(spec: Any, settings: Settings) -> SimpleNamespace:
        return SimpleNamespace(plan=replace(small.plan, spec=spec))

    monkeypatch.setattr(submitting, "draft", draft)
    monkeypatch.setattr(submitting, "check_output", lambda *args, **named: None)
    monkeypatch.setattr(submitting, "launch", lambda job, start: None)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def watched(place: Path, **fields: Any) -> WatchedTrigger:
    fields.setdefault("params", {"day": "${trigger.date}"})
    return WatchedTrigger("nightly", Trigger(**fields), str(place / "job.yaml"), "triggers.yaml")


def end(directory: JobDirectory, place: Path, status: Status = Status.SUCCEEDED) -> None:
    directory.set_status(Status.RUNNING)
    if status.is_success:
        job = SmallJob(directory.plan)
        directory.manifests.commit(directory.manifests.prepare(directory.ledger(write_receipts(directory, job))))
    directory.set_status(Status.PUBLISHING)
    directory.set_status(status)


def test_a_firing_knows_its_time(place: Path) -> None:
    """Placeholders give the date in the trigger's zone and the time in UTC; an unknown name raises `SpecError`."""
    one = watched(
        place,
        cron="30 0 * * *",
        time_zone="Asia/Kolkata",
        params={"day": "${trigger.date}", "at": "${trigger.time} by ${trigger.name}"},
    )
    firing = Firing("20260328T190000Z", "cron", to_text(datetime(2026, 3, 28, 19, tzinfo=UTC)))
    assert render_params(one.trigger, firing, name="nightly") == {
        "day": "2026-03-29",
        "at": "2026-03-28T19:00:00Z by nightly",
    }
    spec, folders = spec_of(one, firing)
    assert spec.sink.path == "out/2026-03-29/2026-03-29"
    assert str(place) in folders
    bad = watched(place, params={"day": "${trigger.tme}"})
    with pytest.raises(SpecError) as caught:
        spec_of(bad, firing)
    assert "${trigger.time}" in str(caught.value)


def test_a_job_for_files_scores_exactly_these(place: Path) -> None:
    """The job of an arrival reads exactly the files of its firing."""
    one = watched(place, arrival=ArrivalTrigger(path="landing/day=*/"))
    files = tuple(SeenFile(f"{place}/landing/day=1/{name}.parquet", 1, "v", name) for name in "ab")
    spec, _ = spec_of(one, Firing("x", "arrival", to_text(NIGHT), files=files))
    assert list(spec.source.path) == [file.path for file in files]
    assert spec.source.base == f"{place}/landing/"


def test_firing_has_one_job_however_it_ended(place: Path) -> None:
    """A firing has one job: a cancelled job is not resumed by the trigger, only by a user."""
    settings = Settings(directory=str(place / "jobs"))
    jobs = TriggerJobs(watched(place, cron="0 1 * * *"), settings)
    firing = Firing("20260329T010000Z", "cron", to_text(NIGHT))
    job = jobs.submit(firing)
    directory = JobDirectory.open(f"{place}/jobs/{job}")
    assert directory.status() is Status.QUEUED
    assert jobs.ended(job) == ""
    directory.set_status(Status.CANCELLED)
    assert jobs.submit(firing) == job
    assert directory.status() is Status.CANCELLED, "what was given up is not taken up by whoever comes late"
    assert jobs.ended(job) == "CANCELLED"
    spec, _ = spec_of(jobs.watched, firing)
    key = submission_key("nightly", firing.id)
    assert submit(spec, settings=settings, key=key, start=False, resume_existing=False).status is Status.CANCELLED
    assert submit(spec, settings=settings, key=key, start=False).status is Status.QUEUED
    assert jobs.ended("no-such-job") == GONE


def test_successes_of_another_job(place: Path) -> None:
    """Only successful jobs of the given name count as successes."""
    settings = Settings(directory=str(place / "jobs"))
    jobs = TriggerJobs(watched(place, after="small"), settings)
    assert jobs.successes("small") == []
    for number, status in enumerate((Status.SUCCEEDED, Status.FAILED)):
        made = jobs.submit(Firing(f"f{number}", "by hand", to_text(NIGHT + timedelta(days=number))))
        end(JobDirectory.open(f"{place}/jobs/{made}"), place, status)
    (only,) = jobs.successes("small")
    assert only.manifest == 1
    assert only.time.tzinfo is not None
    assert jobs.successes("other") == []


def test_the_server_looks_at_triggers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server submits one job per firing; an invalid trigger or file does not stop it."""
    settings = Settings(directory=str(place / "jobs"))
    assert trigger_task(settings) is None
    (place / "triggers.yaml").write_text(
        'triggers:\n  - {name: nightly, job: job.yaml, cron: "0 1 * * *", params: {day: x}}\n'
        "  - {name: broken, job: none.yaml, every: 1 h}\n"
    )
    hook = trigger_task(settings)
    assert isinstance(hook, TriggerWatch)
    assert hook.is_isolated
    hook.is_isolated = False
    for moment in (NIGHT - timedelta(hours=2), NIGHT, NIGHT):
        monkeypatch.setattr(firing_module, "utc_now", lambda moment=moment: moment)
        hook.tick(moment)
    jobs = [name for name in (place / "jobs").iterdir() if not name.name.startswith(".")]
    assert len(jobs) == 1
    broken = open_log(place / "jobs", "broken").read()
    assert broken.recent[-1].status == "REFUSED"
    (place / "triggers.yaml").write_text("triggers: [")
    hook.tick(NIGHT)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["triggers", *arguments], catch_exceptions=False)


def asked(*arguments: str) -> Any:
    return json.loads(call(*arguments, "--json").stdout)


def test_commands(place: Path) -> None:
    """``list``, ``next``, ``test`` and ``fire`` work by name; ``test`` writes nothing."""
    assert call("list").exit_code == SpecError.exit_code
    (place / "landing").mkdir()
    (place / "triggers.yaml").write_text(
        "triggers:\n"
        '  - {name: nightly, job: job.yaml, cron: "30 2 * * *", time_zone: Europe/Berlin, params: {day: x}}\n'
        "  - {name: files, job: job.yaml, arrival: {path: landing/, quiet: 0}, params: {dy: x}}\n"
        "  - {name: hand, job: job.yaml, params: {day: y}}\n"
    )
    jobs = ("--directory", str(place / "jobs"))
    listed = asked("list", *jobs)["triggers"]
    assert [one["kind"] for one in listed] == ["cron", "arrival", "by hand"]
    assert "30 2 * * * Europe/Berlin" in call("list", *jobs).stdout
    times = asked("next", "-n", "3")["times"]
    assert [one["trigger"] for one in times] == ["nightly"] * 3
    assert all(" 02:30:00 CE" in one["local"] for one in times)

    tested = {one["trigger"]: one for one in asked("test", *jobs)["triggers"]}
    assert not tested["files"]["fires"]
    assert "no file" in tested["files"]["reason"]
    assert "day" in tested["files"]["problem"], "a parameter that is not declared is told of before it fires"
    assert tested["nightly"]["problem"] == ""
    assert not (place / "jobs").exists(), "testing writes nothing"
    (place / "landing/a.parquet").write_bytes(b"")
    assert asked("test", "files", *jobs)["triggers"][0]["files"] == [f"{place}/landing/a.parquet"]
    assert "would fire" in call("test", "files", *jobs).stdout

    first = asked("fire", "hand", "--key", "k", *jobs)
    again = asked("fire", "hand", "--key", "k", *jobs)
    assert first["job"]
    assert first["job"] == again["job"]
    assert call("fire", "none", *jobs).exit_code == SpecError.exit_code
    assert call("fire", "files", *jobs).exit_code == SpecError.exit_code, "its parameters are wrong"


def test_backfill(place: Path) -> None:
    """``backfill`` submits the instants of a range one after the other, each once."""
    (place / "triggers.yaml").write_text(
        "triggers:\n"
        '  - {name: nightly, job: job.yaml, cron: "30 2 * * *", time_zone: Europe/Berlin, params: {day: x}}\n'
    )
    days = ("nightly", "--from", "2026-03-28", "--to", "2026-03-30", "--directory", str(place / "jobs"), "--no-wait")
    assert asked("backfill", *days)["left"] == 3
    assert asked("backfill", *days, "--max-parallel", "2")["left"] == 3
    log = open_log(place / "jobs", "nightly")
    ids = ["20260328T013000Z", "20260329T010000Z", "20260330T003000Z"]
    assert [one.firing.id for one in log.read().open] == ids
    assert [bool(one.job) for one in log.read().open] == [True, False, False], "one after the other, as first asked"
    for _ in ids:
        for one in log.read().open:
            if one.job:
                end(JobDirectory.open(f"{place}/jobs/{one.job}"), place)
        asked("backfill", *days)
    done = asked("backfill", *days)
    assert [one["firing"] for one in done["ended"]] == ids
    assert {one["status"] for one in done["ended"]} == {"SUCCEEDED"}
    assert len(list((place / "jobs").glob("small-*"))) == 3
    assert call("backfill", "nightly", "--from", "2026-13-01", "--to", "x").exit_code == SpecError.exit_code


@pytest.mark.parametrize(
    ("fields", "first", "said"),
    [
        ({"after": "other"}, "2026-03-01", "schedule"),
        ({"every": "1 s"}, "2026-03-01", "too many"),
        ({"cron": "0 1 * * *"}, "2026-04-01", "past"),
    ],
)
def test_invalid_backfill_is_refused(fields: dict[str, Any], first: str, said: str) -> None:
    """``backfill`` needs a schedule, a bounded number of instants, and a range in the past."""
    day = datetime.fromisoformat(first).date()
    with pytest.raises(SpecError, match=said):
        backfill_instants(Trigger(**fields), first=day, last=day, now=NIGHT)
