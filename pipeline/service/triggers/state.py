"""What a trigger's log says: its entries, and the state they add up to. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import StateCorrupt

RECENT = 50
"""Firings that have ended and are still shown."""
Times = Mapping[str, str]


def to_text(moment: datetime) -> str:
    """A time as the log holds it: UTC, ISO 8601, to the microsecond, so that texts sort as times do."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def from_text(text: str) -> datetime:
    """Inverse of `to_text`."""
    return datetime.fromisoformat(text)


@dataclass(frozen=True, slots=True)
class SeenFile:
    """A file as it was when it fired."""

    path: str
    size: int
    version: str
    key: str
    """See `pipeline.service.triggers.arrivals.ArrivedFile.key`."""


@dataclass(frozen=True, slots=True)
class Firing:
    """One job that a trigger asks for. The same firing is asked for once, whoever finds it due."""

    id: str
    """The instant; the digest of the files; the job it comes after. With the trigger's name before it, it is the key
    that the job is submitted under."""
    kind: str
    """``cron``, ``every``, ``arrival``, ``after``, ``by hand`` or ``backfill``."""
    time: str
    """What ``${trigger.time}`` is: the instant it was scheduled for, else when it was found due."""
    reason: str = ""
    """In words."""
    files: tuple[SeenFile, ...] = ()
    """What the job scores, where files fired it."""
    max_parallel: int = 0
    """How many of a backfill may run at once; 0 for all others, which run one after the other."""


@dataclass(frozen=True)
class Entry:
    """One thing that was decided or done. Which fields count depends on ``what``."""

    what: str
    """``started`` (the trigger is watched from here on), ``fired``, ``skipped`` (instants or successes that don't get a
    job), ``submitting`` (from here on it can only be cancelled), ``submitted``, ``cancelling``, ``ended``, ``dropped``
    (before it was submitted), ``missing`` and ``found`` (keys that are not there any more, or are again),
    ``forgotten``."""
    id: str = ""
    """Of a firing."""
    firing: Firing | None = None
    job: str = ""
    status: str = ""
    """How the job ended; ``REFUSED`` when there never was one."""
    reason: str = ""
    definition: str = ""
    """Digest of the trigger's definition."""
    upto: str = ""
    """Instants up to this one are dealt with."""
    first: str = ""
    """First instant that was skipped; ``upto`` or ``last`` is the last."""
    last: str = ""
    count: int = 0
    keys: tuple[str, ...] = ()
    """Of files, or of successes of other jobs."""

    def to_record(self) -> dict[str, Any]:
        """As JSON holds it: fields that say nothing are left out."""
        record = {name: value for name, value in asdict(self).items() if value not in ("", 0, (), None)}
        if self.firing is not None:
            record["firing"] = {name: value for name, value in asdict(self.firing).items() if value not in ("", 0, ())}
        return record

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Entry:
        """Inverse of `to_record`."""
        known = dict(record)
        if "firing" in known:
            known["firing"] = _firing(known["firing"])
        known["keys"] = tuple(known.get("keys", ()))
        return Entry(**known)


def _firing(record: Mapping[str, Any]) -> Firing:
    files = tuple(SeenFile(**file) for file in record.get("files", ()))
    return Firing(**{**record, "files": files})


@dataclass(frozen=True)
class Open:
    """A firing whose job has not ended."""

    firing: Firing
    is_submitting: bool = False
    job: str = ""
    is_cancelling: bool = False


@dataclass(frozen=True)
class Past:
    """A firing whose job has ended, for people."""

    id: str
    kind: str
    time: str
    job: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class State:
    """What all records up to ``number`` add up to."""

    number: int = 0
    definition: str = ""
    """Empty before the trigger was watched for the first time."""
    since: str = ""
    upto: str = ""
    """Instants up to this one are dealt with."""
    seen: Times = field(default_factory=dict)
    """Key of a file, or of another job's success -> when it fired or was passed over."""
    missing: Times = field(default_factory=dict)
    """Key of one of these that is not there any more -> since when."""
    ahead: frozenset[str] = frozenset()
    """Times of firings for instants after ``upto``, which a backfill asked for."""
    open: tuple[Open, ...] = ()
    """Oldest first."""
    recent: tuple[Past, ...] = ()
    """Oldest first."""
    skipped: int = 0
    """Instants and successes that got no job, in all."""
    fired: int = 0
    """Firings in all."""

    def find(self, firing: str) -> Open | None:
        """The firing with that id, while it is open."""
        return next((one for one in self.open if one.firing.id == firing), None)

    @property
    def lane(self) -> tuple[Open, ...]:
        """Open firings that run one after the other: all but those of a backfill."""
        return tuple(one for one in self.open if not one.firing.max_parallel)

    def to_record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "ahead": sorted(self.ahead)}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> State:
        """Inverse of `to_record`.

        :raises StateCorrupt: for anything else.
        """
        try:
            return State(
                **{
                    **record,
                    "ahead": frozenset(record["ahead"]),
                    "open": tuple(Open(**{**one, "firing": _firing(one["firing"])}) for one in record["open"]),
                    "recent": tuple(Past(**one) for one in record["recent"]),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise StateCorrupt(
                "the state of a trigger is damaged",
                found=f"{type(error).__name__}: {error}",
                expected="a snapshot of the trigger's log",
                next_step="remove the file: the records of the log are read instead, where they are still there",
            ) from error


def apply(state: State, entries: Iterable[Entry], *, number: int, time: str) -> State:
    """``state`` with one more record of the log, written at ``time``."""
    for entry in entries:
        state = _CHANGES[entry.what](state, entry, time)
    return replace(state, number=number)


def _started(state: State, entry: Entry, time: str) -> State:
    # A schedule that was changed counts from the change on; what fired already, and what runs, stays as it is.
    seen = {**state.seen, **dict.fromkeys(entry.keys, time)}
    return replace(state, definition=entry.definition, since=state.since or time, upto=entry.upto, seen=seen)


def _fired(state: State, entry: Entry, time: str) -> State:
    firing = entry.firing
    assert firing is not None
    seen = {**state.seen, **dict.fromkeys(entry.keys, time)} if entry.keys else state.seen
    state = _dealt(replace(state, seen=seen, fired=state.fired + 1), entry)
    ahead = state.ahead | {firing.time} if firing.kind == "backfill" and firing.time > state.upto else state.ahead
    if state.find(firing.id) is not None:
        return state
    return replace(state, open=(*state.open, Open(firing)), ahead=ahead)


def _skipped(state: State, entry: Entry, time: str) -> State:
    seen = {**state.seen, **dict.fromkeys(entry.keys, time)} if entry.keys else state.seen
    return _dealt(replace(state, seen=seen, skipped=state.skipped + entry.count), entry)


def _dealt(state: State, entry: Entry) -> State:
    """``upto`` moves on, and what a backfill did ahead of it need not be remembered any longer."""
    if entry.upto <= state.upto:
        return state
    return replace(state, upto=entry.upto, ahead=frozenset(one for one in state.ahead if one > entry.upto))


def _submitting(state: State, entry: Entry, time: str) -> State:
    return _change(state, entry.id, is_submitting=True)


def _submitted(state: State, entry: Entry, time: str) -> State:
    return _change(state, entry.id, job=entry.job)


def _cancelling(state: State, entry: Entry, time: str) -> State:
    return _change(state, entry.id, is_cancelling=True)


def _ended(state: State, entry: Entry, time: str) -> State:
    one = state.find(entry.id)
    if one is None:
        return state
    past = Past(one.firing.id, one.firing.kind, one.firing.time, one.job or entry.job, entry.status, entry.reason)
    # What was given up for a newer firing was not scored: these files are still to come.
    return replace(
        state,
        open=tuple(other for other in state.open if other is not one),
        recent=(*state.recent, past)[-RECENT:],
        seen=_without(state.seen, entry.keys) if entry.keys else state.seen,
        missing=_without(state.missing, entry.keys) if entry.keys else state.missing,
    )


def _missing(state: State, entry: Entry, time: str) -> State:
    return replace(state, missing={**state.missing, **dict.fromkeys(entry.keys, time)})


def _found(state: State, entry: Entry, time: str) -> State:
    return replace(state, missing=_without(state.missing, entry.keys))


def _forgotten(state: State, entry: Entry, time: str) -> State:
    return replace(state, seen=_without(state.seen, entry.keys), missing=_without(state.missing, entry.keys))


def _without(times: Times, keys: Iterable[str]) -> Times:
    gone = set(keys)
    return {key: when for key, when in times.items() if key not in gone}


def _change(state: State, firing: str, **changes: Any) -> State:
    return replace(state, open=tuple(replace(one, **changes) if one.firing.id == firing else one for one in state.open))


_CHANGES = {
    "started": _started,
    "fired": _fired,
    "skipped": _skipped,
    "submitting": _submitting,
    "submitted": _submitted,
    "cancelling": _cancelling,
    "ended": _ended,
    "dropped": _ended,
    "missing": _missing,
    "found": _found,
    "forgotten": _forgotten,
}
