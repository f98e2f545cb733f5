"""`Handle`: a job that goes on by itself, taken up from Python: waited for, awaited, observed, cancelled."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any

from pipeline.errors import DriverLost, PipelineError, error_from_dict
from pipeline.events import Callback, notify
from pipeline.jobs.cancellation import CancelOutcome, cancel_job
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import LEASE_SECONDS
from pipeline.jobs.status import Status
from pipeline.report.build import make_report
from pipeline.report.report import Report
from pipeline.service.follow import Ending, Follower, pause_for
from pipeline.service.logs import LogLine, LogReader

logger = logging.getLogger(__name__)


class Handle:
    """One job, by its directory. It may be taken up by any number of processes, at any time, also when it has ended.

    ``await handle`` gives the report like `wait`, and keeps no thread of the event loop busy.
    """

    def __init__(self, directory: JobDirectory, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self.directory = directory
        self.lease_seconds = lease_seconds
        """See `pipeline.settings`."""

    @property
    def job(self) -> str:
        """The id of the job."""
        return self.directory.job

    @property
    def status(self) -> Status:
        """Where it is in its life, now."""
        return self.directory.status()

    def report(self) -> Report:
        """What became of it, or how it stands, in figures."""
        return make_report(self.directory)

    def wait(self, timeout: float | None = None) -> Report:
        """Its report, once it has ended well.

        :param timeout: seconds. None: as long as it takes.
        :raises TimeoutError: when it has not ended by then; it goes on.
        :raises PipelineError: what ended it, when it did not end well.
        :raises DriverLost: when its driver has died, and no server starts another one.
        """
        return self._ended(Ending(self.directory, self.lease_seconds).wait(timeout=timeout))

    def __await__(self) -> Generator[Any, None, Report]:
        return self._wait().__await__()

    async def _wait(self) -> Report:
        ending, seconds = Ending(self.directory, self.lease_seconds), pause_for(self.directory)
        while (status := await asyncio.to_thread(ending.look)) is None:
            await asyncio.sleep(seconds)
        return await asyncio.to_thread(self._ended, status)

    def cancel(self, *, now: bool = False, reason: str = "") -> CancelOutcome:
        """Ask its driver to stop; a job without one is cancelled at once.

        :param now: do not even wait for the partitions that run.
        """
        return cancel_job(self.directory, now=now, reason=reason, lease_seconds=self.lease_seconds)

    def logs(self, *, partition: str = "", errors: bool = False) -> list[LogLine]:
        """What has happened so far, oldest first.

        :param partition: only what is about this one and its parts.
        :param errors: only warnings and errors.
        """
        reader = LogReader(self.directory, partition=partition, errors=errors)
        return [*reader.read(), *reader.receipts()]

    def observe(self, *callbacks: Callback) -> threading.Thread:
        """Tell ``callbacks`` what happens from now on, in a thread that ends with the job; gives that thread."""
        thread = threading.Thread(target=self._observe, args=(callbacks,), name=f"pipeline-{self.job}", daemon=True)
        thread.start()
        return thread

    def _observe(self, callbacks: Sequence[Callback]) -> None:
        follower, ending = Follower(self.directory), Ending(self.directory, self.lease_seconds)
        while True:
            try:
                status = ending.look()
                for event in follower.poll():
                    notify(callbacks, event)
            except DriverLost as error:
                logger.warning("job %s is observed no longer: %s", self.job, error)
                return
            except PipelineError as error:
                logger.warning("job %s could not be looked at: %s", self.job, error)
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
        return f"{self.status}  {self.job}"
