"""The log of a trigger: numbered records, each put if absent, and snapshots of what they add up to.

::

    <root>/.triggers/<name>/log/00000042.json        what was decided or done, together, in one step
    <root>/.triggers/<name>/snapshots/00000040.json  the state after record 40; older records may be removed
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from pipeline.errors import StateCorrupt
from pipeline.service.triggers.state import Entry, State, apply, to_text
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import unique_name

FOLDER = ".triggers"
SCHEMA_VERSION = 1
SNAPSHOT_EVERY = 50
"""Records between two snapshots."""
_TRIES = 5
_WIDTH = 8


def open_log(root: str | os.PathLike[str], name: str, *, fsync: bool = True) -> Log:
    """The log of the trigger ``name`` under a root of job directories."""
    return Log(open_store(f"{os.fspath(root).rstrip('/')}/{FOLDER}/{name}", private=True, fsync=fsync))


def logged_triggers(root: str | os.PathLike[str]) -> list[str]:
    """Names of the triggers that have a log under ``root``."""
    return open_store(f"{os.fspath(root).rstrip('/')}/{FOLDER}", private=True).list_folders()


class Log:
    """What is known of one trigger. Several processes may each have one for the same trigger."""

    def __init__(self, store: Store, *, snapshot_every: int = SNAPSHOT_EVERY) -> None:
        self.store = store
        self._every = snapshot_every
        self._state = State()
        self._base = 0

    def read(self) -> State:
        """The state after the last record.

        :raises StateCorrupt: for a record that is damaged, or missing between others.
        """
        for _ in range(_TRIES):
            base = self._last_snapshot()
            try:
                if base > self._state.number or self._state.number == 0:
                    self._state = self._read_snapshot(base)
                self._base = base
                # Lower numbers are of no account: the snapshot holds them, or a writer who slept too long made them.
                numbers = [number for number in self._numbers("log") if number > self._state.number]
                if numbers == list(range(self._state.number + 1, self._state.number + 1 + len(numbers))):
                    for number in numbers:
                        self._take(number)
                    return self._state
            except FileNotFoundError:
                # Somebody made a snapshot in between, and removed what it holds.
                continue
        raise StateCorrupt(
            "records of a trigger's log are missing",
            where=self.store.url("log"),
            found=f"none with the number {self._state.number + 1}, and later ones",
            expected="numbers without a gap",
            next_step="restore them; or choose another name for the trigger, which then begins anew",
        )

    def append(self, entries: Sequence[Entry], *, after: State, now: datetime) -> bool:
        """Write the record that follows on ``after``; False when another one is there already, or may be.

        :raises StorageError: when it cannot be told; read again before anything is decided.
        """
        number = after.number + 1
        record = {
            "schema_version": SCHEMA_VERSION,
            "number": number,
            "time": to_text(now),
            "by": f"{socket.gethostname()}:{os.getpid()}",
            # Of two servers that decide the same, one has written it: a reply that was lost must not make it both.
            "name": unique_name(),
            "entries": [entry.to_record() for entry in entries],
        }
        if not self.store.put_if_absent(_name("log", number), json.dumps(record).encode() + b"\n"):
            return False
        if self._last_snapshot() >= number:
            # Either others have gone on from this record, or it took the place of one that was removed long ago.
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
            entries = [Entry.from_record(one) for one in record["entries"]]
            self._state = apply(self._state, entries, number=number, time=record["time"])
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise StateCorrupt(
                "a record of a trigger's log is damaged",
                where=self.store.url(_name("log", number)),
                found=f"{type(error).__name__}: {error}",
                expected="the JSON that a server wrote",
                next_step="restore the file; or choose another name for the trigger, which then begins anew",
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
                next_step="restore the file; or choose another name for the trigger, which then begins anew",
            ) from error
        return replace(State.from_record(record), number=number)

    def _compact(self) -> None:
        """Write a snapshot, and remove what the one before it holds: a reader may be at work between the two."""
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
