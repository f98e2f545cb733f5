"""The server: start the drivers of queued jobs, and restart drivers that died. All state is on disk.

Each driver is a process of its own session, so a server may be killed and restarted at any moment. Several servers may
serve one root of job directories. The lease of a job decides whether it is driven. The exclusive creation of
``starts/<n>.json`` keeps two servers from starting the same driver. The limit of jobs at once holds for all servers
together: a server that finds the limit exceeded withdraws its start before anything runs.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Protocol

from pipeline.common.plugins import find_adapter
from pipeline.common.units import iso_time, utc_now
from pipeline.driver.outcome import give_up
from pipeline.errors import JobLocked, PipelineError
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import identify
from pipeline.service.driver_process import launch
from pipeline.service.queue import (
    JobView,
    LeaseWatch,
    Need,
    RestartPolicy,
    claim_start,
    last_submission,
    mark_queued,
    next_need,
    queued_marks,
    unmark_queued,
    view_job,
    withdraw_start,
    withdrawn_on_error,
)
from pipeline.service.servers import BEAT_SECONDS, ServerRecord, find_servers, put_server, remove_server
from pipeline.settings import Settings
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import unique_name, with_storage_options

logger = logging.getLogger(__name__)
SCAN_SECONDS = 600.0
"""Seconds between two scans of all job directories, in case a mark was lost."""
_READERS = 16
FORGET = timedelta(days=1)
"""Age after which the record of a gone server is removed."""


class ServerTask(Protocol):
    """A further task of a server in each of its rounds, such as evaluating triggers."""

    def tick(self, now: datetime) -> None:
        """Do what is due.

        :param now: UTC.
        """


SERVER_TASKS: dict[str, str] = {"triggers": "pipeline.service.triggers.jobs:trigger_task"}
"""Tasks of every server beside running jobs: name -> ``module:function``. The function returns a `ServerTask` for some
settings, or None if there is nothing to do."""


def load_server_tasks(settings: Settings) -> tuple[ServerTask, ...]:
    """Return the tasks of `SERVER_TASKS` that have something to do."""
    tasks = (find_adapter(name, kind="hook", built_in=SERVER_TASKS)(settings) for name in SERVER_TASKS)
    return tuple(task for task in tasks if task is not None)


@dataclass
class PollResult:
    """Result of one round of a server."""

    running: list[str] = field(default_factory=list)
    """Jobs with a running or starting driver."""
    waiting: list[str] = field(default_factory=list)
    """Jobs that wait for a driver."""
    started: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Jobs that failed because their drivers died too often."""


@dataclass(frozen=True)
class LaunchFailures:
    """Launches of a job's driver that failed one after the other."""

    count: int = 0
    retry_at: float = float("-inf")
    """Earliest time of the next launch, by the server's monotonic clock."""


@dataclass
class Server:
    """Server of the jobs below one root; see the docstring of the module."""

    settings: Settings
    limit: int = 1
    """Maximum number of jobs at once."""
    restart_policy: RestartPolicy = field(default_factory=RestartPolicy)
    tasks: Sequence[ServerTask] = ()
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = utc_now
    start: Callable[..., object] = launch
    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}-{unique_name()[:6]}")

    def __post_init__(self) -> None:
        self.root: Store = open_store(self.settings.directory, private=True, fsync=self.settings.fsync)
        self._watch = LeaseWatch(self.settings.lease_seconds, self.clock)
        self._last_scan = float("-inf")
        self._last_beat = float("-inf")
        self._started = iso_time(self.now())
        self._launch_failures: dict[str, LaunchFailures] = {}

    # One round

    def serve_once(self) -> PollResult:
        """Run one round: first the tasks, because tasks may submit jobs; then start the drivers that are needed."""
        for task in self.tasks:
            self._run_task(task)
        if self.clock() - self._last_scan >= SCAN_SECONDS:
            self.rebuild_marks()
            self._last_scan = self.clock()
        served = PollResult()
        views = self._views(served)
        served.running = [view.job for view, _ in views if view.is_driven]
        needing = sorted((pair for pair in views if next_need(pair[0], self.restart_policy) is Need.DRIVER), key=_order)
        for view, job in needing:
            if len(served.running) < self.limit and self._start(view, job):
                served.started.append(view.job)
                served.running.append(view.job)
            else:
                served.waiting.append(view.job)
        self.beat(served)
        return served

    def _run_task(self, task: ServerTask) -> None:
        try:
            task.tick(self.now())
        except Exception:
            # A failing trigger must not keep jobs from running.
            logger.exception("%s failed; the server continues", type(task).__name__)

    def _views(self, served: PollResult) -> list[tuple[JobView, JobDirectory]]:
        """Return the marked jobs that need something or are driven."""
        names = queued_marks(self.root)
        if self.root.is_local or len(names) < 2:
            views = [self._try_view(name, served) for name in names]
        else:
            # Each view takes several requests.
            with ThreadPoolExecutor(_READERS) as pool:
                view = with_storage_options(partial(self._try_view, served=served))
                views = list(pool.map(view, names))
        return [pair for pair in views if pair is not None]

    def _try_view(self, name: str, served: PollResult) -> tuple[JobView, JobDirectory] | None:
        try:
            return self._view(name, served)
        except (PipelineError, OSError) as error:
            logger.warning("job %s is skipped in this round: %s", name, error)
            return None

    def _view(self, name: str, served: PollResult) -> tuple[JobView, JobDirectory] | None:
        if not self.root.exists(f"{name}/{layout.JOB_FILE}"):
            # A process is submitting the job, or died while submitting; or the job was removed.
            if not self.root.list(f"{name}/submissions"):
                unmark_queued(self.root, name)
            return None
        job = JobDirectory.open(f"{self.root.root}/{name}", fsync=self.settings.fsync)
        view = view_job(job, self._watch, now=self.now())
        need = next_need(view, self.restart_policy) if view is not None else Need.NOTHING
        if view is None or need is Need.NOTHING:
            self._unmark(job)
            return None
        if need is Need.END:
            if self._fail(job, view):
                served.failed.append(name)
            return None
        return view, job

    def _unmark(self, job: JobDirectory) -> None:
        """Remove the mark of a job. A job that was submitted again meanwhile is marked again."""
        unmark_queued(self.root, job.id)
        self._watch.forget(job)
        self._launch_failures.pop(job.id, None)
        if not job.status().is_final and last_submission(job.store) is not None:
            mark_queued(self.root, job.id)

    def _fail(self, job: JobDirectory, view: JobView) -> bool:
        """Set the status FAILED of a job whose drivers all died. Return False if the status changed meanwhile."""
        try:
            with job.hold(lease_seconds=self.settings.lease_seconds):
                if job.status() is not view.status:
                    return False
                reason = f"its driver died {view.starts} times; see python -m pipeline logs {job.id} --errors"
                status = give_up(job, reason=reason)
        except JobLocked:
            return False
        if status.is_success:
            logger.warning("job %s had published its output before its driver died: %s", job.id, status)
        else:
            logger.error("job %s failed: %s", job.id, reason)
        self._unmark(job)
        return True

    # Starting

    def _start(self, view: JobView, job: JobDirectory) -> bool:
        """Start a driver. Return False if another server starts the driver, or the limit is reached meanwhile."""
        if self.clock() < self._launch_failures.get(job.id, LaunchFailures()).retry_at:
            return False
        try:
            is_started = self._launch(view, job)
        except Exception:
            # No process, memory or disk space was left, or the storage failed: other jobs may still start.
            failures = self._launch_failures.get(job.id, LaunchFailures()).count + 1
            delay = self.restart_policy.delay_after(failures)
            self._launch_failures[job.id] = LaunchFailures(failures, self.clock() + delay)
            logger.exception("no driver could be started for job %s; the next attempt is in %.0f s", job.id, delay)
            return False
        self._launch_failures.pop(job.id, None)
        if is_started:
            count = f", start {view.starts + 1} of {self.restart_policy.starts}" if view.starts else ""
            logger.info("job %s: a driver was started%s", job.id, count)
        return is_started

    def _launch(self, view: JobView, job: JobDirectory) -> bool:
        number = view.last_start + 1
        start = claim_start(job.store, number=number, submission=view.submission, by=self.name, now=self.now)
        if start is None:
            return False
        with withdrawn_on_error(job.store, start):
            if self._has_others() and self._count_driven() > self.limit:
                # Both servers may withdraw; their next rounds come at different moments.
                withdraw_start(job.store, start)
                return False
            self.start(job, start)
        return True

    def _has_others(self) -> bool:
        now = self.now()
        return any(server.name != self.name and server.is_alive(now=now) for server in find_servers(self.root))

    def _count_driven(self) -> int:
        """Return the number of jobs with a running or starting driver, read from disk now."""
        count = 0
        for name in queued_marks(self.root):
            try:
                view = view_job(JobDirectory.open(f"{self.root.root}/{name}"), self._watch, now=self.now())
            except (PipelineError, OSError):
                continue
            count += view is not None and view.is_driven
        return count

    # Marks and heartbeats

    def rebuild_marks(self) -> int:
        """Mark every job that may need a driver, from the job directories alone. Return the number of missing marks."""
        marked, missing = set(queued_marks(self.root)), 0
        for name in self.root.list_folders():
            if name.startswith(".") or name in marked or not self.root.list(f"{name}/submissions"):
                continue
            try:
                job = JobDirectory.open(f"{self.root.root}/{name}")
                view = view_job(job, self._watch, now=self.now())
            except (PipelineError, OSError) as error:
                logger.warning("job %s is skipped in this round: %s", name, error)
                continue
            if view is not None and next_need(view, self.restart_policy) is not Need.NOTHING:
                mark_queued(self.root, name)
                missing += 1
        return missing

    def beat(self, served: PollResult | None = None, *, state: str = "serving") -> None:
        """Store the record of this server if `BEAT_SECONDS` have passed, a driver was started, or the server stops."""
        is_due = self.clock() - self._last_beat >= BEAT_SECONDS
        if not (is_due or state != "serving" or (served and served.started)):
            return
        self._last_beat = self.clock()
        record = ServerRecord(
            name=self.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            process=identify(os.getpid()),
            started=self._started,
            beat=iso_time(self.now()),
            jobs=self.limit,
            running=len(served.running) if served else 0,
            queued=len(served.waiting) if served else 0,
            state=state,
        )
        try:
            put_server(self.root, record)
            self._remove_gone_servers()
        except (PipelineError, OSError) as error:
            logger.warning("the heartbeat of this server could not be written: %s", error)

    def _remove_gone_servers(self) -> None:
        now = self.now()
        for server in find_servers(self.root):
            if server.name != self.name and not server.is_alive(now=now) and _is_old(server, now):
                remove_server(self.root, server.name)


def serve(server: Server, *, wait: Callable[[float], bool], seconds: float) -> None:
    """Serve until ``wait`` returns True.

    :param wait: Waits up to a number of seconds, and returns whether to stop.
    :param seconds: Seconds between two rounds, varied by 20 % so that servers drift apart.
    """
    logger.info("server %s: jobs below %s, %d at once", server.name, server.root.root, server.limit)
    server.beat()
    chance = random.Random(server.name)
    while True:
        try:
            server.serve_once()
        except (PipelineError, OSError) as error:
            logger.warning("this round failed; the server continues: %s", error)
        if wait(seconds * chance.uniform(0.8, 1.2)):
            break
    server.beat(PollResult(), state="stopped")


def _order(pair: tuple[JobView, JobDirectory]) -> tuple[int, str, str]:
    view, _ = pair
    return -view.priority, view.created, view.job


def _is_old(record: ServerRecord, now: datetime) -> bool:
    try:
        return now - datetime.fromisoformat(record.beat) > FORGET
    except (ValueError, TypeError):
        return True
