"""Firings on request: one trigger by hand, or a schedule for past days."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from pipeline.errors import SpecError
from pipeline.service.triggers.arrivals import ArrivedFile
from pipeline.service.triggers.evaluate import record
from pipeline.service.triggers.log import Entry, Firing, Log, SeenFile, State, to_text
from pipeline.service.triggers.schedule import firing_id, instants
from pipeline.spec.triggers import Trigger

MOST = 10_000
"""Maximum number of instants in one backfill."""


def fire(log: Log, *, key: str, now: datetime, files: Sequence[ArrivedFile] = (), reason: str = "") -> Firing:
    """Fire the trigger once now. The same ``key`` gives the same firing.

    :param files: Files to score, for a trigger on files.
    """
    seen = tuple(SeenFile(file.path, file.size, file.version, file.key) for file in files)
    firing = Firing(f"by-hand-{key}", "by hand", to_text(now), reason or "by hand", seen)
    record(log, [Entry("fired", firing=firing, keys=tuple(file.key for file in seen))], clock=lambda: now)
    return firing


def unseen_files(files: Sequence[ArrivedFile], state: State) -> tuple[ArrivedFile, ...]:
    """Return files that a firing by hand scores: all files that have their marker and never fired."""
    return tuple(file for file in files if file.is_marked and file.key not in state.seen)


def backfill_instants(trigger: Trigger, *, first: date, last: date, now: datetime) -> tuple[datetime, ...]:
    """Return the instants (UTC) of a schedule from ``first`` to ``last``, both included, in its time zone.

    :raises SpecError: for a trigger without a schedule, future days, and no or too many instants.
    """
    if trigger.kind not in ("cron", "every"):
        raise SpecError(
            "only a schedule can be backfilled",
            found=f"a trigger of kind {trigger.kind}",
            expected="cron or every",
            next_step="python -m pipeline triggers fire",
        )
    zone = ZoneInfo(trigger.time_zone)
    begin = datetime.combine(first, time(), tzinfo=zone)
    end = min(datetime.combine(last + timedelta(days=1), time(), tzinfo=zone), now)
    past = []
    for instant in instants(trigger, after=begin - timedelta(seconds=1), until=end):
        if instant >= end and instant != now:
            break
        past.append(instant)
        if len(past) > MOST:
            raise SpecError(
                "too many instants for one backfill",
                found=f"more than {MOST:,} from {first} to {last}",
                next_step="backfill fewer days at once",
            )
    if not past:
        raise SpecError(
            "the schedule has no past instant on these days",
            found=f"{first} to {last}",
            next_step="python -m pipeline triggers next",
        )
    return tuple(past)


def backfill(log: Log, times: Sequence[datetime], *, max_parallel: int, clock: Callable[[], datetime]) -> list[str]:
    """Fire the trigger for these instants. An instant that fired already keeps its id and its job. Return the ids."""
    entries = [
        Entry(
            "fired",
            firing=Firing(
                firing_id(instant), "backfill", to_text(instant), "backfill", max_parallel=max(1, max_parallel)
            ),
        )
        for instant in times
    ]
    record(log, entries, clock=clock)
    return [firing_id(instant) for instant in times]
