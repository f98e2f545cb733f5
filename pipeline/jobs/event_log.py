"""`EventLog`: the events of a job, one line each in ``events.jsonl``."""

from __future__ import annotations

import json
from typing import Any

from pipeline.common.secrets import redact_values
from pipeline.common.units import Clock, iso_time, utc_now
from pipeline.jobs import layout
from pipeline.storage.store import Store


class EventLog:
    """The events of a job, oldest first. Any process may append."""

    def __init__(self, store: Store, *, now: Clock = utc_now) -> None:
        self._store = store
        self._now = now

    def append(self, event: str, **fields: Any) -> None:
        """Append one event, with the time and without secrets."""
        record = {"time": iso_time(self._now()), "event": event, **redact_values(fields)}
        self._store.append(layout.EVENTS_FILE, json.dumps(record, default=str))

    def read(self) -> list[dict[str, Any]]:
        """Return all events. Lines that a crash cut short are left out."""
        try:
            text = self._store.read(layout.EVENTS_FILE).decode(errors="replace")
        except FileNotFoundError:
            return []
        return [event for line in text.split("\n") if (event := parse_event(line)) is not None]


def parse_event(line: str) -> dict[str, Any] | None:
    """Parse one line of ``events.jsonl``. Return None for a line that a crash cut short."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
