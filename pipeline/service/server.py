"""The server: starts the drivers of queued jobs, and again those that died. It holds nothing that is not on disk.

Each driver is a process of its own session, so that a server may be killed and started again at any moment; several
may serve one root of job directories. Whether a job is driven is decided by its lease alone; the exclusive creation of
``starts/<n>.json`` keeps two servers from starting the same driver. The limit of jobs at once is kept by all servers
together: where others are there, a start that turns out to be one too many is withdrawn before anything runs.
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
from typing import Protocol

from pipeline.common.plugins import find_adapter
from pipeline.common.units import iso_time, utc_now
from pipeline.errors import JobLocked, PipelineError
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import hold_lease, identify
from pipeline.jobs.status import Status
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
)
from pipeline.service.servers import BEAT_SECONDS, ServerRecord, find_servers, put_server, remove_server
from pipeline.settings import Settings
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import unique_name

logger = logging.getLogger(__name__)
SCAN_SECONDS = 600.0
"""Seconds between two looks at all job directories, in case a mark was lost."""
_READERS = 16
FORGET = timedelta(days=1)
"""Age after which the record of a server that is gone is removed."""


class ServerTask(Protocol):
    """Something else that a server does in each of its rounds, such as to look whether a trigger is due."""

    def tick(self, now: datetime) -> None:
        """Do what is due.

        :param now: UTC.
        """


SERVER_TASKS: dict[str, str] = {"triggers": "pipeline.service.triggers.jobs:trigger_hook"}
"""What every server does beside running jobs: name -> ``module:function``, which gives a `ServerTask` for some
settings, or
None where there is nothing to do."""


def load_server_tasks(settings: Settings) -> tuple[ServerTask, ...]:
    """The hooks of `SERVER_TASKS`."""
    made = (find_adapter(name, kind="hook", built_in=SERVER_TASKS)(settings) for name in SERVER_TASKS)
    return tuple(hook for hook in made if hook is not None)


@dataclass
class PollResult:
    """What one round came to."""

    running: list[str] = field(default_factory=list)
    """Jobs that are being driven, or are about to be."""
    waiting: list[str] = field(default_factory=list)
    """Jobs that need a driver and have none yet."""
    started: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Jobs that were given up, as their drivers died too often."""


@dataclass
class Server:
    """Serves the jobs below one root; see the module."""

    settings: Settings
    limit: int = 1
    """Jobs at once."""
    patience: RestartPolicy = field(default_factory=RestartPolicy)
    hooks: Sequence[ServerTask] = ()
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

    # One round

    def serve_once(self) -> PollResult:
        """Look after every job once: hooks first, as they may submit some."""
        for hook in self.hooks:
            self._tick(hook)
        if self.clock() - self._last_scan >= SCAN_SECONDS:
            self.rebuild_marks()
            self._last_scan = self.clock()
        served = PollResult()
        views = self._views(served)
        served.running = [view.job for view, _ in views if view.is_driven]
        needing = sorted((pair for pair in views if next_need(pair[0], self.patience) is Need.DRIVER), key=_order)
        for view, job in needing:
            if len(served.running) < self.limit and self._start(view, job):
                served.started.append(view.job)
                served.running.append(view.job)
            else:
                served.waiting.append(view.job)
        self.beat(served)
        return served

    def _tick(self, hook: ServerTask) -> None:
        try:
            hook.tick(self.now())
        except Exception:
            # A trigger that fails must not keep jobs from being run.
            logger.exception("%s failed; the server goes on", type(hook).__name__)

    def _views(self, served: PollResult) -> list[tuple[JobView, JobDirectory]]:
        """The jobs that need something, or are being driven."""
        names = queued_marks(self.root)
        if self.root.is_local or len(names) < 2:
            found = [self._look(name, served) for name in names]
        else:
            # Each look is a number of requests.
            with ThreadPoolExecutor(_READERS) as pool:
                found = list(pool.map(lambda name: self._look(name, served), names))
        return [pair for pair in found if pair is not None]

    def _look(self, name: str, served: PollResult) -> tuple[JobView, JobDirectory] | None:
        try:
            return self._view(name, served)
        except (PipelineError, FileNotFoundError) as error:
            logger.warning("job %s is left alone for now: %s", name, error)
            return None

    def _view(self, name: str, served: PollResult) -> tuple[JobView, JobDirectory] | None:
        if not self.root.exists(f"{name}/{layout.JOB_FILE}"):
            # Somebody is submitting it, or died doing so and has to do it again; or it was removed.
            if not self.root.list(f"{name}/submissions"):
                unmark_queued(self.root, name)
            return None
        job = JobDirectory.open(f"{self.root.root}/{name}", fsync=self.settings.fsync)
        view = view_job(job, self._watch, now=self.now())
        need = next_need(view, self.patience) if view is not None else Need.NOTHING
        if view is None or need is Need.NOTHING:
            self._settle(job)
            return None
        if need is Need.END:
            if self._give_up(job, view):
                served.failed.append(name)
            return None
        return view, job

    def _settle(self, job: JobDirectory) -> None:
        """Its mark goes. One that was submitted again in this very moment gets it back."""
        unmark_queued(self.root, job.id)
        self._watch.forget(job)
        if not job.status().is_final and last_submission(job.store) is not None:
            mark_queued(self.root, job.id)

    def _give_up(self, job: JobDirectory, view: JobView) -> bool:
        """Say of a job whose drivers all died that it has failed, since nobody else does."""
        try:
            with hold_lease(job.store, lease_seconds=self.settings.lease_seconds):
                if job.status() is not view.status:
                    return False
                said = f"its driver died {view.starts} times; see python -m pipeline logs {job.id} --errors"
                job.set_status(Status.FAILED, reason=said)
        except JobLocked:
            return False
        logger.error("job %s is given up: %s", job.id, said)
        self._settle(job)
        return True

    # Starting

    def _start(self, view: JobView, job: JobDirectory) -> bool:
        """Start a driver; False when another server does, or the limit is reached after all."""
        start = claim_start(job.store, number=view.last_start + 1, submission=view.submission, by=self.name)
        if start is None:
            return False
        if self._others() and self._count_driven() > self.limit:
            # Both may withdraw; the next rounds come at different moments.
            withdraw_start(job.store, start)
            return False
        try:
            self.start(job, start)
        except (PipelineError, OSError):
            logger.exception("no driver could be started for job %s", job.id)
            return False
        again = f", start {view.starts + 1} of {self.patience.starts}" if view.starts else ""
        logger.info("job %s: a driver was started%s", job.id, again)
        return True

    def _others(self) -> bool:
        now = self.now()
        return any(one.name != self.name and one.is_alive(now=now) for one in find_servers(self.root))

    def _count_driven(self) -> int:
        """Jobs that are being driven or about to be, as the disk says now."""
        count = 0
        for name in queued_marks(self.root):
            try:
                view = view_job(JobDirectory.open(f"{self.root.root}/{name}"), self._watch, now=self.now())
            except (PipelineError, FileNotFoundError):
                continue
            count += view is not None and view.is_driven
        return count

    # Marks and signs of life

    def rebuild_marks(self) -> int:
        """Mark every job that may need a driver, from the job directories alone; gives how many marks were missing."""
        marked, missing = set(queued_marks(self.root)), 0
        for name in self.root.list_folders():
            if name.startswith(".") or name in marked or not self.root.list(f"{name}/submissions"):
                continue
            try:
                job = JobDirectory.open(f"{self.root.root}/{name}")
                view = view_job(job, self._watch, now=self.now())
            except (PipelineError, FileNotFoundError) as error:
                logger.warning("job %s is left alone for now: %s", name, error)
                continue
            if view is not None and next_need(view, self.patience) is not Need.NOTHING:
                mark_queued(self.root, name)
                missing += 1
        return missing

    def beat(self, served: PollResult | None = None, *, state: str = "serving") -> None:
        """Say that this server is there, when it is time to."""
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
            self._forget_others()
        except (PipelineError, OSError) as error:
            logger.warning("the sign of life of this server could not be written: %s", error)

    def _forget_others(self) -> None:
        now = self.now()
        for one in find_servers(self.root):
            if one.name != self.name and not one.is_alive(now=now) and _is_old(one, now):
                remove_server(self.root, one.name)


def serve(server: Server, *, is_over: Callable[[float], bool], seconds: float) -> None:
    """Serve until it is over.

    :param is_over: waits up to so many seconds, and says whether the server is to end.
    :param seconds: between two rounds, about: servers that began together drift apart.
    """
    logger.info("server %s: jobs below %s, %d at once", server.name, server.root.root, server.limit)
    server.beat()
    chance = random.Random(server.name)
    while True:
        try:
            server.serve_once()
        except (PipelineError, OSError) as error:
            logger.warning("this round failed; the server goes on: %s", error)
        if is_over(seconds * chance.uniform(0.8, 1.2)):
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
