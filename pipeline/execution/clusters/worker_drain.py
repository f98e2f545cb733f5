"""End the worker of a batch job by itself, before the batch system does: at its deadline, or at SIGTERM.

Shortly before the end, the worker takes no more partitions. Running partitions commit what they have scored at the
next batch boundary, and leave the rest to others. Then the process ends. Dask's own lifetime loses what runs, and the
process of a running task stays.

The job script tells when the job has started, since a prologue may take long: `DrainTimes.from_environment`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distributed.core import Status

from pipeline.execution.worker_events import LEAVING_TOPIC
from pipeline.scoring import progress

logger = logging.getLogger(__name__)
STARTED = "PIPELINE_JOB_STARTED"
"""Variable with the start of the batch job, in seconds since 1970."""
LIFETIME = "PIPELINE_LIFETIME"
"""Variable with the seconds from then until the worker has left."""
STAGGER = "PIPELINE_STAGGER"
"""Variable with the seconds by which the worker may leave earlier, so that workers do not leave together."""
END_TIME = "SLURM_JOB_END_TIME"
"""Variable with the end of the job, in seconds since 1970; set by newer Slurm (22.05 does not)."""
COMMIT_SECONDS = 5.0
"""Seconds for the commit of the running partitions, beside their last batch."""
IDLE_SECONDS = 3.0
"""Seconds before this, in which no more partitions are taken: they would be cut at once."""
SIGNAL_SECONDS = 20.0
"""Seconds from SIGTERM to the end of the worker. Slurm sends SIGKILL after 30 s (KillWait)."""
CLOSE_SECONDS = 5.0
"""Seconds in which the scheduler must let the worker go."""
BEAT = 0.25


@dataclass(frozen=True)
class DrainTimes:
    """When a worker has to leave."""

    leaves_at: float
    """Seconds since 1970."""
    lifetime: float
    """Seconds from the start of the job until then."""

    @staticmethod
    def from_environment(environment: Mapping[str, str], *, name: str, now: float) -> DrainTimes | None:
        """Return the times that the job script set; None for a worker that is no batch job.

        :param name: name of the worker. The workers of one job leave together.
        """
        if LIFETIME not in environment:
            return None
        started = float(environment.get(STARTED) or now)
        lifetime = float(environment[LIFETIME])
        walltime_end = float(environment.get(END_TIME) or "inf")
        early = float(environment.get(STAGGER) or 0.0) * _share(name)
        leaves = min(started + lifetime - early, walltime_end - COMMIT_SECONDS - early)
        return DrainTimes(leaves, leaves - started)


def _share(name: str) -> float:
    """Return a number from 0 to 1 that differs for jobs with consecutive numbers: ``pipeline-3-0`` is of job 3."""
    digits = name.split("-")[1] if name.count("-") else ""
    return (int(digits) * 0.618034) % 1.0 if digits.isdigit() else 0.5


class Drain:
    """The end of one worker."""

    def __init__(self, worker: Any, times: DrainTimes, *, clock: Callable[[], float] = time.time) -> None:
        self._worker = worker
        self._times = times
        self._clock = clock
        self._signalled_at: float | None = None

    def start(self) -> None:
        """Watch for the deadline and for SIGTERM. Must be called on the event loop of the worker."""
        self._task = asyncio.get_running_loop().create_task(self.run())
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum: int, frame: object) -> None:
        self._signalled_at = self._signalled_at or self._clock()

    @property
    def seconds_left(self) -> float:
        """Seconds until the worker has to be gone."""
        left = self._times.leaves_at - self._clock()
        if self._signalled_at is None:
            return left
        return min(left, self._signalled_at + SIGNAL_SECONDS - self._clock())

    @property
    def margin(self) -> float:
        """Seconds before the end at which running partitions are asked to stop."""
        return COMMIT_SECONDS + 1.5 * progress.seconds_per_batch()

    async def run(self) -> None:
        """Wait for the time to drain, then let the partitions end, and leave."""
        while self._signalled_at is None and self.seconds_left > self.margin + IDLE_SECONDS:
            await asyncio.sleep(BEAT)
        reason = "deadline" if self._signalled_at is None else "signal"
        logger.info("leaving: %s, in %.0f s", reason, self.seconds_left)
        self._worker.log_event(
            LEAVING_TOPIC,
            {"worker": self._worker.address, "reason": reason, "lifetime": self._times.lifetime},
        )
        self._pause()
        while progress.running_attempts() and self.seconds_left > 0:
            if self._signalled_at is not None or self.seconds_left <= self.margin:
                progress.hand_on()
            await asyncio.sleep(BEAT)
        await self._leave(reason)

    def _pause(self) -> None:
        # Else the monitor resumes a paused worker at once.
        self._worker.memory_manager.memory_pause_fraction = False
        self._worker.status = Status.paused

    async def _leave(self, reason: str) -> None:
        # Receipts that are on their way to the scheduler leave first.
        await asyncio.sleep(BEAT)
        with suppress(Exception):
            await asyncio.wait_for(
                self._worker.close_gracefully(restart=False, reason=f"leaving-{reason}"), CLOSE_SECONDS
            )
        # A task that still runs would keep the process, and with it the job.
        os._exit(0)


def leave_in_time(worker: Any) -> None:
    """Let a worker of a batch job leave in time. Do nothing for other workers."""
    times = DrainTimes.from_environment(os.environ, name=str(worker.name), now=time.time())
    if times is not None:
        Drain(worker, times).start()
