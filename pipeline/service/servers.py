"""Records of running servers, ``<root>/.servers/<name>.json``. They only inform people and messages."""

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
"""Seconds between two heartbeats."""
MISSED = 6
"""Number of missed heartbeats after which a server on another machine counts as gone."""


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
    """Time of the last heartbeat; UTC, ISO 8601."""
    jobs: int
    """Maximum number of jobs at once."""
    running: int = 0
    """Running jobs at the last heartbeat."""
    queued: int = 0
    """Waiting jobs at the last heartbeat."""
    state: str = "serving"
    """``serving``, or ``stopped`` after a clean exit."""

    def to_json_bytes(self) -> bytes:
        """The record as stored."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes) -> ServerRecord | None:
        """Inverse of `to_json_bytes`; None for a damaged record."""
        try:
            record = json.loads(data)
            record.pop("schema_version")
            return ServerRecord(**record)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def is_alive(self, *, now: datetime) -> bool:
        """True if the server runs: judged by its process on this machine, by its heartbeat on another machine."""
        if self.state == "stopped":
            return False
        is_alive = is_process(self.process, self.pid)
        if is_alive is not None:
            return is_alive
        try:
            return (now - datetime.fromisoformat(self.beat)).total_seconds() < MISSED * BEAT_SECONDS
        except (ValueError, TypeError):
            return False

    def to_dict(self, *, now: datetime) -> dict[str, Any]:
        """The server as JSON output shows it."""
        return {
            **{key: value for key, value in asdict(self).items() if key != "process"},
            "alive": self.is_alive(now=now),
        }


def find_servers(root: Store) -> tuple[ServerRecord, ...]:
    """Return all servers with a record below ``root``, oldest first."""
    records = []
    for name in root.list(FOLDER):
        try:
            record = ServerRecord.from_json(root.read(f"{FOLDER}/{name}"))
        except FileNotFoundError:
            continue
        if record is not None:
            records.append(record)
    return tuple(sorted(records, key=lambda record: record.started))


def is_served(root: Store, *, now: datetime) -> bool:
    """True if a server serves the jobs below ``root``."""
    try:
        return any(server.is_alive(now=now) for server in find_servers(root))
    except PipelineError:
        return False


def put_server(root: Store, record: ServerRecord) -> None:
    """Store the record of a server, as its heartbeat."""
    root.replace(f"{FOLDER}/{record.name}.json", record.to_json_bytes())


def remove_server(root: Store, name: str) -> None:
    """Remove the record of a server that is gone."""
    root.remove(f"{FOLDER}/{name}.json")
