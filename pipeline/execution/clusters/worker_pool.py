"""Run a pool of batch jobs: a thread that submits, asks and cancels as `pipeline.execution.clusters.pool` decides.

The jobs stand in the job directory, so that the next driver cancels what a killed driver has left::

    cluster/<name>.json   the jobs of one driver, with their ids, phases and reasons
"""

from __future__ import annotations

import getpass
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distributed import Client, SchedulerPlugin

from pipeline.common.units import iso_time, plural, utc_now
from pipeline.errors import NoWorkers, PipelineError, SpecError
from pipeline.execution.clusters.batch_commands import BatchCommands, CommandFailed
from pipeline.execution.clusters.pool import BLAMELESS, GiveUp, JobEnd, Pool, PoolJob, to_record
from pipeline.execution.clusters.requests import Request
from pipeline.execution.worker_events import LossCause, WorkerSupply
from pipeline.jobs import layout
from pipeline.storage.store import Store
from pipeline.storage.urls import unique_name

logger = logging.getLogger(__name__)
TURN_SECONDS = 0.5
CLOSING_SECONDS = 60.0
"""Seconds in which all jobs must be cancelled; then a warning names those that are left."""
CANCEL_TRIES = 3
SAY_SECONDS = 60.0
"""Seconds between two lines about jobs that are waited for."""
LOG_LINES = 5
"""Lines of the log of a job that ended before a worker had joined."""
WORKER_NAME = "pipeline"
"""Beginning of the names of workers: ``pipeline-3`` is the worker of job 3, ``pipeline-3-0`` the first of several."""
_NUMBER = re.compile(rf"{WORKER_NAME}-(\d+)(?:-\S+)?")


class PoolClient(Client):
    """A client of a cluster whose workers come from a pool."""

    def __init__(self, cluster: Any, *, supply: WorkerSupply) -> None:
        super().__init__(cluster, set_as_default=False)  # type: ignore[no-untyped-call]
        self.supply = supply


class _Watch(SchedulerPlugin):
    """Tells a pool about workers that join and leave, from the scheduler's thread."""

    name = "pipeline-worker-pool"

    def __init__(self, joined: Callable[[int, str], None], left: Callable[[str, bool], None]) -> None:
        self._joined, self._left = joined, left

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Pass on a worker with the name of a job."""
        match = _NUMBER.fullmatch(str(scheduler.workers[worker].name))
        if match:
            self._joined(int(match[1]), worker)

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """Pass on a worker that is gone."""
        # `expected` is no argument: the event that the scheduler has just logged has it.
        self._left(worker, _is_expected(scheduler, worker))


def _is_expected(scheduler: Any, worker: str) -> bool:
    for _, event in reversed(scheduler.get_events("all")):
        if isinstance(event, Mapping) and event.get("action") == "remove-worker" and event.get("worker") == worker:
            return bool(event.get("expected"))
    return False


class WorkerPool:
    """The jobs of one cluster, from the first submission to the last cancellation.

    :param write_script: writes the script of a job with a number and a request, without nodes that are left out, and
        returns its path.
    :param where: the cluster, for messages.
    :param store: the job directory; None: nothing is recorded.
    :param logs: folder of the output of the jobs; None: unknown.
    :param job_name: name of the jobs in the batch system.
    """

    def __init__(
        self,
        pool: Pool,
        commands: BatchCommands,
        write_script: Callable[[int, Request, Collection[str]], Path],
        *,
        where: str,
        store: Store | None = None,
        logs: Path | None = None,
        job_name: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._commands = commands
        self._write_script = write_script
        self._where = where
        self._store = store
        self._logs = logs
        self._job_name = job_name
        self._clock = clock
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker-pool", daemon=True)
        self._record_name = layout.cluster_record_path(unique_name())
        self._recorded: list[dict[str, Any]] = []
        self._demands: dict[int, int] = {}
        self._said = clock()
        self._trouble = ""
        self._log_tail = ""
        self._script = ""
        self._requests_said: set[str] = set()

    # Lifecycle

    def open(self, scheduler: Any) -> None:
        """Cancel what an earlier driver has left, and start to submit jobs for ``scheduler``."""
        scheduler.add_plugin(_Watch(self._worker_joined, self._worker_left))
        self._thread.start()

    def close(self) -> None:
        """Cancel all jobs. Raises nothing: what could not be cancelled is named in a warning."""
        deadline = self._clock() + CLOSING_SECONDS
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSING_SECONDS)
        with self._lock:
            left = list(self._pool.jobs.values())
        text = ""
        for attempt in range(CANCEL_TRIES):
            if not left or self._clock() >= deadline:
                break
            if attempt:
                time.sleep(min(1.0, max(0.0, deadline - self._clock())))
            text = self._cancel(left)
            left = list(self._pool.jobs.values()) if text else []
        if left:
            ids = ", ".join(job.id for job in left)
            logger.warning("%s: could not cancel %s (%s); they end when they find no scheduler", self._where, ids, text)
        self._write_record()

    def _cancel(self, jobs: list[PoolJob]) -> str:
        """Cancel jobs. Return what the batch system said, if it could not."""
        try:
            self._commands.cancel([job.id for job in jobs])
        except CommandFailed as error:
            return error.text
        with self._lock:
            for job in jobs:
                self._pool.job_cancelled(job.number)
        return ""

    def _run(self) -> None:
        with suppress(Exception):
            self._cancel_left_over()
        while not self._closing.is_set():
            try:
                self.turn()
            except Exception:
                logger.exception("%s: the pool of workers goes on after an error", self._where)
            self._closing.wait(TURN_SECONDS)

    def turn(self) -> None:
        """Ask, submit and cancel what is due now."""
        with self._lock:
            is_due = self._pool.poll_due(now=self._clock())
        if is_due:
            self._ask()
        with self._lock:
            count = self._pool.jobs_to_submit(now=self._clock())
        while count > 0 and not self._closing.is_set() and self._submit():
            count -= 1
        with self._lock:
            surplus = self._pool.surplus(now=self._clock())
        if surplus:
            self._cancel(surplus)
        self._write_record()
        self._say()

    def _ask(self) -> None:
        with self._lock:
            ids = [job.id for job in self._pool.jobs.values()]
        listing, text = None, ""
        try:
            listing = self._commands.states(ids)
        except CommandFailed as error:
            text = error.text
        with self._lock:
            gone = self._pool.asked(listing, now=self._clock(), text=text)
        for job in gone:
            self._job_gone(job)

    def _job_gone(self, job: PoolJob) -> None:
        end = str(job.status.end or JobEnd.UNKNOWN)
        if job.joined is not None or job.status.end in BLAMELESS:
            logger.info("%s: job %s is gone: %s", self._where, job.id, end)
            return
        self._log_tail = self._tail(job.id)
        on = f" on {job.status.node}" if job.status.node else ""
        said = f"; its log ends with:\n{self._log_tail}" if self._log_tail else ""
        logger.warning("%s: job %s%s %s before a worker had joined%s", self._where, job.id, on, end, said)

    def _tail(self, id: str) -> str:
        """Return the last lines of the log of a job."""
        if self._logs is None:
            return ""
        with suppress(OSError):
            for suffix in ("err", "out"):
                for path in self._logs.glob(f"*{id}*.{suffix}"):
                    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
                    shown = [line for line in lines if line.strip()][-LOG_LINES:]
                    if shown:
                        return "\n".join(f"  {path.name}: {line}" for line in shown)
        return ""

    def _submit(self) -> bool:
        with self._lock:
            request, excluded = self._pool.next_request(now=self._clock()), sorted(self._pool.excluded)
        try:
            script = self._write_script(self._pool.count + 1, request, excluded)
            self._script = str(script)
            id = self._commands.submit(script)
        except CommandFailed as error:
            with self._lock:
                self._pool.submission_failed(error.text, request, is_refused=error.is_refused, now=self._clock())
            if error.text != self._trouble:
                self._trouble = error.text
                what = "refused a job" if error.is_refused else "did not take a job, which is tried again"
                logger.warning("%s: the batch system %s: %s", self._where, what, error.text)
            return False
        self._trouble = ""
        with self._lock:
            job = self._pool.job_submitted(id, request, now=self._clock())
        logger.info("%s: submitted job %s as %s%s", self._where, job.number, id, self._request_text(request))
        # At once: a driver that is killed now must not leave a job that nobody knows.
        self._write_record()
        return True

    def _request_text(self, request: Request) -> str:
        """Return what sets a request apart from the first one; empty for that."""
        parts = [f"shape {request.shape}"] if request.shape else []
        parts += [f"memory × {request.memory_factor:g}"] if request.memory else []
        parts += [f"walltime × {request.walltime_factor:g}"] if request.walltime else []
        text = f", {', '.join(parts)}" if parts else ""
        if text and text not in self._requests_said:
            self._requests_said.add(text)
            logger.warning("%s: jobs request other than at first: %s", self._where, text[2:])
        return text

    def _say(self) -> None:
        """Log what is waited for, once a minute while there is no worker."""
        now = self._clock()
        if self._pool.has_workers:
            self._said = now
        elif now - self._said >= SAY_SECONDS:
            self._said = now
            logger.warning("%s: waiting for workers: %s", self._where, self._pool.describe())

    # Record

    def _write_record(self) -> None:
        if self._store is None:
            return
        with self._lock:
            jobs = [to_record(job) for job in self._pool.jobs.values()]
        if jobs == self._recorded:
            return
        record = {
            "schema_version": 1,
            "system": self._where,
            "name": self._job_name,
            "user": _user(),
            "host": socket.gethostname(),
            "updated": iso_time(utc_now()),
            "jobs": jobs,
        }
        try:
            self._store.replace(self._record_name, json.dumps(record, indent=1).encode() + b"\n")
            self._recorded = jobs
        except (OSError, PipelineError):
            logger.warning("%s: the jobs could not be recorded", self._where, exc_info=True)

    def _cancel_left_over(self) -> None:
        """Cancel the jobs that earlier drivers of this job have left. This driver holds the job, so they are dead."""
        if self._store is None:
            return
        for name in self._store.list(layout.CLUSTER):
            path = f"{layout.CLUSTER}/{name}"
            if path == self._record_name:
                continue
            record = json.loads(self._store.read(path))
            if record["system"] != self._where or record["user"] != _user():
                continue
            ids = [str(job["id"]) for job in record["jobs"]]
            if ids:
                states = self._commands.states(ids)
                # A batch system may give an id to another job in time.
                ours = [id for id, state in states.items() if state.end is None and state.name in ("", record["name"])]
                if ours:
                    self._commands.cancel(ours)
                    logger.warning("%s: cancelled jobs of an earlier driver: %s", self._where, ", ".join(ours))
            self._store.remove(path)

    # Events from the scheduler's thread

    def _worker_joined(self, number: int, address: str) -> None:
        with self._lock:
            self._pool.worker_joined(number, address, now=self._clock())

    def _worker_left(self, address: str, is_expected: bool) -> None:
        with self._lock:
            self._pool.worker_left(address, is_expected=is_expected, now=self._clock())

    # WorkerSupply

    def set_demand(self, owner: int, partitions: int) -> None:
        """Tell how many partitions of a dispatcher are not done."""
        with self._lock:
            self._demands[owner] = partitions
            self._pool.demand = sum(self._demands.values())

    def expects_workers(self) -> bool:
        """Return True while jobs may bring workers.

        :raises SpecError: when the batch system refuses the request itself.
        :raises NoWorkers: when no worker is to be expected.
        """
        with self._lock:
            reason = self._pool.give_up(now=self._clock())
            is_alive = bool(self._pool.jobs) or reason is None
        if reason is None:
            return is_alive
        raise self._error(reason)

    def _error(self, reason: GiveUp) -> PipelineError:
        found = f"{reason.found}\n{self._log_tail}" if self._log_tail and not reason.is_refused else reason.found
        if reason.is_refused and self._pool.last_worker is None:
            return SpecError(
                reason.message,
                where=f"{self._where}; the script is {self._script}",
                found=found,
                next_step="fix the fields of the cluster file, such as cores, memory, queue, account or walltime",
            )
        logs = "check the queue and logs/workers/ in the job directory"
        return NoWorkers(
            reason.message, where=self._where, found=found, next_step=f"{logs}, then resume; or raise wait"
        )

    def loss_cause(self, worker: str) -> LossCause | None:
        """Return why a worker left without a word; None: not known yet."""
        with self._lock:
            if not self._pool.is_ours(worker):
                return LossCause.CRASH
            verdict = self._pool.verdict(worker, now=self._clock())
        if verdict is None:
            return None
        if verdict.end in BLAMELESS:
            return LossCause.JOB_ENDED
        return LossCause.MEMORY if verdict.end is JobEnd.OUT_OF_MEMORY else LossCause.CRASH

    def describe(self) -> str:
        """Return the state of the pool in a line."""
        with self._lock:
            jobs = plural(len(self._pool.jobs), "job")
            return f"{jobs}: {self._pool.describe()}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
