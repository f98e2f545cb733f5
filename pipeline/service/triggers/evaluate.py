"""One look at a trigger: read its log, decide, write down, submit. Safe to be repeated, interrupted and raced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from pipeline.common.secrets import redact
from pipeline.errors import InfrastructureError, PipelineError, StorageError
from pipeline.service.triggers import arrivals
from pipeline.service.triggers.arrivals import ArrivedFile
from pipeline.service.triggers.decide import REFUSED, Decision, Success, View, decide_trigger, may_submit
from pipeline.service.triggers.log import Entry, Firing, Log, State, apply, to_text
from pipeline.spec.triggers import Trigger

logger = logging.getLogger(__name__)
_ROUNDS = 1000
"""So that a defect here, or a clock that runs wild, ends."""


class Jobs(Protocol):
    """What a trigger needs to know of jobs, and do about them."""

    def submit(self, firing: Firing) -> str:
        """The id of the job of ``firing``: made when it is not there, the same one whenever it is asked for again.

        :raises StorageError: or InfrastructureError, when it may be tried again.
        :raises PipelineError: when there will never be one.
        """

    def ended(self, job: str) -> str:
        """The status a job ended with; empty while it goes on."""

    def cancel(self, job: str) -> None:
        """Ask for the end of a job; nothing happens when it has ended."""

    def successes(self, name: str) -> Sequence[Success]:
        """All successes of the jobs of that name, oldest first."""


@dataclass(frozen=True)
class Seen:
    """What came of one look."""

    fired: tuple[Firing, ...]
    submitted: tuple[tuple[str, str], ...]
    """Firing and job."""
    reason: str
    """Why it fired, or why not."""
    state: State


def evaluate_trigger(
    trigger: Trigger,
    log: Log,
    *,
    jobs: Jobs,
    clock: Callable[[], datetime],
    look: Callable[..., tuple[ArrivedFile, ...]] = arrivals.scan_arrivals,
) -> Seen:
    """Do about ``trigger`` whatever is to be done now.

    :raises PipelineError: when the log, the files or the jobs cannot be read; the next look goes on from there.
    """
    fired: list[Firing] = []
    submitted: list[tuple[str, str]] = []
    reason = ""
    for _ in range(_ROUNDS):
        state, now = log.read(), clock()
        decision = decide_trigger(trigger, state, now=now, view=view_for(trigger, state, jobs=jobs, look=look))
        reason = reason or decision.reason
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
            return Seen(tuple(fired), tuple(submitted), reason, state)
    return Seen(tuple(fired), tuple(submitted), reason, log.read())


def explain(
    trigger: Trigger,
    log: Log,
    *,
    jobs: Jobs,
    now: datetime,
    look: Callable[..., tuple[ArrivedFile, ...]] = arrivals.scan_arrivals,
) -> tuple[State, Decision]:
    """What `evaluate_trigger` would decide now. Writes nothing."""
    state = log.read()
    view = view_for(trigger, state, jobs=jobs, look=look)
    decision = decide_trigger(trigger, state, now=now, view=view)
    if any(entry.what == "started" for entry in decision.entries):
        # Being watched for the first time comes first; what it would find then is what is asked for.
        begun = apply(state, decision.entries, number=1, time=to_text(now))
        decision = decide_trigger(trigger, begun, now=now, view=view)
    return state, decision


def view_for(
    trigger: Trigger, state: State, *, jobs: Jobs, look: Callable[..., tuple[ArrivedFile, ...]] = arrivals.scan_arrivals
) -> View:
    """What `decide_trigger` must know of the world. The state is read before, so that whatever it has seen is there by
    now."""
    ended = {one.job: status for one in state.open if one.job and (status := jobs.ended(one.job))}
    files = look(trigger.arrival, seen=state.seen) if trigger.arrival is not None else ()
    successes = tuple(jobs.successes(trigger.after)) if trigger.after is not None else ()
    return View(files, successes, ended)


def record(log: Log, entries: Iterable[Entry], *, clock: Callable[[], datetime]) -> bool:
    """Write down what was done, if nobody else has done so; False when there was nothing left to write."""
    wanted = tuple(entries)
    while True:
        state = log.read()
        left = tuple(entry for entry in wanted if _is_news(entry, state))
        if not left:
            return False
        if log.append(left, after=state, now=clock()):
            return True


def _act(state: State, jobs: Jobs) -> list[Entry]:
    """Submit and cancel as the log says; what failed for now is tried again at the next look."""
    done: list[Entry] = []
    for one in state.open:
        if one.job and one.is_cancelling:
            jobs.cancel(one.job)
    for one in may_submit(state):
        try:
            done.append(Entry("submitted", id=one.firing.id, job=jobs.submit(one.firing)))
        except (StorageError, InfrastructureError) as error:
            logger.warning("the job of %s could not be submitted yet: %s", one.firing.id, error)
        except PipelineError as error:
            logger.warning("there is no job of %s: %s", one.firing.id, error)
            done.append(Entry("ended", id=one.firing.id, status=REFUSED, reason=" ".join(redact(str(error)).split())))
    return done


def _is_news(entry: Entry, state: State) -> bool:
    if entry.what == "fired":
        return entry.firing is not None and state.find(entry.firing.id) is None
    one = state.find(entry.id)
    return one is not None and not (entry.what == "submitted" and one.job)
