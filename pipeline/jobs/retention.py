"""Retention of rejected rows: when they are due for removal, and the mark of those that were removed."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

from pipeline.common.units import iso_time, parse_seconds
from pipeline.jobs import layout
from pipeline.spec.parts import Errors
from pipeline.storage.store import Store


def retention(errors: Errors) -> timedelta | None:
    """Return the time for which rejected rows are stored after the last event of a job; None: no limit."""
    return None if errors.retain is None else timedelta(seconds=parse_seconds(errors.retain))


def mark_rejects_removed(store: Store, *, folder: str, now: datetime) -> None:
    """Record that files of rejects are removed, before the first is. The first record stays.

    :param store: store of the job directory.
    :param folder: folder of the stage, ending with ``/``; empty: the job itself.
    """
    record = {"schema_version": 1, "time": iso_time(now)}
    store.put_if_absent(f"{folder}{layout.REJECTS_REMOVED_FILE}", json.dumps(record).encode() + b"\n")


def rejects_removed(store: Store) -> str:
    """Return the time at which rejected rows of a job or a stage were removed first; empty if they were not."""
    try:
        return str(json.loads(store.read(layout.REJECTS_REMOVED_FILE))["time"])
    except FileNotFoundError:
        return ""
