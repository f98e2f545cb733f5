"""`JobHandle`: wait for, await, observe or cancel a job that runs in another process."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any, Self

from pipeline.common.html import html_table
from pipeline.driver.outcome import cancel_job
from pipeline.errors import DriverLost, PipelineError, error_from_dict
from pipeline.events import Callback, notify
from pipeline.jobs.cancellation import CancelOutcome
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import LEASE_SECONDS
from pipeline.jobs.status import Status
from pipeline.report.build import make_report
from pipeline.report.notebook_progress import show_job
from pipeline.report.report import Report
from pipeline.service.follow import EndMonitor, Follower, pause_for
from pipeline.service.logs import LogLine, LogReader

logger = logging.getLogger(__name__)


class JobHandle:
    """A job that runs in another process. Any number of processes may hold a handle, also after the job has ended.

    ``await handle`` returns the report like `wait`, without blocking the event loop.

    Examples
    --------
    >>> handle = pipeline.attach("@last")
    >>> handle.wait(timeout=60).ok
    True
    """

    def __init__(self, directory: JobDirectory, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self.directory = directory
        self.lease_seconds = lease_seconds
        """See `pipeline.settings`."""

    @classmethod
    def open(cls, directory: JobDirectory, *, lease_seconds: float, callbacks: Sequence[Callback] = ()) -> Self:
        """Return a handle whose job ``callbacks`` observe."""
        handle = cls(directory, lease_seconds=lease_seconds)
        if callbacks:
            handle.observe(*callbacks)
        return handle

    @property
    def job(self) -> str:
        """Id of the job."""
        return self.directory.id

    @property
    def status(self) -> Status:
        """Status of the job, read from its directory now."""
        return self.directory.status()

    def report(self) -> Report:
        """Return the report of the job, or its figures so far."""
        return make_report(self.directory)

    def wait(self, timeout: float | None = None) -> Report:
        """Wait until the job has ended, and return its report.

        Parameters
        ----------
        timeout : float, optional
            Seconds. Default: no limit.

        Returns
        -------
        Report

        Raises
        ------
        TimeoutError
            If the job is still running after ``timeout``.
        PipelineError
            The error of a job that failed, was cancelled or was interrupted.
        DriverLost
            If its driver died, and no server restarts it.
        """
        return self._ended(EndMonitor(self.directory, self.lease_seconds).wait(timeout=timeout))

    def watch(self) -> Report:
        """Show the progress of the job until it has ended, and return its report. The job does not depend on it.

        In Jupyter the progress is a card that is updated in place. Interrupting the cell ends only the display.

        Returns
        -------
        Report

        Raises
        ------
        PipelineError
            The error of a job that failed, was cancelled or was interrupted.
        DriverLost
            If its driver died, and no server restarts it.
        """
        with show_job() as observers:
            follower, ending = Follower(self.directory), EndMonitor(self.directory, self.lease_seconds)
            while True:
                status = ending.poll()
                for event in follower.poll():
                    notify(observers, event)
                if status is not None:
                    notify(observers, follower.end(status))
                    return self._ended(status)
                time.sleep(pause_for(self.directory))

    def __await__(self) -> Generator[Any, None, Report]:
        return self._wait().__await__()

    async def _wait(self) -> Report:
        ending, seconds = EndMonitor(self.directory, self.lease_seconds), pause_for(self.directory)
        while (status := await asyncio.to_thread(ending.poll)) is None:
            await asyncio.sleep(seconds)
        return await asyncio.to_thread(self._ended, status)

    def cancel(self, *, now: bool = False, reason: str = "") -> CancelOutcome:
        """Ask the driver of the job to stop. A job without a driver is cancelled at once.

        Parameters
        ----------
        now : bool, default False
            Stop running partitions, too, instead of waiting for them.
        reason : str, optional
            Recorded with the job.
        """
        return cancel_job(self.directory, now=now, reason=reason, lease_seconds=self.lease_seconds)

    def logs(self, *, partition: str = "", errors: bool = False) -> list[LogLine]:
        """Return the events of the job so far, oldest first.

        Parameters
        ----------
        partition : str, optional
            Only events of this partition and its parts.
        errors : bool, default False
            Only warnings and errors.
        """
        reader = LogReader(self.directory, partition=partition, errors=errors)
        return [*reader.read(), *reader.receipts()]

    def observe(self, *callbacks: Callback) -> threading.Thread:
        """Call ``callbacks`` for every event from now on, in a thread that ends with the job. Return that thread."""
        thread = threading.Thread(target=self._observe, args=(callbacks,), name=f"pipeline-{self.job}", daemon=True)
        thread.start()
        return thread

    def _observe(self, callbacks: Sequence[Callback]) -> None:
        follower, ending = Follower(self.directory), EndMonitor(self.directory, self.lease_seconds)
        while True:
            try:
                status = ending.poll()
                for event in follower.poll():
                    notify(callbacks, event)
            except DriverLost as error:
                logger.warning("stopped observing job %s: %s", self.job, error)
                return
            except PipelineError as error:
                logger.warning("job %s could not be read: %s", self.job, error)
                status = None
            if status is not None:
                notify(callbacks, follower.end(status))
                return
            time.sleep(pause_for(self.directory))

    def _ended(self, status: Status) -> Report:
        if status.is_success:
            return self.report()
        report = self.directory.read_report() or {}
        error = report.get("error") if report.get("status") == str(status) else None
        kind = "Cancelled" if status is Status.CANCELLED else ""
        raise error_from_dict(error or {"kind": kind}, default=f"job {self.job} is {status}")

    def __repr__(self) -> str:
        return f"<JobHandle {self.job} in {self.directory.root}>"

    def _repr_html_(self) -> str:
        fields = {"directory": self.directory.root, "next": f"python -m pipeline watch {self.job}"}
        return html_table(f"job {self.job}", fields.items(), tone="busy")
