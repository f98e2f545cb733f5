"""Servers say that they are there: ``<root>/.servers/<name>.json``. Nothing but advice to people depends on it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from pipeline.errors import PipelineError
from pipeline.jobs.lease import is_process
from pipeline.storage.store import Store

FOLDER = ".servers"
BEAT_SECONDS = 10.0
"""Seconds between two signs of life."""
MISSED = 6
"""So many of them missed, a server on another machine is taken for gone."""


@dataclass(frozen=True)
class ServerRecord:
    """The content of ``.servers/<name>.json``."""

    name: str
    host: str
    pid: int
    process: str
    """Boot, name space and start time of the process."""
    started: str
    """UTC, ISO 8601."""
    beat: str
    """When it last gave a sign of life; UTC, ISO 8601."""
    jobs: int
    """Jobs it lets run at once."""
    running: int = 0
    """Jobs that were being driven when it looked last."""
    queued: int = 0
    """Jobs that waited then."""
    state: str = "serving"
    """``serving``, or ``stopped`` when it has left in good order."""

    def to_json(self) -> bytes:
        """As stored."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes) -> ServerRecord | None:
        """Inverse of `to_json`; None for what is damaged."""
        try:
            record = json.loads(data)
            record.pop("schema_version")
            return ServerRecord(**record)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def is_alive(self, *, now: datetime) -> bool:
        """Whether it is there, as far as can be told: on this machine by its process, else by its sign of life."""
        if self.state == "stopped":
            return False
        is_there = is_process(self.process, self.pid)
        if is_there is not None:
            return is_there
        try:
            return (now - datetime.fromisoformat(self.beat)).total_seconds() < MISSED * BEAT_SECONDS
        except (ValueError, TypeError):
            return False

    def details(self, *, now: datetime) -> dict[str, Any]:
        """As JSON output shows it."""
        return {
            **{key: value for key, value in asdict(self).items() if key != "process"},
            "alive": self.is_alive(now=now),
        }


def find_servers(root: Store) -> tuple[ServerRecord, ...]:
    """All that ever gave a sign of life there, and have not been cleaned away."""
    found = []
    for name in root.list(FOLDER):
        try:
            record = ServerRecord.from_json(root.read(f"{FOLDER}/{name}"))
        except FileNotFoundError:
            continue
        if record is not None:
            found.append(record)
    return tuple(sorted(found, key=lambda one: one.started))


def is_served(root: Store, *, now: datetime) -> bool:
    """Whether a server looks after the jobs below ``root``."""
    try:
        return any(one.is_alive(now=now) for one in find_servers(root))
    except PipelineError:
        return False


def put_server(root: Store, record: ServerRecord) -> None:
    """Give a sign of life."""
    root.replace(f"{FOLDER}/{record.name}.json", record.to_json())


def remove_server(root: Store, name: str) -> None:
    """Clean one away that is gone."""
    root.remove(f"{FOLDER}/{name}.json")
