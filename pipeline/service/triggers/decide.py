"""Decide what a trigger does now: a pure function of its definition, its state, the clock and a view of the world."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from pipeline.common.digest import digest_json
from pipeline.service.triggers.arrivals import ArrivedFile, decide_arrival, fired_id
from pipeline.service.triggers.log import Entry, Firing, Open, SeenFile, State, apply, from_text, to_text
from pipeline.service.triggers.schedule import InstantRange, firing_id
from pipeline.spec.triggers import Trigger

SUCCEEDED = ("SUCCEEDED", "SUCCEEDED_WITH_WARNINGS")
GONE = "GONE"
"""End of a job whose directory was removed."""
COMMITTED = "COMMITTED"
"""End of a job without success that has committed output: a resume publishes it. Its files never fire again."""
REFUSED = "REFUSED"
"""End of a firing whose job was never created, because its spec, model or input is invalid."""
MOST_AT_ONCE = 500
"""Maximum number of firings in one record of the log. Further firings follow in the next record."""
MOST_OPEN = 5_000
"""Maximum number of open firings of a schedule. Further instants fire, or are missed, when firings have ended."""
NOT_OF_DEFINITION = {"name", "job", "params"}
"""Fields of a trigger that do not decide when it fires."""
FLIP = timedelta(hours=1)
"""Time within which a definition that changes back is a sign of two servers with different definitions."""
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
    warning: str = ""
    """Message for a person; empty in general."""


def definition_digest(trigger: Trigger) -> str:
    """Return the SHA-256 of the fields that decide when the trigger fires: all but name, job and parameters."""
    return digest_json(definition_of(trigger))


def definition_of(trigger: Trigger) -> dict[str, Any]:
    """Return the fields that decide when the trigger fires."""
    return trigger.model_dump(mode="json", exclude=NOT_OF_DEFINITION)


def decide_trigger(trigger: Trigger, state: State, *, now: datetime, view: View) -> Decision:
    """Decide the entries to add to the log now; none if nothing is due.

    Open firings come first: a job that ended makes room for waiting firings. Then due occurrences are fired or skipped
    by ``missed`` and ``overlap``, and firings that may run are marked as being submitted.
    """
    if state.definition != definition_digest(trigger):
        return _start(trigger, state, now=now, view=view)
    ended = [entry for open_firing in state.open if (entry := _end(trigger, open_firing, view)) is not None]
    closed = {entry.id for entry in ended}
    still = tuple(open_firing for open_firing in state.open if open_firing.firing.id not in closed)
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
    return tuple(open_firing for open_firing in state.open if open_firing.is_submitting and not open_firing.job)


def _start(trigger: Trigger, state: State, *, now: datetime, view: View) -> Decision:
    """Start to watch a new or changed definition, after the instants that are due by the definition before."""
    # Successes from before the trigger was first watched do not fire it; existing files do.
    known = () if state.definition else tuple(success.key for success in view.successes)
    digest = definition_digest(trigger)
    before = _due_before(state, now=now)
    if not before.is_complete:
        # One record does not hold them all: the change follows in a later record.
        return Decision(before.entries, before.reason)
    started = Entry("started", definition=digest, trigger=definition_of(trigger), upto=to_text(now), keys=known)
    warning = ""
    if state.previous == digest and now - from_text(state.changed) < FLIP:
        warning = "its definition changed back: do two servers read different versions of it?"
    return Decision((*before.entries, started), before.reason or "the trigger is watched from now on", warning)


@dataclass(frozen=True)
class _DueBefore:
    """Entries for the instants that are due by the definition before a change."""

    entries: tuple[Entry, ...] = ()
    reason: str = ""
    is_complete: bool = True
    """False if further instants are due."""


def _due_before(state: State, *, now: datetime) -> _DueBefore:
    try:
        before = Trigger.model_validate(state.trigger)
    except ValueError:
        # A definition of another version of this package.
        return _DueBefore()
    if before.kind not in ("cron", "every"):
        return _DueBefore()
    decision = _due_instants(before, state, state.open, now=now)
    after = apply(state, decision.entries, number=state.number + 1, time=to_text(now))
    excluded = frozenset(from_text(moment) for moment in after.ahead)
    rest = _skipped(InstantRange(before, from_text(after.upto), now, excluded))
    if decision.entries:
        return _DueBefore(decision.entries, f"{decision.reason}, by the definition before", is_complete=rest is None)
    # Instants without room for their firings would never get it: the definition is gone.
    return _DueBefore((_skip(rest, "changed", upto=to_text(rest.last)),) if rest is not None else ())


def _end(trigger: Trigger, open_firing: Open, view: View) -> Entry | None:
    status = view.ended.get(open_firing.job) if open_firing.job else None
    if status is None:
        return None
    # Cancelled for a newer firing, which scores these files, unless the job was faster and scored them.
    is_released = open_firing.is_cancelling and trigger.kind == "arrival" and status not in (*SUCCEEDED, COMMITTED)
    keys = tuple(file.key for file in open_firing.firing.files) if is_released else ()
    return Entry("ended", id=open_firing.firing.id, status=status, keys=keys)


@dataclass(frozen=True)
class _Occurrence:
    """An instant, or another job's success."""

    id: str
    time: datetime
    reason: str
    key: str = ""


@dataclass(frozen=True)
class _Skipped:
    """Occurrences that get no job."""

    first: datetime
    last: datetime
    count: int
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Fates:
    """Fates of the occurrences that are dealt with now."""

    fired: Sequence[_Occurrence] = ()
    missed: _Skipped | None = None
    overlapping: _Skipped | None = None


def _due_instants(trigger: Trigger, state: State, still: Sequence[Open], *, now: datetime) -> Decision:
    excluded = frozenset(from_text(moment) for moment in state.ahead)
    due = InstantRange(trigger, from_text(state.upto), now, excluded)
    if due.first() is None:
        is_schedule = trigger.kind in ("cron", "every")
        return Decision((), f"no instant since {state.upto}" if is_schedule else "it fires by hand only")
    fates = _fates_of_instants(trigger, due, still)
    return _record(trigger, fates, still, upto=_last_time(fates))


def _fates_of_instants(trigger: Trigger, due: InstantRange, still: Sequence[Open]) -> _Fates:
    """Decide by ``missed``, then by ``overlap``. Nothing is listed but the instants that fire."""
    chosen, missed = due, None
    late_until = due.until - timedelta(seconds=trigger.grace_seconds) - timedelta(microseconds=1)
    late = replace(due, until=late_until) if late_until > due.after else None
    if trigger.missed != "each" and late is not None and late.first() is not None:
        after = late_until if trigger.missed == "skip" else (due.last() or due.until) - timedelta(microseconds=1)
        chosen, missed = replace(due, after=after), replace(due, until=after)
    if trigger.overlap == "queue":
        waiting = sum(not open_firing.firing.max_parallel for open_firing in still)
        fired = chosen.head(min(MOST_AT_ONCE, max(0, MOST_OPEN - waiting)))
        if not fired and trigger.missed == "once":
            missed = None  # The last instant stands for the missed ones: they wait for room together.
        return _Fates(_instants(trigger, fired), _skipped(missed))
    last = chosen.last()
    if last is None or (trigger.overlap == "forbid" and _is_busy(still)):
        return _Fates((), _skipped(missed), _skipped(chosen))
    earlier = replace(chosen, until=last - timedelta(microseconds=1))
    return _Fates(_instants(trigger, [last]), _skipped(missed), _skipped(earlier))


def _instants(trigger: Trigger, times: Sequence[datetime]) -> list[_Occurrence]:
    return [_Occurrence(firing_id(moment), moment, trigger.kind) for moment in times]


def _skipped(those: InstantRange | None) -> _Skipped | None:
    first, last = (those.first(), those.last()) if those is not None else (None, None)
    if those is None or first is None or last is None:
        return None
    return _Skipped(first, last, those.count())


def _last_time(fates: _Fates) -> str:
    times = [occurrence.time for occurrence in fates.fired]
    times += [group.last for group in (fates.missed, fates.overlapping) if group is not None]
    return to_text(max(times)) if times else ""


def _is_busy(still: Sequence[Open]) -> bool:
    return any(not open_firing.firing.max_parallel for open_firing in still)


def _due_successes(trigger: Trigger, state: State, still: Sequence[Open], *, now: datetime, view: View) -> Decision:
    due = [
        _Occurrence(success.key, success.time, f"{success.job} succeeded (manifest {success.manifest})", success.key)
        for success in view.successes
        if success.key not in state.seen
    ]
    if not due:
        return Decision((), f"no success of {trigger.after} that was not seen before")
    chosen, missed = _choose(trigger, due, now=now)
    overlapping: list[_Occurrence] = []
    if trigger.overlap != "queue" and len(chosen) > 1:
        # The occurrences would overlap each other: only the last occurrence fires.
        overlapping, chosen = chosen[:-1], chosen[-1:]
    if trigger.overlap == "forbid" and _is_busy(still) and chosen:
        overlapping, chosen = [*overlapping, *chosen], []
    fates = _Fates(chosen[:MOST_AT_ONCE], _group(missed), _group(overlapping))
    return _record(trigger, fates, still, upto="")


def _choose(
    trigger: Trigger, due: Sequence[_Occurrence], *, now: datetime
) -> tuple[list[_Occurrence], list[_Occurrence]]:
    """Return the occurrences that get a job, and the occurrences that are skipped as missed."""
    late = [occurrence for occurrence in due if (now - occurrence.time).total_seconds() > trigger.grace_seconds]
    if not late or trigger.missed == "each":
        return list(due), []
    if trigger.missed == "skip":
        return list(due[len(late) :]), late
    return list(due[-1:]), list(due[:-1])


def _group(those: Sequence[_Occurrence]) -> _Skipped | None:
    if not those:
        return None
    return _Skipped(those[0].time, those[-1].time, len(those), tuple(occurrence.key for occurrence in those))


def _record(trigger: Trigger, fates: _Fates, still: Sequence[Open], *, upto: str) -> Decision:
    """Return the entries for ``fates``.

    :param upto: last instant that is dealt with; empty for successes.
    """
    busy = tuple(open_firing for open_firing in still if not open_firing.firing.max_parallel)
    skipped = {"missed": fates.missed, "overlap": fates.overlapping}
    entries = [_skip(group, reason, upto=upto) for reason, group in skipped.items() if group is not None]
    entries += [*_make_way(trigger, busy)] if fates.fired else []
    for occurrence in fates.fired:
        firing = Firing(occurrence.id, trigger.kind, to_text(occurrence.time), occurrence.reason)
        entries.append(Entry("fired", firing=firing, upto=upto, keys=(occurrence.key,) if occurrence.key else ()))
    words = [f"{len(fates.fired):,} due"] if fates.fired else []
    words += [f"{fates.missed.count:,} missed"] if fates.missed else []
    words += [f"{fates.overlapping.count:,} skipped by overlap: {trigger.overlap}"] if fates.overlapping else []
    return Decision(tuple(entries), ", ".join(words) or f"{len(still):,} firings wait for their job")


def _skip(those: _Skipped, reason: str, *, upto: str) -> Entry:
    return Entry(
        "skipped",
        reason=reason,
        first=to_text(those.first),
        last=to_text(those.last),
        count=those.count,
        upto=upto,
        keys=those.keys,
    )


def _make_way(trigger: Trigger, busy: Sequence[Open]) -> Iterator[Entry]:
    """Drop waiting firings and cancel running firings, for ``overlap: cancel``. Files of dropped firings fire again."""
    if trigger.overlap != "cancel":
        return
    for open_firing in busy:
        if not open_firing.is_submitting:
            keys = tuple(file.key for file in open_firing.firing.files)
            yield Entry(
                "dropped", id=open_firing.firing.id, status="DROPPED", reason="a newer firing is due", keys=keys
            )
        elif not open_firing.is_cancelling:
            yield Entry("cancelling", id=open_firing.firing.id)


def _due_files(
    trigger: Trigger, state: State, still: Sequence[Open], *, released: set[str], now: datetime, view: View
) -> Decision:
    arrival = trigger.arrival
    assert arrival is not None
    due = decide_arrival(arrival, view.files, seen=state.seen.keys() - released, now=now)
    if not due.files:
        return Decision((), due.reason)
    busy = tuple(open_firing for open_firing in still if not open_firing.firing.max_parallel)
    if busy and trigger.overlap == "forbid":
        return Decision((), f"{due.reason}; they wait for the end of {busy[0].job or busy[0].firing.id}")
    if busy and trigger.overlap == "cancel":
        # The files of the cancelled job join the new firing, once these files are known not to be scored.
        return Decision(tuple(_make_way(trigger, busy)), f"{due.reason}; the older job is cancelled first")
    files = tuple(SeenFile(file.path, file.size, file.version, file.key) for file in due.files)
    firing = Firing(fired_id(due.files), "arrival", to_text(now), due.reason, files)
    return Decision((Entry("fired", firing=firing, keys=tuple(file.key for file in files)),), due.reason)


def _next_submissions(still: Sequence[Open], entries: Sequence[Entry]) -> Iterator[Entry]:
    """Mark waiting firings to submit: the oldest if no other runs, and backfills up to ``max_parallel``."""
    dropped = {entry.id for entry in entries if entry.what == "dropped"}
    known = {open_firing.firing.id for open_firing in still}
    waiting = [open_firing for open_firing in still if open_firing.firing.id not in dropped]
    new = (entry.firing for entry in entries if entry.what == "fired" and entry.firing is not None)
    waiting += [Open(firing) for firing in new if firing.id not in known]
    lane = [open_firing for open_firing in waiting if not open_firing.firing.max_parallel]
    if lane and not any(open_firing.is_submitting for open_firing in lane):
        yield Entry("submitting", id=lane[0].firing.id)
    backfill = [open_firing for open_firing in waiting if open_firing.firing.max_parallel]
    running = sum(open_firing.is_submitting for open_firing in backfill)
    for open_firing in backfill:
        if not open_firing.is_submitting and running < open_firing.firing.max_parallel:
            running += 1
            yield Entry("submitting", id=open_firing.firing.id)


def _forget(state: State, *, now: datetime, view: View) -> Iterator[Entry]:
    """Forget keys that fired long ago and are long gone. A single listing does not prove that a key is gone."""
    limit = to_text(now - FORGET_AFTER)
    if not state.seen or min(state.seen.values()) >= limit:
        return
    current = {entry.key for entry in view.files} | {entry.key for entry in view.successes}
    known = current | state.missing.keys()
    groups = {
        "missing": [key for key, when in state.seen.items() if when < limit and key not in known],
        "found": [key for key in state.missing if key in current],
        "forgotten": [key for key, when in state.missing.items() if when < limit and key not in current],
    }
    yield from (Entry(what, keys=tuple(sorted(keys))) for what, keys in groups.items() if keys)
