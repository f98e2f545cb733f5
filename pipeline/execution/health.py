"""The watch over the cluster: is the scheduler there, are there workers, and do they work?"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from distributed.scheduler import heartbeat_interval

from pipeline.errors import InfrastructureError, NoWorkers, SchedulerLost, SchedulerUnresponsive

logger = logging.getLogger(__name__)
PROBE_EVERY = 3.0
"""Seconds between two questions to the scheduler."""
PROBE_TIMEOUT = 5.0
"""Seconds the scheduler has to answer one."""
SILENT = 4.0
"""Seconds without a heartbeat after which a worker is not counted on; more where many workers are to send fewer."""
RECYCLE_TIMEOUT = 10.0
"""Seconds a nanny has to end its worker; then the scheduler forgets the worker."""


@dataclass(frozen=True)
class DispatchPolicy:
    """Limits of patience."""

    attempts: int = 3
    """Attempts a partition gets when storage or the cluster fails under it."""
    no_workers_timeout: float = 300.0
    """Seconds without any worker until `NoWorkers`."""
    scheduler_timeout: float = 30.0
    """Seconds without an answer until `SchedulerUnresponsive`."""
    grace: float = 60.0
    """Seconds running partitions are given to end once no more are started."""
    partition_timeout: float | None = None
    """Seconds an attempt may execute; None: as long as it likes."""
    paused_timeout: float = 10.0
    """Seconds a worker may be paused for its memory, with nothing executing on it, until it is restarted."""
    stall_timeout: float = 120.0
    """Seconds in which nothing executes although partitions are in flight, until the workers are restarted."""


def _silent(workers: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Those whose last heartbeat is far behind the newest of all.

    :param workers: as the scheduler describes them.
    """
    seen = {name: float(one.get("last_seen") or 0.0) for name, one in workers.items()}
    newest, limit = max(seen.values(), default=0.0), max(SILENT, 3 * heartbeat_interval(len(seen)))
    return {name for name, at in seen.items() if newest - at > limit}


class ClusterHealth:
    """Looks after the scheduler and the workers; raises when patience is over."""

    def __init__(self, client: Any, policy: DispatchPolicy, clock: Callable[[], float]) -> None:
        self._client = client
        self._policy = policy
        self._clock = clock
        self._answered = self._manned = self._moved = clock()
        self._asked = float("-inf")
        self._paused: dict[str, float] = {}
        self._known: tuple[str, ...] = ()
        self._stalls = 0
        self.threads = 1
        """Threads of all workers, as last heard."""
        self.workers = 1
        """Workers, as last heard."""
        self.slots: dict[str, int] = {}
        """Threads of each worker that takes tasks and tells of itself, as last heard."""
        self._probe()

    def check(self, is_busy: bool) -> None:
        """Ask the scheduler now and then.

        :raises SchedulerLost: when the connection is gone.
        :raises SchedulerUnresponsive: when it has not answered for longer than the limit.
        :raises NoWorkers: when there has been none for longer than the limit.
        """
        self.check_alive()
        if self._clock() - self._asked >= PROBE_EVERY:
            self._probe()
        if is_busy:
            self._check_patience()

    def check_alive(self) -> None:
        """:raises SchedulerLost: when the connection is gone."""
        if self._client.status != "running":
            raise SchedulerLost(
                "the scheduler is gone",
                found=f"client status {self._client.status!r}",
                next_step="resume the job; what is done stays done",
            )

    def moved(self) -> None:
        """Something executes, or nothing is in flight."""
        self._moved = self._clock()

    def paused(self, *, busy: Iterable[str]) -> tuple[str, ...]:
        """Workers that have been paused for too long with nothing executing on them: they never go on by themselves.

        :param busy: workers where something executes.
        """
        now, busy = self._clock(), set(busy)
        limit = self._policy.paused_timeout
        return tuple(name for name, since in self._paused.items() if name not in busy and now - since > limit)

    def stalled(self) -> tuple[str, ...]:
        """Every worker, when nothing has executed for too long.

        :raises InfrastructureError: when restarts have not helped before.
        """
        idle = self._clock() - self._moved
        # Without workers or answers it is another clock that runs.
        if idle <= self._policy.stall_timeout or self._manned < self._answered or not self._known:
            return ()
        self._stalls += 1
        if self._stalls >= self._policy.attempts:
            raise InfrastructureError(
                "the workers are there, but nothing executes",
                found=f"nothing for {idle:.0f} s, after {self._stalls - 1} restarts of all workers",
                expected="disks with space for the workers' own files, and memory to begin with",
                next_step="look at the workers' logs and disks, then resume the job",
            )
        self.moved()
        return tuple(self._known)

    def recycle(self, workers: Iterable[str]) -> None:
        """Have these workers ended; their nannies start new ones. Waits until they are gone."""
        names = list(workers)
        for name in names:
            self._paused.pop(name, None)
        logger.warning("restarting %s", ", ".join(names))
        try:
            self._client.sync(
                self._client.scheduler.restart_workers,
                callback_timeout=2 * RECYCLE_TIMEOUT,
                workers=names,
                timeout=RECYCLE_TIMEOUT,
                wait_for_workers=False,
                on_error="return",
                stimulus_id=f"pipeline-recycle-{time.time()}",
            )
        except (TimeoutError, OSError):
            logger.warning("the scheduler has not confirmed the restart")

    def _probe(self) -> None:
        self._asked = self._clock()
        try:
            found = self._client.sync(self._client.scheduler.identity, callback_timeout=PROBE_TIMEOUT)["workers"]
        except (TimeoutError, OSError):
            return
        now = self._answered = self._clock()
        self._known = tuple(found)
        self.threads, self.workers = sum(int(one["nthreads"]) for one in found.values()), len(found)
        paused = [name for name, one in found.items() if one["status"] == "paused"]
        silent = _silent(found)
        self.slots = {
            name: int(one["nthreads"])
            for name, one in found.items()
            if one["status"] == "running" and name not in silent
        }
        self._paused = {name: self._paused.get(name, now) for name in paused}
        if found:
            self._manned = self._answered

    def _check_patience(self) -> None:
        now = self._clock()
        if now - self._answered > self._policy.scheduler_timeout:
            raise SchedulerUnresponsive(
                "the scheduler does not answer",
                found=f"no answer for {now - self._answered:.0f} s",
                expected=f"one within {self._policy.scheduler_timeout:.0f} s",
                next_step="look at its machine, then resume the job",
            )
        if self._answered - self._manned > self._policy.no_workers_timeout:
            raise NoWorkers(
                "no worker is left",
                found=f"none for {self._answered - self._manned:.0f} s",
                expected=f"one within {self._policy.no_workers_timeout:.0f} s",
                next_step="start workers, then resume the job",
            )
