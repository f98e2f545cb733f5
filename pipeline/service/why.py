"""Explain why a job makes no progress: who holds it, what it waits for, and which workers it has."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from pipeline.common.text import label_line, next_lines, shortened
from pipeline.common.units import format_seconds, plural, utc_now
from pipeline.errors import PipelineError
from pipeline.jobs.budget import read_budget
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import LeaseSnapshot, has_ended, read_lease
from pipeline.jobs.progress_file import read_progress
from pipeline.jobs.status import Status
from pipeline.report.build import last_error
from pipeline.service.logs import LogReader
from pipeline.service.queue import (
    LeaseWatch,
    Need,
    RestartPolicy,
    last_submission,
    next_need,
    queued_marks,
    view_job,
)
from pipeline.service.servers import ServerRecord, find_servers
from pipeline.storage.store import Store, open_store

SCHEDULER_SECONDS = 2.0
"""Seconds for the answer of a scheduler's dashboard."""
SILENT_SECONDS = 15.0
"""Age of the last progress above which it is mentioned."""
SHOWN_LINES = 3


@dataclass(frozen=True)
class Explanation:
    """The reasons for the state of a job, the most important first."""

    job: str
    status: Status
    reasons: tuple[str, ...]
    next: tuple[str, ...]
    log: tuple[str, ...] = ()
    """Last warnings and errors in its log."""

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON output shows it."""
        return {
            "job": self.job,
            "status": str(self.status),
            "reasons": list(self.reasons),
            "log": list(self.log),
            "next": list(self.next),
        }

    def text(self) -> str:
        """Return the explanation for people."""
        lines = [f"{self.status}  {self.job}"]
        lines += [label_line("because" if not number else "and", reason) for number, reason in enumerate(self.reasons)]
        lines += [label_line("log" if not number else "", line) for number, line in enumerate(self.log)]
        return "\n".join([*lines, *next_lines(self.next)])


def explain(job: JobDirectory, *, lease_seconds: float) -> Explanation:
    """Return why ``job`` is in its state, from its directory, its servers, and its scheduler if that can be asked."""
    status, events, lease = job.status(), job.events.read(), read_lease(job.store)
    lines = LogReader(job, errors=True).read()[-SHOWN_LINES:]
    log = tuple(f"{line.time} {shortened((line.message.splitlines() or [''])[0])}" for line in lines)
    if status.is_success:
        return Explanation(job.id, status, ("it has ended",), (f"python -m pipeline status {job.id}",))
    if status.is_final:
        return Explanation(job.id, status, _ended(job, status, events), (f"python -m pipeline resume {job.id}",), log)
    if status is Status.PLANNED:
        return Explanation(job.id, status, _planned(job), (f"python -m pipeline resume {job.id}",))
    if status is Status.QUEUED:
        return _queued(job, lease_seconds, log)
    holder = _holder_text(lease)
    if lease.is_released or has_ended(lease.holder):
        reasons = (f"no driver runs: {holder}", *_server_reasons(job))
        return Explanation(job.id, status, reasons, (f"python -m pipeline resume {job.id}",), log)
    since = _since(events, status)
    waits = {
        Status.PROVISIONING: _provisioning(events, since),
        Status.PUBLISHING: (f"every partition is done; the output is being published, for {format_seconds(since)}",),
    }
    reasons = waits.get(status) or _running(job, events, lease)
    watch = (f"python -m pipeline watch {job.id}", f"python -m pipeline logs {job.id} -f")
    return Explanation(job.id, status, (*reasons, holder), watch, log)


def _ended(job: JobDirectory, status: Status, events: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    error = last_error(events, status)
    if error is None:
        last: Mapping[str, Any] = next((event for event in reversed(events) if event["event"] == "status"), {})
        return (str(last.get("reason", "")) or "it has ended",)
    found = (error.found.splitlines() or [""])[0]
    details = (f"{name}: {text}" for name, text in (("where", error.where), ("found", found)) if text)
    parent = () if not job.record.parent else (f"it belongs to the fan-out {job.record.parent}",)
    return (error.message, *details, *parent)


def _planned(job: JobDirectory) -> tuple[str, ...]:
    if job.record.parent:
        return (f"its fan-out {job.record.parent} has not started it yet",)
    return ("nobody has started it: a plan, or a probe, was stored only",)


def _queued(job: JobDirectory, lease_seconds: float, log: tuple[str, ...]) -> Explanation:
    """Explain a job that waits for a driver: who submitted it, what is before it, and who would start it."""
    view = view_job(job, LeaseWatch(lease_seconds), now=utc_now())
    watch = (f"python -m pipeline watch {job.id}",)
    if view is not None and view.is_driven:
        return Explanation(job.id, Status.QUEUED, ("its driver is starting",), watch, log)
    reasons = []
    submission = last_submission(job.store)
    if submission is not None:
        reasons.append(f"submitted {submission.trigger} by {submission.by}, {_ago(submission.time)}")
    if view is not None and view.starts:
        delay = RestartPolicy().delay_after(view.starts) - view.since_start
        again = f"; the next one in {format_seconds(delay)}" if delay > 0 else ""
        reasons.append(f"{plural(view.starts, 'driver')} died before it could run{again}")
    reasons += _place_in_queue(job, view.priority if view else 0)
    servers = _server_reasons(job)
    alive = any(server.is_alive(now=utc_now()) for server in find_servers(_root(job)))
    next_steps = watch if alive else ("python -m pipeline serve", f"python -m pipeline resume {job.id}")
    return Explanation(job.id, Status.QUEUED, (*servers, *reasons), next_steps, log)


def _place_in_queue(job: JobDirectory, priority: int) -> list[str]:
    """Return how many waiting jobs start before this one: those of higher priority, and older ones."""
    before = 0
    for name in queued_marks(_root(job)):
        if name == job.id:
            continue
        try:
            other = JobDirectory.open(f"{_root(job).root}/{name}")
            view = view_job(other, LeaseWatch(), now=utc_now())
        except PipelineError:
            continue
        if view is not None and next_need(view, RestartPolicy()) is Need.DRIVER:
            before += (-view.priority, view.created) < (-priority, job.record.created)
    return [
        f"{plural(before, 'job')} {'is' if before == 1 else 'are'} before it in the queue"
        if before
        else "it is the next in the queue"
    ]


def _server_reasons(job: JobDirectory) -> tuple[str, ...]:
    """Return what the servers do; a job without any waits forever."""
    now = utc_now()
    servers: list[ServerRecord] = [server for server in find_servers(_root(job)) if server.is_alive(now=now)]
    if not servers:
        return ("no server runs that would start a driver",)
    full = [server for server in servers if server.running >= server.jobs]
    if len(full) == len(servers):
        return tuple(f"the server {server.name} runs {server.running} of {server.jobs} jobs" for server in full)
    return (f"{plural(len(servers), 'server')} can start it, at the next round",)


def _provisioning(events: Sequence[Mapping[str, Any]], since: float) -> tuple[str, ...]:
    last: Mapping[str, Any] = next((event for event in reversed(events) if event["event"] == "status"), {})
    _, _, workers = str(last.get("reason", "")).partition(": ")
    return (f"it has waited for workers for {format_seconds(since)}" + (f": {workers}" if workers else ""),)


def _running(job: JobDirectory, events: Sequence[Mapping[str, Any]], lease: LeaseSnapshot) -> tuple[str, ...]:
    """Return what runs, and what the scheduler says about its workers."""
    reasons = []
    record = read_progress(job.store, epoch=lease.epoch)
    if record is None:
        reasons.append("no partition has run for long enough to tell its progress")
    else:
        progress, age = record.progress, _age(record.time)
        quiet = f"; last heard of {format_seconds(age)} ago" if age > SILENT_SECONDS else ""
        running = plural(record.running_count, "partition")
        reasons.append(f"{progress.done:,} of {progress.partitions:,} partitions are done, {running} run{quiet}")
        for part in progress.running[:SHOWN_LINES]:
            reasons.append(
                f"partition {part.partition} on {part.worker}: {part.rows_done:,} of {part.rows:,} rows "
                f"in {format_seconds(part.seconds)}, no batch for {format_seconds(part.quiet_seconds)}"
            )
    budget = read_budget(job)
    if budget is not None:
        reasons.append(f"budget: {budget.text()}")
    cluster: Mapping[str, Any] = next((event for event in reversed(events) if event["event"] == "cluster"), {})
    return (*workers_reasons(scheduler_identity(str(cluster.get("dashboard", "")))), *reasons)


def scheduler_identity(dashboard: str) -> Mapping[str, Any] | None:
    """Return what a scheduler says about itself over HTTP; None if it cannot be asked from here.

    :param dashboard: URL of a page of its dashboard.
    """
    parts = urlsplit(dashboard)
    if parts.scheme not in ("http", "https"):
        return None
    try:
        with urlopen(f"{parts.scheme}://{parts.netloc}/json/identity.json", timeout=SCHEDULER_SECONDS) as answer:
            found = json.load(answer)
    except (URLError, OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def workers_reasons(identity: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return what is wrong with the workers that a scheduler names. Pure."""
    if identity is None:
        return ("its scheduler cannot be asked from here: it runs on another machine, or has gone",)
    workers = identity.get("workers", {})
    if not workers:
        return ("its scheduler has no workers",)
    states = Counter(str(worker.get("status", "running")) for worker in workers.values())
    paused = [address for address, worker in workers.items() if worker.get("status") == "paused"]
    text = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    pause = (f"paused for their memory, until it falls: {', '.join(sorted(paused)[:SHOWN_LINES])}",) if paused else ()
    return (*pause, f"{plural(len(workers), 'worker')}: {text}")


def _holder_text(lease: LeaseSnapshot) -> str:
    if lease.epoch == 0:
        return "no driver has ever held its lease"
    holder = str(lease.holder or "an unknown process")
    if lease.is_released:
        return f"driver {lease.epoch} has released the lease ({holder})"
    end = " and has died" if has_ended(lease.holder) else ""
    return f"driver {lease.epoch} holds the lease{end}: {holder}"


def _root(job: JobDirectory) -> Store:
    return open_store(job.root.rpartition("/")[0], private=True)


def _since(events: Sequence[Mapping[str, Any]], status: Status) -> float:
    times = [str(event["time"]) for event in events if event["event"] == "status" and event.get("after") == status]
    return _age(times[-1]) if times else 0.0


def _age(time: str) -> float:
    try:
        return max(0.0, (utc_now() - datetime.fromisoformat(time)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _ago(time: str) -> str:
    return f"{format_seconds(_age(time))} ago"
