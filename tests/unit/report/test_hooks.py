"""Hooks: signed, retried, bounded, and no obstacle to the job. Real servers and real programs."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SpecError
from pipeline.events import JobEnded, notify
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.report import hook_delivery
from pipeline.report.build import make_report
from pipeline.report.hook_delivery import DeliveryAttempt, is_final_status, pause
from pipeline.report.hooks import hooks_of, run_hooks
from pipeline.report.openlineage import dataset_of
from pipeline.settings import Settings
from pipeline.spec.diagnostics import SpecIssues
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parts import Hook
from pipeline.testing.jobs import small_job, write_receipts

SECRET = "sentinel-5b8e-hook-secret"


@dataclass
class Server:
    """A web server that answers as it was told to, and notes what it was asked."""

    answers: list[int] = field(default_factory=list)
    """Status of each answer to come; then 200. 0: it says nothing until the server is closed."""
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""
    is_over: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def server() -> Iterator[Server]:
    told = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.requests.append((dict(self.headers.items()), body))
            code = told.answers.pop(0) if told.answers else 200
            if code == 0:
                told.is_over.wait(60)
                return
            self.send_response(code)
            if code in (301, 302, 307):
                self.send_header("Location", told.url + "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        told.url = f"http://127.0.0.1:{http.server_address[1]}/hook?token=never-shown"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield told
        told.is_over.set()
        http.shutdown()
        thread.join(10)


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    made = small_job(tmp_path / "lake", sink=str(tmp_path / "out"), bad_every=10)
    directory = JobDirectory.create(tmp_path / "jobs", made.plan, job="small-1")
    write_receipts(directory, made)
    return directory


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook_delivery, "FIRST_PAUSE", 0.01)


def hook(**fields: Any) -> Hook:
    return Hook.model_validate(fields)


def go_through(job: JobDirectory, hooks: list[Hook], *, end: Status = Status.SUCCEEDED, grace: float = 60.0) -> float:
    """A run of the job that begins and ends; seconds that its end took."""
    with run_hooks(job, hooks, grace=grace) as callbacks:
        job.events.append("driver", epoch=1)
        for status in (Status.RUNNING, Status.PUBLISHING, end):
            notify(callbacks, job.set_status(status))
        report = make_report(job, status=end)
        ended = JobEnded(
            job.id, str(end), report.rows, report.output, report.directory, report.reason, report.to_dict()
        )
        notify(callbacks, ended)
        begin = time.monotonic()
    return time.monotonic() - begin


def on_record(job: JobDirectory) -> list[tuple[str, str, int]]:
    events = [event for event in job.events.read() if event["event"] == "hook"]
    return [(event["on"], event["outcome"], event["attempts"]) for event in events]


def test_server_is_notified_of_start_and_end(
    server: Server, job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    go_through(job, [hook(when=["start", "success"], url=server.url, secret="env:HOOK_SECRET")])
    (start, _), (end, body) = server.requests
    facts = json.loads(body)
    assert (start["X-Pipeline-Event"], end["X-Pipeline-Event"]) == ("start", "success")
    assert end["Content-Type"] == "application/json"
    assert end["Idempotency-Key"] == facts["id"] != start["Idempotency-Key"]
    wanted = hmac.new(SECRET.encode(), f"{end['X-Pipeline-Timestamp']}.".encode() + body, hashlib.sha256).hexdigest()
    assert end["X-Pipeline-Signature"] == f"sha256={wanted}"
    assert (facts["schema_version"], facts["event"], facts["job"], facts["status"]) == (
        1,
        "success",
        "small-1",
        "SUCCEEDED",
    )
    assert facts["rows"] == {"in": 75, "out": 67, "rejected": 8, "filtered": 0}
    assert on_record(job) == [("start", "notified", 1), ("success", "notified", 1)]


@pytest.mark.parametrize(
    ("answers", "outcome", "attempts"),
    [
        ([500, 503, 200], "notified", 3),
        ([429, 200], "notified", 2),
        ([404], "failed", 1),
        ([302], "failed", 1),
        ([500] * 9, "failed", 4),
    ],
)
def test_notification_is_sent_once_and_retried_where_that_may_help(
    answers: list[int], outcome: str, attempts: int, server: Server, job: JobDirectory
) -> None:
    server.answers = list(answers)
    go_through(job, [hook(url=server.url, attempts=4)])
    assert on_record(job) == [("success", outcome, attempts)]
    assert len(server.requests) == attempts
    assert len({headers["Idempotency-Key"] for headers, _ in server.requests}) == 1
    assert job.status() is Status.SUCCEEDED


def test_a_server_that_hangs_holds_up_neither_the_job_nor_other_hooks(
    server: Server, job: JobDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = [0]
    other = Path(job.root).parent / "notified"
    program = [sys.executable, "-c", f"import pathlib; pathlib.Path({str(other)!r}).write_text('x')"]
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        took = go_through(job, [hook(url=server.url, timeout=300), hook(command=program)], grace=3.0)
    assert took < 60
    assert other.read_text() == "x"
    assert ("success", "failed", 0) in on_record(job)
    assert "given up" in caplog.text
    assert "never-shown" not in caplog.text + json.dumps(job.events.read())


def test_a_server_that_is_not_there_is_a_warning(job: JobDirectory, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        go_through(job, [hook(url="http://127.0.0.1:9/x", attempts=2)])
    assert on_record(job) == [("success", "failed", 2)]
    assert "refused" in caplog.text.lower()


def test_a_secret_that_is_not_set_is_a_warning(server: Server, job: JobDirectory) -> None:
    go_through(job, [hook(url=server.url, secret="env:NO_SUCH_SECRET")])
    assert on_record(job) == [("success", "failed", 1)]
    assert server.requests == []


def test_a_program_gets_the_facts(job: JobDirectory, tmp_path: Path) -> None:
    code = (
        "import json, os, pathlib, sys; facts = json.load(sys.stdin); "
        "names = {k: v for k, v in os.environ.items() if k.startswith('PIPELINE_HOOK_')}; "
        f"pathlib.Path({str(tmp_path / 'facts')!r}).write_text(json.dumps([facts, names]))"
    )
    go_through(job, [hook(when=["failure"], command=[sys.executable, "-c", code])], end=Status.FAILED)
    facts, variables = json.loads((tmp_path / "facts").read_text())
    assert (facts["event"], facts["status"]) == ("failure", "FAILED")
    assert variables["PIPELINE_HOOK_EVENT"] == "failure"
    assert variables["PIPELINE_HOOK_JOB"] == "small-1"
    assert variables["PIPELINE_HOOK_ROWS_REJECTED"] == "8"
    assert variables["PIPELINE_HOOK_ID"] == facts["id"]


def test_a_program_that_fails_or_never_ends_is_ended_with_all_it_started(job: JobDirectory, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = (
        "import subprocess, sys, pathlib, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"pathlib.Path({str(mark)!r}).write_text(str(child.pid)); time.sleep(600)"
    )
    hooks = [
        hook(command=[sys.executable, "-c", code], timeout=5, attempts=1),
        hook(command=[sys.executable, "-c", "import sys; sys.exit('no luck')"], attempts=2),
        hook(command=["no-such-program-anywhere"]),
    ]
    go_through(job, hooks)
    assert on_record(job) == [("success", "failed", 1), ("success", "failed", 2), ("success", "failed", 1)]
    reasons = [event["reason"] for event in job.events.read() if event["event"] == "hook"]
    assert "longer than 5 s" in reasons[0]
    assert "no luck" in reasons[1]
    deadline = time.monotonic() + 60
    while _is_alive(int(mark.read_text())) and time.monotonic() < deadline:
        os.sched_yield()
    assert not _is_alive(int(mark.read_text()))


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("status", "event"),
    [
        (Status.SUCCEEDED, "success"),
        (Status.SUCCEEDED_WITH_WARNINGS, "warnings"),
        (Status.FAILED, "failure"),
        (Status.CANCELLED, "cancelled"),
        (Status.INTERRUPTED, "interrupted"),
    ],
)
def test_only_selected_events_are_sent(status: Status, event: str, server: Server, job: JobDirectory) -> None:
    go_through(job, [hook(when=[event], url=server.url), hook(when=["start"], url=server.url)], end=status)
    assert sorted(headers["X-Pipeline-Event"] for headers, _ in server.requests) == sorted([event, "start"])


def test_second_run_of_a_job_has_other_keys(server: Server, job: JobDirectory) -> None:
    go_through(job, [hook(url=server.url)], end=Status.FAILED)
    go_through(job, [hook(url=server.url)], end=Status.SUCCEEDED)
    keys = [headers["Idempotency-Key"] for headers, _ in server.requests]
    assert len(set(keys)) == 2


@pytest.mark.parametrize(
    ("attempt", "number", "expected"),
    [
        (DeliveryAttempt(True), 1, None),
        (DeliveryAttempt(False), 1, 0.01),
        (DeliveryAttempt(False), 3, 0.04),
        (DeliveryAttempt(False), 5, None),
        (DeliveryAttempt(False, is_final=True), 1, None),
        (DeliveryAttempt(False, wait=7.0), 1, 7.0),
        (DeliveryAttempt(False, wait=9e9), 1, 60.0),
    ],
)
def test_pauses(attempt: DeliveryAttempt, number: int, expected: float | None) -> None:
    assert pause(attempt, number=number, attempts=5) == expected


def test_final_answers() -> None:
    assert [code for code in (301, 400, 401, 404, 408, 410, 425, 429, 500, 503) if is_final_status(code)] == [
        301,
        400,
        401,
        404,
        410,
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "has no target"),
        ({"command": ["x"], "url": "http://h/"}, "has both"),
        ({"command": "rm -rf /tmp/x"}, "would need a shell"),
        ({"url": "ftp://h/"}, "not the URL"),
        ({"url": "https://me:hunter2@h/"}, "password"),
        ({"url": "https://h/", "secret": "hunter2"}, "contains a secret"),
        ({"command": ["x"], "secret": "env:A"}, "no url"),
    ],
)
def test_issues_in_hooks(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecIssues) as caught:
        JobSpec.build(
            name="c",
            source={"path": "a"},
            steps=[{"score": {"model": "m"}}],
            sink={"path": "o"},
            hooks=[fields],
        )
    assert said in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_hooks_of_settings_are_notified_of_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = JobSpec.build(
        name="c",
        source={"path": "a"},
        steps=[{"score": {"model": "m"}}],
        sink={"path": "o"},
        hooks=[{"command": ["a"]}],
    )
    monkeypatch.setenv("PIPELINE_HOOKS", '[{"command": ["b"], "when": ["failure"]}]')
    settings = Settings.load()
    assert [one.name for one in hooks_of(spec, settings)] == ["command a", "command b"]
    assert Settings.load(hooks=list(settings.hooks)).hooks == settings.hooks
    monkeypatch.setenv("PIPELINE_HOOKS", '[{"command": "b"}]')
    with pytest.raises(SpecError):
        Settings.load()
    plain = JobSpec.build(name="c", source={"path": "a"}, steps=[{"score": {"model": "m"}}], sink={"path": "o"})
    assert plain.digest == spec.digest
    assert hooks_of(plain, Settings()) == ()


# OpenLineage


@pytest.mark.parametrize(
    ("path", "dataset"),
    [
        ("/lake/a/", ("file", "/lake/a")),
        ("s3://bucket/a/b", ("s3://bucket", "a/b")),
        ("gs://bucket", ("gs://bucket", "/")),
    ],
)
def test_datasets_are_named_as_openlineage_does(path: str, dataset: tuple[str, str]) -> None:
    assert dataset_of(path) == dataset


def test_lineage_names_inputs_and_outputs(job: JobDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openlineage.client")
    log = tmp_path / "lineage.jsonl"
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "file")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", str(log))
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__APPEND", "true")
    go_through(job, [hook(openlineage="prod")])
    assert on_record(job) == [("start", "notified", 1), ("success", "notified", 1)]
    start, end = [json.loads(line) for line in log.read_text().splitlines()]
    assert (start["eventType"], end["eventType"]) == ("START", "COMPLETE")
    assert start["run"]["runId"] == end["run"]["runId"]
    assert (end["job"]["namespace"], end["job"]["name"]) == ("prod", "small")
    (source,), (sink,) = end["inputs"], end["outputs"]
    assert (source["namespace"], source["name"]) == ("file", str(tmp_path / "lake"))
    assert source["inputFacets"]["inputStatistics"]["rowCount"] == 75
    assert [one["name"] for one in source["facets"]["schema"]["fields"]] == ["id", "x"]
    assert sink["outputFacets"]["outputStatistics"]["rowCount"] == 67
    assert sink["name"] == str(tmp_path / "out")


def test_lineage_reports_failures(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openlineage.client")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "console")
    with caplog.at_level("INFO"):
        go_through(job, [hook(openlineage="prod")], end=Status.FAILED)
    assert '"eventType": "FAIL"' in caplog.text


def test_without_the_extra_lineage_is_a_warning(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openlineage.client", None)
    go_through(job, [hook(openlineage="prod")])
    assert on_record(job) == [("start", "failed", 1), ("success", "failed", 1)]
    reason = next(event["reason"] for event in job.events.read() if event["event"] == "hook")
    assert "not installed" in reason
