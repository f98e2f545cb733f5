"""Instants of a schedule: of a cron expression in its time zone, or of an interval. Pure.

The instants between two times depend on nothing else: a restarted server finds the same instants. `InstantRange` counts
the instants of years, and finds the last one, without listing them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

from cronsim import CronSim

from pipeline.common.units import parse_seconds
from pipeline.spec.triggers import Trigger

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HOUR = timedelta(hours=1)
_TICK = timedelta(microseconds=1)


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


@dataclass(frozen=True)
class InstantRange:
    """The instants of a schedule that are later than ``after`` and no later than ``until``, without ``excluded``."""

    trigger: Trigger
    after: datetime
    until: datetime
    excluded: frozenset[datetime] = frozenset()

    def head(self, most: int) -> list[datetime]:
        """Return the first instants, ``most`` of them at most."""
        every = instants(self.trigger, after=self.after, until=self.until)
        return list(islice((instant for instant in every if instant not in self.excluded), most))

    def first(self) -> datetime | None:
        """Return the first instant; None if there is none."""
        return next(iter(self.head(1)), None)

    def last(self) -> datetime | None:
        """Return the last instant; None if there is none. Windows grow backwards until one holds an instant."""
        until, window = self.until, self._first_window()
        while until > self.after:
            after = max(self.after, until - window)
            last = None
            for instant in instants(self.trigger, after=after, until=until):
                last = last if instant in self.excluded else instant
            if last is not None:
                return last
            until, window = after, 4 * window
        return None

    def _first_window(self) -> timedelta:
        every = self.trigger.every
        return _HOUR if every is None else timedelta(seconds=parse_seconds(every))

    def count(self) -> int:
        """Return the number of instants: by arithmetic, but for days near a change of the clocks."""
        if self.until <= self.after:
            return 0
        total = _count(self.trigger, after=self.after, until=self.until)
        inside = (moment for moment in self.excluded if self.after < moment <= self.until)
        return total - sum(_is_instant(self.trigger, moment) for moment in inside)


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


def _is_instant(trigger: Trigger, moment: datetime) -> bool:
    return next(instants(trigger, after=moment - _TICK, until=moment), None) == moment


def _count(trigger: Trigger, *, after: datetime, until: datetime) -> int:
    if trigger.every is not None:
        step = timedelta(seconds=parse_seconds(trigger.every))
        return (until - EPOCH) // step - (after - EPOCH) // step
    if trigger.cron is None:
        return 0
    zone = ZoneInfo(trigger.time_zone)
    total = 0
    for block in _blocks(zone, after=after, until=until):
        if isinstance(block, _Days):
            total += _count_of_days(trigger.cron, block)
        else:
            total += sum(1 for _ in _cron_instants(trigger.cron, zone, after=block.after, until=block.until))
    return total


@dataclass(frozen=True)
class _Days:
    """Whole days in a zone, ``end`` excluded, on which and beside which the clocks do not change."""

    begin: date
    end: date


@dataclass(frozen=True)
class _Times:
    """A range of time, ``after`` excluded."""

    after: datetime
    until: datetime


def _blocks(zone: ZoneInfo, *, after: datetime, until: datetime) -> Iterator[_Days | _Times]:
    """Split a range of time into regular days and the rest."""
    first = after.astimezone(zone).date() + timedelta(days=1)
    end = until.astimezone(zone).date()
    moment, day = after, first
    while day < end:
        begin = day
        while day < end and _is_regular(day, zone):
            day += timedelta(days=1)
        if day > begin:
            yield _Times(moment, _midnight(begin, zone) - _TICK)
            yield _Days(begin, day)
            moment = _midnight(day, zone) - _TICK
        while day < end and not _is_regular(day, zone):
            day += timedelta(days=1)
    yield _Times(moment, until)


def _midnight(day: date, zone: ZoneInfo) -> datetime:
    return datetime.combine(day, time(), tzinfo=zone).astimezone(UTC)


def _is_regular(day: date, zone: ZoneInfo) -> bool:
    noon = datetime.combine(day, time(12))
    around = [noon + timedelta(hours=hours) for hours in (-36, -24, -12, 0, 12, 24, 36)]
    return len({moment.replace(tzinfo=zone).utcoffset() for moment in around}) == 1


def _count_of_days(expression: str, block: _Days) -> int:
    _, _, *of_day = expression.split()
    midnight = datetime.combine(block.begin, time(), tzinfo=UTC) - timedelta(minutes=1)
    a_day = CronSim(expression, midnight)
    days = 0
    for moment in CronSim(" ".join(["0 0", *of_day]), midnight):
        if moment.date() >= block.end:
            break
        days += 1
    return days * len(a_day.hours) * len(a_day.minutes)
