"""Evaluate a trigger once: read its log, decide, record, submit. Safe to repeat, interrupt and run concurrently."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Protocol

from pipeline.common.secrets import redact
from pipeline.errors import InfrastructureError, PipelineError, StorageError
from pipeline.service.triggers.arrivals import ArrivedFile, RowCounter, scan_arrivals
from pipeline.service.triggers.child import count_rows
from pipeline.service.triggers.decide import REFUSED, Decision, Success, View, decide_trigger, may_submit
from pipeline.service.triggers.log import Entry, Firing, Log, SeenFile, State, apply, to_text
from pipeline.spec.triggers import Trigger

logger = logging.getLogger(__name__)
_ROUNDS = 1000
"""Limit of rounds, against a bug here or a clock that jumps."""


ScanArrivals = Callable[..., tuple[ArrivedFile, ...]]
"""`pipeline.service.triggers.arrivals.scan_arrivals`, with its ``count_rows``."""


class BadFiles(PipelineError):
    """The job of a firing cannot be created because of some of its files."""

    def __init__(self, error: PipelineError, files: Mapping[SeenFile, str]) -> None:
        super().__init__(
            error.message, where=error.where, found=error.found, expected=error.expected, next_step=error.next_step
        )
        self.files = files
        """The bad files, with the reason of each."""


class Jobs(Protocol):
    """Access of a trigger to jobs."""

    def submit(self, firing: Firing) -> str:
        """Submit the job of ``firing`` unless the job exists. Return the id, which is always the same for one firing.

        :raises StorageError: or InfrastructureError, when a retry may succeed.
        :raises BadFiles: when some files prevent the job.
        :raises PipelineError: when the job can never be created.
        """

    def ended(self, job: str) -> str:
        """Return the final status of a job; empty while the job has not ended."""

    def cancel(self, job: str) -> None:
        """Cancel a job unless it has ended."""

    def successes(self, name: str) -> Sequence[Success]:
        """Return all successes of the jobs with that name, oldest first."""


@dataclass(frozen=True)
class Seen:
    """Result of one evaluation."""

    fired: tuple[Firing, ...]
    submitted: tuple[tuple[str, str], ...]
    """Firing and job."""
    reason: str
    """Reason why the trigger fired, or why not."""
    state: State
    warning: str = ""
    """Message for a person; empty in general."""


scan_in_process = partial(scan_arrivals, count_rows=RowCounter(count_rows))


def evaluate_trigger(
    trigger: Trigger,
    log: Log,
    *,
    jobs: Jobs,
    clock: Callable[[], datetime],
    scan: ScanArrivals = scan_in_process,
) -> Seen:
    """Do whatever ``trigger`` requires now.

    :raises PipelineError: when the log, the files or the jobs cannot be read; the next evaluation continues from there.
    """
    fired: list[Firing] = []
    submitted: list[tuple[str, str]] = []
    reason = warning = ""
    for _ in range(_ROUNDS):
        state, now = log.read(), clock()
        decision = decide_trigger(trigger, state, now=now, view=view_for(trigger, state, jobs=jobs, scan=scan))
        reason, warning = reason or decision.reason, warning or decision.warning
        if decision.entries:
            if not log.append(decision.entries, after=state, now=now):
                continue
            fired += [entry.firing for entry in decision.entries if entry.firing is not None]
            state = log.read()
        done = _act(state, jobs)
        submitted += [(entry.id, entry.job) for entry in done if entry.what == "submitted"]
        if done:
            record(log, done, clock=clock)
        elif not decision.entries:
            return Seen(tuple(fired), tuple(submitted), reason, state, warning)
    return Seen(tuple(fired), tuple(submitted), reason, log.read(), warning)


def explain(
    trigger: Trigger,
    log: Log,
    *,
    jobs: Jobs,
    now: datetime,
    scan: ScanArrivals = scan_in_process,
) -> tuple[State, Decision]:
    """Return the state, and the decision that `evaluate_trigger` would make now. Write nothing."""
    state = log.read()
    view = view_for(trigger, state, jobs=jobs, scan=scan)
    decision = decide_trigger(trigger, state, now=now, view=view)
    if any(entry.what == "started" for entry in decision.entries):
        # A trigger is first marked as watched. Show the decision after that.
        begun = apply(state, decision.entries, number=1, time=to_text(now))
        decision = decide_trigger(trigger, begun, now=now, view=view)
    return state, decision


def view_for(trigger: Trigger, state: State, *, jobs: Jobs, scan: ScanArrivals = scan_in_process) -> View:
    """Return the view that `decide_trigger` needs. Read the state first, so that the view is no older."""
    ended = {
        open_firing.job: status
        for open_firing in state.open
        if open_firing.job and (status := jobs.ended(open_firing.job))
    }
    files = scan(trigger.arrival, seen=state.seen) if trigger.arrival is not None else ()
    successes = tuple(jobs.successes(trigger.after)) if trigger.after is not None else ()
    return View(files, successes, ended)


def record(log: Log, entries: Iterable[Entry], *, clock: Callable[[], datetime]) -> bool:
    """Record entries that no other process has recorded. Return False if none remain."""
    wanted = tuple(entries)
    while True:
        state = log.read()
        new = tuple(entry for entry in wanted if _is_news(entry, state))
        if not new:
            return False
        if log.append(new, after=state, now=clock()):
            return True


def _act(state: State, jobs: Jobs) -> list[Entry]:
    """Submit and cancel the jobs that the log requires. Temporary failures are retried in the next evaluation."""
    done: list[Entry] = []
    for open_firing in state.open:
        if open_firing.job and open_firing.is_cancelling:
            jobs.cancel(open_firing.job)
    for open_firing in may_submit(state):
        try:
            done.append(Entry("submitted", id=open_firing.firing.id, job=jobs.submit(open_firing.firing)))
        except (StorageError, InfrastructureError) as error:
            logger.warning("the job of %s could not be submitted yet: %s", open_firing.firing.id, error)
        except BadFiles as error:
            done.append(_without_bad_files(open_firing.firing, error))
        except PipelineError as error:
            logger.warning("the job of %s was refused: %s", open_firing.firing.id, error)
            done.append(
                Entry("ended", id=open_firing.firing.id, status=REFUSED, reason=" ".join(redact(str(error)).split()))
            )
    return done


def _without_bad_files(firing: Firing, error: BadFiles) -> Entry:
    """End a firing, and release its good files: they are due again. A bad file is due when it changes."""
    good = tuple(file.key for file in firing.files if file not in error.files)
    reasons = "; ".join(f"{file.path}: {reason}" for file, reason in error.files.items())
    reason = " ".join(redact(f"bad files, which fire again when they change: {reasons}").split())
    logger.warning("%s: %s; the other files (%d) fire again", firing.id, reason, len(good))
    return Entry("ended", id=firing.id, status=REFUSED, reason=reason, keys=good)


def _is_news(entry: Entry, state: State) -> bool:
    if entry.what == "fired":
        return entry.firing is not None and state.find(entry.firing.id) is None
    open_firing = state.find(entry.id)
    return open_firing is not None and not (entry.what == "submitted" and open_firing.job)
