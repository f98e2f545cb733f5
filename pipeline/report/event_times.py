"""What the events of a job say about its times. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pipeline.jobs.status import Status

# A probe ends with PLANNED.
_FINAL = {str(status) for status in Status if status.is_final or status is Status.PLANNED}
_ACTIVE = {str(Status.PROVISIONING), str(Status.RUNNING), str(Status.PUBLISHING)}


def active_seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Seconds during which a driver worked on the job; the stretch of one that was killed ends at its last event."""
    total, since, last = 0.0, None, None
    for event in events:
        try:
            now = datetime.fromisoformat(str(event["time"]))
        except (KeyError, ValueError):
            continue
        after = event.get("after") if event["event"] == "status" else None
        is_restart = after == Status.PROVISIONING and since is not None
        if since is not None and last is not None and (is_restart or after in _FINAL):
            total += ((last if is_restart else now) - since).total_seconds()
            since = None
        if since is None and after in _ACTIVE:
            since = now
        last = now
    if since is not None and last is not None:
        total += (last - since).total_seconds()
    return max(0.0, total)


def before_this(events: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Events of the drivers before the last one."""
    starts = [number for number, event in enumerate(events) if event["event"] == "driver"]
    return events[: starts[-1]] if starts else ()


def provision_seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that drivers waited for workers."""
    total, since = 0.0, None
    for event in events:
        if event["event"] != "status":
            continue
        now = datetime.fromisoformat(str(event["time"]))
        if event.get("after") == Status.PROVISIONING:
            since = now
        elif since is not None:
            total += max(0.0, (now - since).total_seconds()) if event.get("after") == Status.RUNNING else 0.0
            since = None
    return total


def last_reason(events: Sequence[Mapping[str, Any]], status: Status) -> str:
    """Why a job has a status, when that is no success."""
    if status.is_success:
        return ""
    reasons = [str(event.get("reason", "")) for event in events if event["event"] == "status"]
    return reasons[-1] if reasons else ""
