"""The log of a trigger: numbered records, each created if absent, and snapshots of the resulting state.

::

    <root>/.triggers/<name>/log/00000042.json        decisions and actions, recorded in one step
    <root>/.triggers/<name>/snapshots/00000040.json  the state after record 40; older records may be removed
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import StateCorrupt
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import unique_name

RECENT = 50
"""Number of ended firings that are shown."""
Times = Mapping[str, str]


def to_text(moment: datetime) -> str:
    """Return a time as the log holds it: UTC, ISO 8601, to the microsecond, so that texts sort as times do."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def from_text(text: str) -> datetime:
    """Inverse of `to_text`."""
    return datetime.fromisoformat(text)


@dataclass(frozen=True, slots=True)
class SeenFile:
    """A file, in its state when the file fired the trigger."""

    path: str
    size: int
    version: str
    key: str
    """See `pipeline.service.triggers.arrivals.ArrivedFile.key`."""


@dataclass(frozen=True, slots=True)
class Firing:
    """One job that a trigger requests. A firing is recorded once, even if several servers find it due."""

    id: str
    """Id: the instant, the digest of the files, or the job before. Name of the trigger and id form the key of the
    submission."""
    kind: str
    """``cron``, ``every``, ``arrival``, ``after``, ``by hand`` or ``backfill``."""
    time: str
    """Value of ``${trigger.time}``: the scheduled instant, else the time at which the firing was found due."""
    reason: str = ""
    """Reason, as text."""
    files: tuple[SeenFile, ...] = ()
    """Files to score, for a trigger on files."""
    max_parallel: int = 0
    """Maximum number of concurrent jobs of a backfill. 0 for all other firings, which run one at a time."""


@dataclass(frozen=True)
class Entry:
    """One decision or action. The fields that count depend on ``what``."""

    what: str
    """Kind of the entry.

    - ``started``: the trigger is watched from here on.
    - ``fired``
    - ``skipped``: instants or successes that get no job.
    - ``submitting``: from here on, the firing can only be cancelled.
    - ``submitted``, ``cancelling``, ``ended``
    - ``dropped``: the firing was removed before its job was submitted.
    - ``missing``, ``found``: keys that no longer exist, or exist again.
    - ``forgotten``
    """
    id: str = ""
    """Id of a firing."""
    firing: Firing | None = None
    job: str = ""
    status: str = ""
    """Final status of the job; ``REFUSED`` if the job was never created."""
    reason: str = ""
    definition: str = ""
    """Digest of the trigger's definition."""
    trigger: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the definition."""
    upto: str = ""
    """Last instant that is dealt with, like all before it."""
    first: str = ""
    """First skipped instant; ``upto`` or ``last`` is the last."""
    last: str = ""
    count: int = 0
    keys: tuple[str, ...] = ()
    """Keys of files, or of successes of other jobs."""

    def to_record(self) -> dict[str, Any]:
        """The entry as JSON holds it; empty fields are left out."""
        record = {name: value for name, value in asdict(self).items() if value not in ("", 0, (), None, {})}
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
    """A firing whose job has ended, to be shown."""

    id: str
    kind: str
    time: str
    job: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class State:
    """The state after all records up to ``number``."""

    number: int = 0
    definition: str = ""
    """Empty before the trigger was watched for the first time."""
    trigger: Mapping[str, Any] = field(default_factory=dict)
    """Fields of that definition: after a change, instants that are due by them fire first."""
    previous: str = ""
    """Definition before the last change."""
    changed: str = ""
    """Time of the last change; empty if there was none."""
    since: str = ""
    upto: str = ""
    """Last instant that is dealt with, like all before it."""
    seen: Times = field(default_factory=dict)
    """Key of a file, or of another job's success -> time when the key fired or was skipped."""
    missing: Times = field(default_factory=dict)
    """Seen key whose file or job no longer exists -> time since when."""
    ahead: frozenset[str] = frozenset()
    """Times of firings for instants after ``upto``, which a backfill asked for."""
    open: tuple[Open, ...] = ()
    """Open firings, oldest first."""
    recent: tuple[Past, ...] = ()
    """Recently ended firings, oldest first."""
    skipped: int = 0
    """Total number of instants and successes that got no job."""
    fired: int = 0
    """Total number of firings."""

    def find(self, firing: str) -> Open | None:
        """Return the open firing with that id; None if there is none."""
        return next((open_firing for open_firing in self.open if open_firing.firing.id == firing), None)

    @property
    def lane(self) -> tuple[Open, ...]:
        """Open firings that run one at a time: all except firings of a backfill."""
        return tuple(open_firing for open_firing in self.open if not open_firing.firing.max_parallel)

    def to_record(self) -> dict[str, Any]:
        """The state as JSON holds it."""
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
                    "open": tuple(Open(**{**item, "firing": _firing(item["firing"])}) for item in record["open"]),
                    "recent": tuple(Past(**item) for item in record["recent"]),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise StateCorrupt(
                "the state of a trigger is damaged",
                found=f"{type(error).__name__}: {error}",
                expected="a snapshot of the trigger's log",
                next_step="remove the file: the records of the log are read instead, if they still exist",
            ) from error


def apply(state: State, entries: Iterable[Entry], *, number: int, time: str) -> State:
    """Return ``state`` after one more record of the log, written at ``time``."""
    for entry in entries:
        state = _CHANGES[entry.what](state, entry, time)
    return replace(state, number=number)


def _started(state: State, entry: Entry, time: str) -> State:
    # A changed schedule counts from the change on; earlier firings stay as they are.
    seen = {**state.seen, **dict.fromkeys(entry.keys, time)}
    return replace(
        state,
        definition=entry.definition,
        trigger=entry.trigger,
        previous=state.definition,
        changed=time if state.definition else "",
        since=state.since or time,
        upto=max(entry.upto, state.upto),
        seen=seen,
    )


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
    """Advance ``upto``, and forget the backfilled instants up to ``upto``."""
    if entry.upto <= state.upto:
        return state
    return replace(state, upto=entry.upto, ahead=frozenset(instant for instant in state.ahead if instant > entry.upto))


def _submitting(state: State, entry: Entry, time: str) -> State:
    return _change(state, entry.id, is_submitting=True)


def _submitted(state: State, entry: Entry, time: str) -> State:
    return _change(state, entry.id, job=entry.job)


def _cancelling(state: State, entry: Entry, time: str) -> State:
    return _change(state, entry.id, is_cancelling=True)


def _ended(state: State, entry: Entry, time: str) -> State:
    open_firing = state.find(entry.id)
    if open_firing is None:
        return state
    past = Past(
        open_firing.firing.id,
        open_firing.firing.kind,
        open_firing.firing.time,
        open_firing.job or entry.job,
        entry.status,
        entry.reason,
    )
    # Files of a firing that was cancelled for a newer one were not scored: they may fire again.
    return replace(
        state,
        open=tuple(other for other in state.open if other is not open_firing),
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
    return replace(
        state,
        open=tuple(
            replace(open_firing, **changes) if open_firing.firing.id == firing else open_firing
            for open_firing in state.open
        ),
    )


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


FOLDER = ".triggers"
SCHEMA_VERSION = 1
SNAPSHOT_EVERY = 50
"""Records between two snapshots."""
_TRIES = 5
_WIDTH = 8


def open_log(root: str | os.PathLike[str], name: str, *, fsync: bool = True) -> Log:
    """Open the log of the trigger ``name`` under a root of job directories."""
    return Log(open_store(f"{os.fspath(root).rstrip('/')}/{FOLDER}/{name}", private=True, fsync=fsync))


def logged_triggers(root: str | os.PathLike[str]) -> list[str]:
    """Return the names of the triggers that have a log under ``root``."""
    return open_store(f"{os.fspath(root).rstrip('/')}/{FOLDER}", private=True).list_folders()


class Log:
    """The log of one trigger. Several processes may each open the log of the same trigger."""

    def __init__(self, store: Store, *, snapshot_every: int = SNAPSHOT_EVERY) -> None:
        self.store = store
        self._every = snapshot_every
        self._state = State()
        self._base = 0

    def read(self) -> State:
        """Return the state after the last record.

        :raises StateCorrupt: for a record that is damaged, or missing between others.
        """
        for _ in range(_TRIES):
            base = self._last_snapshot()
            try:
                if base > self._state.number or self._state.number == 0:
                    self._state = self._read_snapshot(base)
                self._base = base
                # Ignore lower numbers: the snapshot includes them, or a delayed writer made them.
                numbers = [number for number in self._numbers("log") if number > self._state.number]
                if numbers == list(range(self._state.number + 1, self._state.number + 1 + len(numbers))):
                    for number in numbers:
                        self._take(number)
                    return self._state
            except FileNotFoundError:
                # Another process made a snapshot in between, and removed its records.
                continue
        raise StateCorrupt(
            "records of a trigger's log are missing",
            where=self.store.url("log"),
            found=f"none with the number {self._state.number + 1}, and later ones",
            expected="numbers without a gap",
            next_step="restore them; or choose another name for the trigger, which then starts afresh",
        )

    def append(self, entries: Sequence[Entry], *, after: State, now: datetime) -> bool:
        """Write the record after the state ``after``. Return False if another record has, or may have, its number.

        :raises StorageError: when it is unknown whether the record was written; read again before deciding.
        """
        number = after.number + 1
        record = {
            "schema_version": SCHEMA_VERSION,
            "number": number,
            "time": to_text(now),
            "by": f"{socket.gethostname()}:{os.getpid()}",
            # Makes equal decisions of two servers differ: after a lost reply, only one of them may claim the record.
            "name": unique_name(),
            "entries": [entry.to_record() for entry in entries],
        }
        if not self.store.put_if_absent(_name("log", number), json.dumps(record).encode() + b"\n"):
            return False
        if self._last_snapshot() >= number:
            # Either others continued from this record, or its number is that of a record that was removed long ago.
            return False
        self._state = apply(after, entries, number=number, time=to_text(now))
        if number - self._base >= self._every:
            self._compact()
        return True

    def _take(self, number: int) -> None:
        data = self.store.read(_name("log", number))
        try:
            record = json.loads(data)
            if record["schema_version"] != SCHEMA_VERSION or record["number"] != number:
                raise ValueError("unknown schema_version, or the number of another record")
            entries = [Entry.from_record(item) for item in record["entries"]]
            self._state = apply(self._state, entries, number=number, time=record["time"])
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise StateCorrupt(
                "a record of a trigger's log is damaged",
                where=self.store.url(_name("log", number)),
                found=f"{type(error).__name__}: {error}",
                expected="the JSON that a server wrote",
                next_step="restore the file; or choose another name for the trigger, which then starts afresh",
            ) from error

    def _read_snapshot(self, number: int) -> State:
        if number == 0:
            return State()
        data = self.store.read(_name("snapshots", number))
        try:
            record = json.loads(data)
            if record.pop("schema_version") != SCHEMA_VERSION:
                raise ValueError("unknown schema_version")
        except (ValueError, KeyError, AttributeError) as error:
            raise StateCorrupt(
                "a snapshot of a trigger's log is damaged",
                where=self.store.url(_name("snapshots", number)),
                found=f"{type(error).__name__}: {error}",
                expected="the JSON that a server wrote",
                next_step="restore the file; or choose another name for the trigger, which then starts afresh",
            ) from error
        return replace(State.from_record(record), number=number)

    def _compact(self) -> None:
        """Write a snapshot. Remove records up to the previous snapshot: a reader may still need the later records."""
        before, state = self._base, self._state
        record = {"schema_version": SCHEMA_VERSION, **state.to_record()}
        self.store.put_if_absent(_name("snapshots", state.number), json.dumps(record).encode() + b"\n")
        self._base = state.number
        for folder in ("log", "snapshots"):
            for number in self._numbers(folder):
                if number < before or (folder == "log" and number == before):
                    self.store.remove(_name(folder, number))

    def _last_snapshot(self) -> int:
        return max(self._numbers("snapshots"), default=0)

    def _numbers(self, folder: str) -> list[int]:
        names = (name.removesuffix(".json") for name in self.store.list(folder) if name.endswith(".json"))
        return sorted(int(name) for name in names if name.isdigit())


def _name(folder: str, number: int) -> str:
    return f"{folder}/{number:0{_WIDTH}d}.json"
