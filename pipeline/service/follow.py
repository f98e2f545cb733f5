"""Follow a job from its directory alone: its events and its end, from any process and machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.common.units import utc_now
from pipeline.errors import DriverLost
from pipeline.events import (
    AttemptOutcome,
    Event,
    JobEnded,
    PartitionEnded,
    RoundStarted,
    SplitReason,
    StatusChanged,
    StepMessage,
)
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import LEASE_SECONDS, Verdict, highest_epoch
from pipeline.jobs.progress_file import read_progress
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.stages import find_stage
from pipeline.jobs.status import Status
from pipeline.report.build import make_report
from pipeline.service.queue import LeaseWatch, view_job
from pipeline.service.servers import is_served
from pipeline.storage.store import open_store

LOCAL_SECONDS = 0.3
"""Seconds between two polls of a directory on a file system."""
REMOTE_SECONDS = 3.0
"""Seconds between two polls of a directory in an object store, where each is several requests."""
LEASE_EVERY = 10
"""Polls of the status per check of the lease."""


def pause_for(job: JobDirectory) -> float:
    """Return the seconds to wait between two polls of ``job``."""
    return LOCAL_SECONDS if job.store.is_local else REMOTE_SECONDS


@dataclass
class EndMonitor:
    """Monitor that waits for the end of a job, and notices when no process is left to end the job."""

    job: JobDirectory
    lease_seconds: float = LEASE_SECONDS
    _polls: int = 0
    _watch: LeaseWatch = field(init=False)

    def __post_init__(self) -> None:
        self._watch = LeaseWatch(self.lease_seconds)

    def poll(self) -> Status | None:
        """Return the final status of the job; None while the job has not ended.

        :raises DriverLost: when the driver has died, and no server is alive to start another driver.
        """
        status = self.job.status()
        if status.is_final:
            return status
        if self._polls % LEASE_EVERY == 0 and status.is_active:
            self._check_driver(status)
        self._polls += 1
        return None

    def _check_driver(self, status: Status) -> None:
        view = view_job(self.job, self._watch, now=utc_now())
        verdict = view.lease if view else self._watch.judge(self.job)[1]
        is_gone = verdict in (Verdict.DEAD, Verdict.STALE, Verdict.FREE) and not (view and view.is_starting)
        # The status may have changed since: the driver may have shut down cleanly.
        if not is_gone or self.job.status() is not status:
            return
        root = self.job.root.rpartition("/")[0]
        if view is not None and is_served(open_store(root, private=True), now=utc_now()):
            return
        raise DriverLost(
            "the driver of this job has died",
            where=self.job.root,
            found=f"status {status}, and no driver",
            expected="a driver, or a server that starts one",
            next_step=f"python -m pipeline resume {self.job.id}",
        )

    def wait(
        self,
        *,
        timeout: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] = time.sleep,
    ) -> Status:
        """Wait for the end of the job. Return its final status.

        :param timeout: Seconds. Default: no limit.
        :raises TimeoutError: when the job has not ended after ``timeout``.
        :raises DriverLost: see `poll`.
        """
        started, seconds = clock(), pause_for(self.job)
        while (status := self.poll()) is None:
            if timeout is not None and clock() - started >= timeout:
                raise TimeoutError(f"job {self.job.id} is {self.job.status()} after {timeout:g} s")
            pause(seconds)
        return status


@dataclass
class Follower:
    """Reader of a job's events from its directory. The events are those that the driver's own callbacks get."""

    job: JobDirectory
    _events: int = 0
    """Lines of ``events.jsonl`` already yielded."""
    _progress_time: str = ""
    """Time of the last progress yielded."""
    _receipts: dict[str, Receipt] = field(default_factory=dict)
    """Known receipts by ``<round>/<name of the file>``."""
    _places: set[tuple[str, str, str]] = field(default_factory=set)
    """Places in the code of steps of which a print or warning was yielded."""
    _stage: JobDirectory | None = None
    """The last stage that began, of a job with stages: its receipts count."""

    def poll(self) -> Iterator[Event]:
        """Yield the events since the last poll. The first poll yields the status and progress so far."""
        events = self.job.events.read()
        self._enter_stage(events)
        is_first, new = self._events == 0, self._new_receipts()
        recent, self._events = events[self._events :], len(events)
        if is_first:
            statuses = [event for event in recent if event["event"] == "status"]
            yield from (self._status(event) for event in statuses[-1:])
            yield self._round_started()
            return
        for event in recent:
            yield from self._from_record(event)
        if not any(event["event"] in ("round_started", "stage") for event in recent):
            # Otherwise the counts of RoundStarted include these partitions already.
            for key, receipt in new:
                yield from self._messages(receipt)
                if not receipt.splits:
                    yield self._done(key, receipt)
        yield from self._progress()

    def _progress(self) -> Iterator[Event]:
        """Yield the progress inside partitions, if the driver stored a new one and still runs."""
        record = read_progress(self.job.store)
        if record is None or record.time == self._progress_time:
            return
        self._progress_time = record.time
        if self.job.status() is Status.RUNNING and record.epoch == highest_epoch(self.job.store):
            yield record.progress

    def end(self, status: Status) -> JobEnded:
        """Return the last event of a job that ended with ``status``."""
        report = make_report(self.job, status=status)
        stored = self.job.read_report()
        shown = stored if stored is not None and stored.get("status") == str(status) else report.to_dict()
        return JobEnded(
            report.job, str(status), report.rows, report.output, report.directory, str(shown.get("reason", "")), shown
        )

    def _from_record(self, event: dict[str, Any]) -> Iterator[Event]:
        if event["event"] == "status":
            yield self._status(event)
        elif event["event"] in ("round_started", "stage"):
            yield self._round_started()
        elif event["event"] == "partition":
            yield PartitionEnded(
                job=self.job.id,
                round=0,
                partition=str(event.get("partition", "")),
                outcome=AttemptOutcome(event["outcome"]),
                attempt=int(event.get("attempt", 1)),
                reason=str(event.get("reason", "")),
                split_reason=SplitReason(event["split_reason"]) if event.get("split_reason") else None,
            )

    def _status(self, event: dict[str, Any]) -> StatusChanged:
        return StatusChanged(
            self.job.id, str(event.get("before", "")), str(event.get("after", "")), str(event.get("reason", ""))
        )

    def _round_started(self) -> RoundStarted:
        """Return the progress of the last round."""
        ledger = (self._stage or self.job).ledger(self._receipts.values())
        round_, partitions = ledger.last, ledger.partitions(ledger.last)
        done = [receipt for receipt in ledger.done if receipt.round == round_.number]
        rows, rows_done = sum(partition.rows for partition in partitions), sum(receipt.rows.input for receipt in done)
        return RoundStarted(self.job.id, round_.number, len(partitions), len(done), rows, min(rows_done, rows))

    def _done(self, key: str, receipt: Receipt) -> PartitionEnded:
        return PartitionEnded(
            job=self.job.id,
            round=int(key.partition("/")[0]),
            partition=receipt.partition,
            outcome=AttemptOutcome.DONE,
            rows=receipt.rows,
            seconds=receipt.seconds.total,
            worker=receipt.worker,
            messages=receipt.messages,
        )

    def _messages(self, receipt: Receipt) -> Iterator[Event]:
        """Yield the prints and warnings of steps from places that no receipt before has named."""
        for message in receipt.messages:
            if message.key not in self._places:
                self._places.add(message.key)
                yield StepMessage(self.job.id, receipt.partition, receipt.worker, *message.key, message.text)

    def _enter_stage(self, events: Sequence[dict[str, Any]]) -> None:
        """Go over to the stage that began last."""
        began = [str(event["stage"]) for event in events if event["event"] == "stage"] if self.job.record.stages else []
        if began and (self._stage is None or self._stage.record.stage != began[-1]):
            self._stage, self._receipts = find_stage(self.job, began[-1]), {}

    def _new_receipts(self) -> list[tuple[str, Receipt]]:
        """Return receipts that are new since the last poll, by ``<round>/<name of the file>``."""
        store, new = (self._stage or self.job).store, []
        for round in layout.numbers_of(store.list_folders(layout.ROUNDS), suffix=""):
            for name in store.list(layout.receipts_folder(round)):
                key, path = f"{round}/{name}", f"{layout.receipts_folder(round)}/{name}"
                if name.endswith(".json") and key not in self._receipts:
                    receipt = Receipt.from_json(store.read(path), where=store.url(path))
                    self._receipts[key] = receipt
                    new.append((key, receipt))
        return new
