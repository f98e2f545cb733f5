"""`EventLog`: the events of a job, one line each.

::

    events.jsonl           on a file system: all events
    events/<epoch>.jsonl   on an object store: the events of one driver; epoch 0 for those from before the first lease

An object store cannot append: a line is added by replacing the object. Each object therefore has one writer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pipeline.common.secrets import redact_values
from pipeline.common.units import Clock, iso_time, utc_now
from pipeline.jobs import layout
from pipeline.jobs.lease import Lease
from pipeline.jobs.status import Status
from pipeline.storage.store import Store


class EventLog:
    """The events of a job, oldest first."""

    def __init__(self, store: Store, *, now: Clock = utc_now) -> None:
        self._store = store
        self._now = now
        self._lease: Lease | None = None

    def acquired(self, lease: Lease) -> None:
        """Write all further events under ``lease``."""
        self._lease = lease

    def check_lease(self) -> None:
        """Check that the lease, if there is one, still holds the job.

        :raises Fenced: when another driver has taken over the job.
        """
        if self._lease is not None:
            self._lease.check()

    def append(self, event: str, **fields: Any) -> None:
        """Append one event, with its time and epoch and without secrets.

        :raises Fenced: when another driver has taken over the job.
        """
        epoch = self._lease.epoch if self._lease else 0
        record = {"time": iso_time(self._now()), "event": event, **({"epoch": epoch} if epoch else {})}
        line = json.dumps(record | redact_values(fields), default=str)
        self.check_lease()
        self._store.append(layout.EVENTS_FILE if self._store.is_local else layout.events_path(epoch), line)

    def read(self) -> list[dict[str, Any]]:
        """Return all events. Lines that a crash cut short are left out."""
        if self._store.is_local:
            names = [layout.EVENTS_FILE]
        else:
            numbers = layout.numbers_of(self._store.list(layout.EVENTS), suffix=".jsonl")
            names = [layout.events_path(number) for number in numbers]
        return [event for name in names for event in self._read(name)]

    def _read(self, name: str) -> list[dict[str, Any]]:
        try:
            text = self._store.read(name).decode(errors="replace")
        except FileNotFoundError:
            return []
        return [event for line in text.split("\n") if (event := parse_event(line)) is not None]


def parse_event(line: str) -> dict[str, Any] | None:
    """Parse one line of events. Return None for a line that a crash cut short."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def last_status(events: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the last status event that counts; None without one. Pure.

    An event of a driver that had lost the job, written after an event of a higher epoch, does not count.
    """
    last, highest = None, 0
    for event in events:
        number = event.get("epoch", 0)
        epoch = number if isinstance(number, int) else 0
        if 0 < epoch < highest:
            continue
        highest = max(highest, epoch)
        if event["event"] == "status" and event.get("after") in Status.__members__:
            last = event
    return last
