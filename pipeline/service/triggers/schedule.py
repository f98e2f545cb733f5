"""Instants of a schedule: of a cron expression in its time zone, or of an interval. Pure.

The instants between two times depend on nothing else: a restarted server finds the same instants.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim

from pipeline.common.units import parse_seconds
from pipeline.spec.triggers import Trigger

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HOUR = timedelta(hours=1)


def instants(trigger: Trigger, *, after: datetime, until: datetime) -> Iterator[datetime]:
    """Yield the instants (UTC) later than ``after`` and no later than ``until``, in order. Without a schedule, none.

    Clock changes are treated as in Debian's cron. A job for a fixed time of day that the clocks leap over runs right
    after the leap. A job for a time that comes twice runs the first time. ``*`` in minutes or hours means every
    existing minute or hour.
    """
    if trigger.cron is not None:
        yield from _cron_instants(trigger.cron, ZoneInfo(trigger.time_zone), after=after, until=until)
    elif trigger.every is not None:
        step = timedelta(seconds=parse_seconds(trigger.every))
        instant = EPOCH + ((after - EPOCH) // step + 1) * step
        while instant <= until:
            yield instant
            instant += step


def next_instant(trigger: Trigger, *, after: datetime) -> datetime | None:
    """Return the first instant later than ``after``; None without a schedule."""
    return next(instants(trigger, after=after, until=after + timedelta(days=366 * 40)), None)


def firing_id(instant: datetime) -> str:
    """Return the id of the firing for ``instant``, such as ``20260329T003000Z``. Every server gives the same id."""
    text = instant.astimezone(UTC).strftime("%Y%m%dT%H%M%S")
    return f"{text}.{instant.microsecond:06d}Z" if instant.microsecond else f"{text}Z"


def _cron_instants(expression: str, zone: ZoneInfo, *, after: datetime, until: datetime) -> Iterator[datetime]:
    # cronsim does not know which of two equal wall times it starts from, and cannot start at a clock change.
    # So cronsim starts on an earlier full hour, and early instants are skipped.
    start = after.astimezone(UTC).replace(minute=0, second=0, microsecond=0) - _HOUR
    last = after
    for local in CronSim(expression, start.astimezone(zone)):
        instant = local.astimezone(UTC)
        if instant > until:
            return
        if instant > last:
            last = instant
            yield instant
