"""``progress.json``: progress inside the partitions of a running job, for processes other than its driver.

The file is replaced every few seconds while partitions run. No decision depends on it: a write that fails is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.common.units import iso_time, utc_now
from pipeline.events import ProgressMade, RunningPartition
from pipeline.jobs import layout
from pipeline.storage.store import Store

SCHEMA_VERSION = 1
MAX_RUNNING = 64
"""Most running partitions in the file, the longest first."""


@dataclass(frozen=True)
class ProgressRecord:
    """The content of ``progress.json``."""

    time: str
    """Time of writing, UTC."""
    epoch: int
    """Epoch of the driver that wrote it."""
    progress: ProgressMade
    rows_per_second: float
    """Rate of the last batches; 0: unknown."""
    seconds_left: float | None
    """Seconds until the last row is scored, at that rate; None: unknown."""
    running_count: int
    """Partitions that run; ``progress.running`` has the longest of them."""

    @staticmethod
    def make(event: ProgressMade, *, epoch: int, rows_per_second: float, seconds_left: float | None) -> ProgressRecord:
        """Return the record of ``event``, written now."""
        shown = ProgressMade(**{**vars(event), "running": event.running[:MAX_RUNNING]})
        return ProgressRecord(iso_time(utc_now()), epoch, shown, rows_per_second, seconds_left, len(event.running))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, those of the event among them."""
        progress = asdict(self.progress)
        running = [
            {**part, "seconds": round(part["seconds"], 1), "quiet_seconds": round(part["quiet_seconds"], 1)}
            for part in progress.pop("running")
        ]
        left = None if self.seconds_left is None else round(self.seconds_left, 1)
        return {
            "schema_version": SCHEMA_VERSION,
            "time": self.time,
            "epoch": self.epoch,
            **progress,
            "rows_per_second": round(self.rows_per_second, 1),
            "seconds_left": left,
            "running_count": self.running_count,
            "running": running,
        }

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> ProgressRecord:
        """Return the record that `to_dict` gave."""
        running = tuple(RunningPartition(**part) for part in record["running"])
        names = ("job", "round", "rows", "rows_done", "partitions", "done")
        progress = ProgressMade(**{name: record[name] for name in names}, running=running)
        return ProgressRecord(
            time=record["time"],
            epoch=record["epoch"],
            progress=progress,
            rows_per_second=record["rows_per_second"],
            seconds_left=record["seconds_left"],
            running_count=record["running_count"],
        )


def write_progress(store: Store, record: ProgressRecord) -> None:
    """Replace ``progress.json``."""
    store.replace(layout.PROGRESS_FILE, json.dumps(record.to_dict(), indent=1).encode() + b"\n")


def read_progress(store: Store, *, epoch: int | None = None) -> ProgressRecord | None:
    """Return the last progress of a job; None if none was stored, or none that can be read.

    :param epoch: epoch of the lease: the progress of an earlier driver is outdated. None: that of any driver.
    """
    try:
        record = ProgressRecord.from_dict(json.loads(store.read(layout.PROGRESS_FILE)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if epoch in (None, record.epoch) else None
