"""Check the health of the cluster: the scheduler answers, workers are connected, and partitions execute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from distributed.scheduler import heartbeat_interval

from pipeline.common.units import plural
from pipeline.errors import InfrastructureError, NoWorkers, SchedulerLost, SchedulerUnresponsive
from pipeline.execution.placement import Placement
from pipeline.execution.worker_events import WorkerSupply

logger = logging.getLogger(__name__)
PING_INTERVAL = 3.0
"""Seconds between two calls to the scheduler."""
PING_TIMEOUT = 5.0
"""Seconds the scheduler has to answer a call."""
SILENT = 4.0
"""Seconds without a heartbeat after which a worker counts as silent. More with many workers: heartbeats are rarer."""
RESTART_TIMEOUT = 10.0
"""Seconds a nanny has to stop its worker; then the scheduler removes the worker."""


@dataclass(frozen=True)
class DispatchPolicy:
    """Limits on attempts and waiting times."""

    attempts: int = 3
    """Attempts at a partition when storage or the cluster fails."""
    no_workers_timeout: float = 300.0
    """Seconds without any worker until `NoWorkers`."""
    scheduler_timeout: float = 30.0
    """Seconds without an answer until `SchedulerUnresponsive`."""
    grace: float = 60.0
    """Seconds for running partitions to end once no more partitions are started."""
    partition_timeout: float | None = None
    """Seconds an attempt may execute; None: no limit."""
    paused_timeout: float = 10.0
    """Seconds a worker may be paused for its memory with no task executing, until the worker is restarted."""
    stall_timeout: float = 120.0
    """Seconds in which nothing executes although partitions are in flight, until the workers are restarted."""
    may_restart: bool = True
    """True if workers may be restarted. False: the workers are not those of this job alone."""


def _silent(workers: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the workers whose last heartbeat is far behind the newest heartbeat of all workers.

    :param workers: descriptions of the workers from the scheduler, by address.
    """
    seen = {name: float(worker.get("last_seen") or 0.0) for name, worker in workers.items()}
    newest, limit = max(seen.values(), default=0.0), max(SILENT, 3 * heartbeat_interval(len(seen)))
    return {name for name, at in seen.items() if newest - at > limit}


class ClusterHealth:
    """Checks the scheduler and the workers; raises when a limit is exceeded."""

    def __init__(
        self,
        client: Any,
        policy: DispatchPolicy,
        clock: Callable[[], float],
        placement: Placement | None = None,
        supply: WorkerSupply | None = None,
    ) -> None:
        self._client = client
        self._policy = policy
        self._clock = clock
        self._placement = placement or Placement()
        self._supply = supply
        self._answered = self._had_workers = self._progressed = clock()
        self._pinged = float("-inf")
        self._heard = clock()
        """Time of the last result of a task."""
        self._paused: dict[str, float] = {}
        self._known: tuple[str, ...] = ()
        self._stalls = 0
        self.threads = 1
        """Threads of all workers that may take partitions, at the last ping."""
        self.workers = 1
        """Number of workers, at the last ping; isolated partitions may go to any."""
        self.slots: dict[str, int] = {}
        """Threads of each running worker that may take partitions and sends heartbeats, at the last ping."""
        self.classes: dict[str, str] = {}
        """Class of each worker that was there at some ping; see `Placement.class_of`. Empty without GPUs."""
        self._ping()

    def check(self, is_busy: bool) -> None:
        """Ping the scheduler if `PING_INTERVAL` has passed.

        :param is_busy: True if partitions wait or run; otherwise only a lost scheduler is an error.
        :raises SchedulerLost: when the connection is gone.
        :raises SchedulerUnresponsive: when the scheduler has not answered for longer than the limit.
        :raises NoWorkers: when there has been no worker for longer than the limit.
        :raises PipelineError: when the source of the workers brings none.
        """
        self.check_alive()
        if self._clock() - self._pinged >= PING_INTERVAL:
            self._ping()
        if is_busy:
            self._check_limits()

    def check_alive(self) -> None:
        """:raises SchedulerLost: when the connection is gone."""
        if self._client.status != "running":
            raise SchedulerLost(
                "lost the connection to the scheduler",
                found=f"client status {self._client.status!r}",
                next_step="resume the job; completed partitions are kept",
            )

    def record_progress(self) -> None:
        """Record that a task executes or ended, or that nothing is in flight."""
        self._progressed = self._clock()

    def record_result(self) -> None:
        """Record that the result of a task arrived: the scheduler works, even if it is too busy to answer a ping."""
        self.record_progress()
        self._heard = self._progressed

    def paused(self, *, busy: Iterable[str]) -> tuple[str, ...]:
        """Return the workers paused for too long with no task executing: such workers would stay paused.

        :param busy: workers on which tasks execute.
        """
        now, busy = self._clock(), set(busy)
        limit = self._policy.paused_timeout
        return tuple(name for name, since in self._paused.items() if name not in busy and now - since > limit)

    def stalled(self) -> tuple[str, ...]:
        """Return all workers if no task has executed for too long; otherwise an empty tuple.

        :raises InfrastructureError: when restarts did not help.
        """
        idle = self._clock() - self._progressed
        # If no workers are connected or the scheduler does not answer, other limits apply.
        if idle <= self._policy.stall_timeout or self._had_workers < self._answered or not self._known:
            return ()
        self._stalls += 1
        if self._stalls >= self._policy.attempts or not self._policy.may_restart:
            tried = f", after {self._stalls - 1} restarts of all workers" if self._policy.may_restart else ""
            allow = "" if self._policy.may_restart else ", or allow it with the setting restart-workers: true"
            raise InfrastructureError(
                "workers are connected, but nothing executes",
                found=f"nothing for {idle:.0f} s{tried}",
                expected="free memory, and free disk space for the workers' own files",
                next_step=f"check the workers' logs and disks, restart them{allow}, then resume the job",
            )
        self.record_progress()
        return tuple(self._known)

    def restart(self, workers: Iterable[str]) -> None:
        """Stop workers and wait until they are gone. Their nannies start new workers."""
        names = list(workers)
        for name in names:
            self._paused.pop(name, None)
        logger.warning("restarting %s", ", ".join(names))
        try:
            self._client.sync(
                self._client.scheduler.restart_workers,
                callback_timeout=2 * RESTART_TIMEOUT,
                workers=names,
                timeout=RESTART_TIMEOUT,
                wait_for_workers=False,
                on_error="return",
                stimulus_id=f"pipeline-restart-{time.time()}",
            )
        except (TimeoutError, OSError):
            logger.warning("the scheduler has not confirmed the restart")

    def _ping(self) -> None:
        self._pinged = self._clock()
        try:
            workers = self._client.sync(self._client.scheduler.identity, callback_timeout=PING_TIMEOUT)["workers"]
        except (TimeoutError, OSError):
            return
        now = self._answered = self._clock()
        self._known = tuple(workers)
        placed = {name: worker for name, worker in workers.items() if self._placement.may_take(worker)}
        self.threads, self.workers = sum(int(worker["nthreads"]) for worker in placed.values()), len(workers)
        if self._placement.gpus:
            self.classes.update({name: self._placement.class_of(name, worker) for name, worker in placed.items()})
        silent = _silent(workers)
        self.slots = {
            name: int(worker["nthreads"])
            for name, worker in placed.items()
            if worker["status"] == "running" and name not in silent
        }
        paused = [name for name, worker in workers.items() if worker["status"] == "paused"]
        self._paused = {name: self._paused.get(name, now) for name in paused}
        if placed:
            self._had_workers = self._answered

    def _check_limits(self) -> None:
        now = self._clock()
        heard = max(self._answered, self._heard)
        if now - heard > self._policy.scheduler_timeout:
            raise SchedulerUnresponsive(
                "the scheduler does not answer",
                found=f"no answer and no result of a task for {now - heard:.0f} s",
                expected=f"one within {self._policy.scheduler_timeout:.0f} s",
                next_step="check its machine, then resume the job",
            )
        if not self.workers and self._supply is not None and self._supply.expects_workers():
            # They wait in a queue, for which other limits hold.
            self._had_workers = self._answered
        if self._answered - self._had_workers > self._policy.no_workers_timeout:
            raise self._no_workers(self._answered - self._had_workers)

    def _no_workers(self, seconds: float) -> NoWorkers:
        if not self._placement.needs_gpu:
            return NoWorkers(
                "no workers",
                found=f"no worker for {seconds:.0f} s",
                expected=f"a worker within {self._policy.no_workers_timeout:.0f} s",
                next_step="start workers, then resume the job",
            )
        return NoWorkers(
            "no worker with a GPU is left",
            where="device: cuda",
            found=f"none for {seconds:.0f} s, and {plural(self.workers, 'worker')} without",
            expected=f"one within {self._policy.no_workers_timeout:.0f} s",
            next_step="resume; or resume with --device auto to end on CPUs: results are the same",
        )
