"""Decide what a trigger does now: a pure function of its definition, its state, the clock and a view of the world."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from pipeline.common.digest import digest_json
from pipeline.service.triggers.arrivals import ArrivedFile, decide_arrival, fired_id
from pipeline.service.triggers.log import Entry, Firing, Open, SeenFile, State, from_text, to_text
from pipeline.service.triggers.schedule import firing_id, instants
from pipeline.spec.triggers import Trigger

SUCCEEDED = ("SUCCEEDED", "SUCCEEDED_WITH_WARNINGS")
GONE = "GONE"
"""End of a job whose directory was removed."""
REFUSED = "REFUSED"
"""End of a firing whose job was never created, because its spec, model or input is invalid."""
MOST_AT_ONCE = 500
"""Maximum number of firings in one record of the log. Further firings follow in the next record."""
FORGET_AFTER = timedelta(days=30)
"""Minimum time that a key is remembered after its firing, and again after its file or job is gone."""


@dataclass(frozen=True)
class Success:
    """A success of another job."""

    job: str
    manifest: int
    time: datetime

    @property
    def key(self) -> str:
        """Key of this success. A retry that repairs the output is another success."""
        return f"{self.job}.{self.manifest}"


@dataclass(frozen=True)
class View:
    """View of the world, read after the state."""

    files: tuple[ArrivedFile, ...] = ()
    successes: tuple[Success, ...] = ()
    """Successes of the job that the trigger follows, oldest first."""
    ended: Mapping[str, str] = field(default_factory=dict)
    """Job -> its final status; unfinished jobs are left out."""


@dataclass(frozen=True)
class Decision:
    """Entries to record, and a reason to show."""

    entries: tuple[Entry, ...]
    reason: str
    """Reason why the trigger fires, or why not."""


def definition_digest(trigger: Trigger) -> str:
    """Return the SHA-256 of the fields that decide when the trigger fires: all but name, job and parameters."""
    return digest_json(trigger.model_dump(mode="json", exclude={"name", "job", "params"}))


def decide_trigger(trigger: Trigger, state: State, *, now: datetime, view: View) -> Decision:
    """Decide the entries to add to the log now; none if nothing is due.

    Open firings come first: a job that ended makes room for waiting firings. Then due occurrences are fired or skipped
    by ``missed`` and ``overlap``, and firings that may run are marked as being submitted.
    """
    if state.definition != definition_digest(trigger):
        return _start(trigger, state, now=now, view=view)
    ended = [entry for one in state.open if (entry := _end(trigger, one, view)) is not None]
    closed = {entry.id for entry in ended}
    still = tuple(one for one in state.open if one.firing.id not in closed)
    if trigger.kind == "arrival":
        released = {key for entry in ended for key in entry.keys}
        due = _due_files(trigger, state, still, released=released, now=now, view=view)
    elif trigger.kind == "after":
        due = _due_successes(trigger, state, still, now=now, view=view)
    else:
        due = _due_instants(trigger, state, still, now=now)
    entries = (*ended, *due.entries)
    entries += tuple(_next_submissions(still, entries))
    return Decision((*entries, *_forget(state, now=now, view=view)), due.reason)


def may_submit(state: State) -> tuple[Open, ...]:
    """Return firings that are being submitted and have no job yet."""
    return tuple(one for one in state.open if one.is_submitting and not one.job)


def _start(trigger: Trigger, state: State, *, now: datetime, view: View) -> Decision:
    # Successes from before the trigger was first watched do not fire it; existing files do.
    known = () if state.definition else tuple(one.key for one in view.successes)
    entry = Entry("started", definition=definition_digest(trigger), upto=to_text(now), keys=known)
    return Decision((entry,), "the trigger is watched from now on")


def _end(trigger: Trigger, one: Open, view: View) -> Entry | None:
    status = view.ended.get(one.job) if one.job else None
    if status is None:
        return None
    # Cancelled for a newer firing, which scores these files, unless the job was faster and scored them.
    is_released = one.is_cancelling and trigger.kind == "arrival" and status not in SUCCEEDED
    keys = tuple(file.key for file in one.firing.files) if is_released else ()
    return Entry("ended", id=one.firing.id, status=status, keys=keys)


@dataclass(frozen=True)
class _Occurrence:
    """An instant, or another job's success."""

    id: str
    time: datetime
    reason: str
    key: str = ""


def _due_instants(trigger: Trigger, state: State, still: Sequence[Open], *, now: datetime) -> Decision:
    upto = from_text(state.upto)
    found = instants(trigger, after=upto, until=now)
    due = [_Occurrence(firing_id(one), one, trigger.kind) for one in found if to_text(one) not in state.ahead]
    if not due:
        is_schedule = trigger.kind in ("cron", "every")
        return Decision((), f"no instant since {state.upto}" if is_schedule else "it fires by hand only")
    return _resolve(trigger, due, still, now=now, is_schedule=True)


def _due_successes(trigger: Trigger, state: State, still: Sequence[Open], *, now: datetime, view: View) -> Decision:
    due = [
        _Occurrence(one.key, one.time, f"{one.job} succeeded (manifest {one.manifest})", one.key)
        for one in view.successes
        if one.key not in state.seen
    ]
    if not due:
        return Decision((), f"no success of {trigger.after} that was not seen before")
    return _resolve(trigger, due, still, now=now, is_schedule=False)


def _resolve(
    trigger: Trigger, due: Sequence[_Occurrence], still: Sequence[Open], *, now: datetime, is_schedule: bool
) -> Decision:
    """Fire or skip the due occurrences, by ``missed``, then by ``overlap``."""
    chosen, missed = _choose(trigger, due, now=now)
    busy = tuple(one for one in still if not one.firing.max_parallel)
    overlapping: list[_Occurrence] = []
    if trigger.overlap != "queue" and len(chosen) > 1:
        # The occurrences would overlap each other: only the last occurrence fires.
        overlapping, chosen = chosen[:-1], chosen[-1:]
    if trigger.overlap == "forbid" and busy and chosen:
        overlapping, chosen = [*overlapping, *chosen], []
    cut = chosen[MOST_AT_ONCE:]
    chosen = chosen[:MOST_AT_ONCE]
    # Occurrences left for the next record are not dealt with yet.
    last = due[due.index(cut[0]) - 1] if cut else due[-1]
    upto = to_text(last.time) if is_schedule else ""
    dropped = [*_make_way(trigger, busy)] if chosen else []
    entries = [
        *_skip(missed, "missed", upto=upto),
        *_skip(overlapping, "overlap", upto=upto),
        *dropped,
        *(
            Entry(
                "fired", firing=Firing(one.id, trigger.kind, to_text(one.time), one.reason), upto=upto, keys=_keys(one)
            )
            for one in chosen
        ),
    ]
    words = [
        f"{len(those):,} {text}"
        for those, text in (
            (chosen, "due"),
            (missed, "missed"),
            (overlapping, f"skipped by overlap: {trigger.overlap}"),
        )
        if those
    ]
    return Decision(tuple(entries), ", ".join(words))


def _choose(
    trigger: Trigger, due: Sequence[_Occurrence], *, now: datetime
) -> tuple[list[_Occurrence], list[_Occurrence]]:
    """Return the occurrences that get a job, and the occurrences that are skipped as missed."""
    late = [one for one in due if (now - one.time).total_seconds() > trigger.grace_seconds]
    if not late or trigger.missed == "each":
        return list(due), []
    if trigger.missed == "skip":
        return list(due[len(late) :]), late
    return list(due[-1:]), list(due[:-1])


def _keys(one: _Occurrence) -> tuple[str, ...]:
    return (one.key,) if one.key else ()


def _skip(those: Sequence[_Occurrence], reason: str, *, upto: str) -> Iterator[Entry]:
    if those:
        yield Entry(
            "skipped",
            reason=reason,
            first=to_text(those[0].time),
            last=to_text(those[-1].time),
            count=len(those),
            upto=upto,
            keys=tuple(key for one in those for key in _keys(one)),
        )


def _make_way(trigger: Trigger, busy: Sequence[Open]) -> Iterator[Entry]:
    """Drop waiting firings and cancel running firings, for ``overlap: cancel``. Files of dropped firings fire again."""
    if trigger.overlap != "cancel":
        return
    for one in busy:
        if not one.is_submitting:
            keys = tuple(file.key for file in one.firing.files)
            yield Entry("dropped", id=one.firing.id, status="DROPPED", reason="a newer firing is due", keys=keys)
        elif not one.is_cancelling:
            yield Entry("cancelling", id=one.firing.id)


def _due_files(
    trigger: Trigger, state: State, still: Sequence[Open], *, released: set[str], now: datetime, view: View
) -> Decision:
    arrival = trigger.arrival
    assert arrival is not None
    due = decide_arrival(arrival, view.files, seen=state.seen.keys() - released, now=now)
    if not due.files:
        return Decision((), due.reason)
    busy = tuple(one for one in still if not one.firing.max_parallel)
    if busy and trigger.overlap == "forbid":
        return Decision((), f"{due.reason}; they wait for the end of {busy[0].job or busy[0].firing.id}")
    if busy and trigger.overlap == "cancel":
        # The files of the cancelled job join the new firing, once these files are known not to be scored.
        return Decision(tuple(_make_way(trigger, busy)), f"{due.reason}; the older job is cancelled first")
    files = tuple(SeenFile(one.path, one.size, one.version, one.key) for one in due.files)
    firing = Firing(fired_id(due.files), "arrival", to_text(now), due.reason, files)
    return Decision((Entry("fired", firing=firing, keys=tuple(one.key for one in files)),), due.reason)


def _next_submissions(still: Sequence[Open], entries: Sequence[Entry]) -> Iterator[Entry]:
    """Mark waiting firings to submit: the oldest if no other runs, and backfills up to ``max_parallel``."""
    dropped = {entry.id for entry in entries if entry.what == "dropped"}
    known = {one.firing.id for one in still}
    waiting = [one for one in still if one.firing.id not in dropped]
    new = (entry.firing for entry in entries if entry.what == "fired" and entry.firing is not None)
    waiting += [Open(firing) for firing in new if firing.id not in known]
    lane = [one for one in waiting if not one.firing.max_parallel]
    if lane and not any(one.is_submitting for one in lane):
        yield Entry("submitting", id=lane[0].firing.id)
    backfill = [one for one in waiting if one.firing.max_parallel]
    running = sum(one.is_submitting for one in backfill)
    for one in backfill:
        if not one.is_submitting and running < one.firing.max_parallel:
            running += 1
            yield Entry("submitting", id=one.firing.id)


def _forget(state: State, *, now: datetime, view: View) -> Iterator[Entry]:
    """Forget keys that fired long ago and are long gone. A single listing does not prove that a key is gone."""
    limit = to_text(now - FORGET_AFTER)
    if not state.seen or min(state.seen.values()) >= limit:
        return
    there = {one.key for one in view.files} | {one.key for one in view.successes}
    known = there | state.missing.keys()
    groups = {
        "missing": [key for key, when in state.seen.items() if when < limit and key not in known],
        "found": [key for key in state.missing if key in there],
        "forgotten": [key for key, when in state.missing.items() if when < limit and key not in there],
    }
    yield from (Entry(what, keys=tuple(sorted(keys))) for what, keys in groups.items() if keys)
