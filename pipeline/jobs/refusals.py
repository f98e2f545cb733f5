"""Runs that were refused before there was a job, such as for a missing input: ``<root>/.refused/<time>-<id>.json``.

They only inform people: ``python -m pipeline list`` shows them beside the jobs. The newest `KEPT` are kept.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from pipeline.common.secrets import redact_values
from pipeline.common.units import iso_time, utc_now
from pipeline.errors import PipelineError
from pipeline.storage.store import open_store
from pipeline.storage.urls import is_local_path, local_path

FOLDER = ".refused"
KEPT = 20
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Refusal:
    """A run that was refused."""

    time: str
    """UTC, ISO 8601."""
    name: str
    """Name in the job spec."""
    error: Mapping[str, Any]
    """The error, as ``--json`` shows it."""

    def to_dict(self) -> dict[str, Any]:
        """The refusal as JSON output shows it."""
        return {**asdict(self), "error": dict(self.error)}

    def age(self, now: datetime) -> float:
        """Return the seconds since then; 0 if unknown."""
        with suppress(ValueError, TypeError):
            return max(0.0, (now - datetime.fromisoformat(self.time)).total_seconds())
        return 0.0

    def text(self) -> str:
        """Return name, message and place of the error."""
        return ": ".join(
            filter(None, (self.name, str(self.error.get("message", "")), str(self.error.get("where", ""))))
        )


def record_refusal(root: str, name: str, error: PipelineError) -> None:
    """Store a refusal beside the jobs that there are: where there are none, a refused run leaves every file alone.

    A failure to do so is ignored: it must not hide ``error``.
    """
    with suppress(PipelineError, OSError):
        if is_local_path(root) and not local_path(root).is_dir():
            return
        store = open_store(root, private=True, fsync=False)
        now = iso_time(utc_now())
        refusal = Refusal(now, name, error.to_dict())
        data = json.dumps({"schema_version": SCHEMA_VERSION, **redact_values(refusal.to_dict())}, indent=1).encode()
        # In the order of their names they are in that of their times; colons are not in all file systems.
        store.replace(f"{FOLDER}/{now.replace(':', '')}-{secrets.token_hex(2)}.json", data + b"\n")
        for old in store.list(FOLDER)[:-KEPT]:
            store.remove(f"{FOLDER}/{old}")


def read_refusals(root: str) -> tuple[Refusal, ...]:
    """Return the refusals under ``root``, newest first. Damaged ones are left out."""
    store, refusals = open_store(root), []
    for name in store.list(FOLDER):
        with suppress(PipelineError, OSError, ValueError, KeyError, TypeError):
            record = json.loads(store.read(f"{FOLDER}/{name}"))
            refusals.append(Refusal(str(record["time"]), str(record["name"]), dict(record["error"])))
    return tuple(reversed(refusals))
