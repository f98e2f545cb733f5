"""Firings that a person asks for: one by hand, or a schedule's for days that are past."""

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
"""Instants of one backfill."""


def fire(log: Log, *, key: str, now: datetime, files: Sequence[ArrivedFile] = (), reason: str = "") -> Firing:
    """Ask for one job now; again with the same ``key`` it is the same one.

    :param files: what it scores, where files fire the trigger.
    """
    seen = tuple(SeenFile(one.path, one.size, one.version, one.key) for one in files)
    firing = Firing(f"by-hand-{key}", "by hand", to_text(now), reason or "by hand", seen)
    record(log, [Entry("fired", firing=firing, keys=tuple(one.key for one in seen))], clock=lambda: now)
    return firing


def unseen_files(files: Sequence[ArrivedFile], state: State) -> tuple[ArrivedFile, ...]:
    """The files that fired by hand would score: all that are there, have their marker, and never fired."""
    return tuple(one for one in files if one.is_marked and one.key not in state.seen)


def backfill_instants(trigger: Trigger, *, first: date, last: date, now: datetime) -> tuple[datetime, ...]:
    """The instants (UTC) of a schedule on these days, both included, where its time zone is.

    :raises SpecError: for a trigger without a schedule, days to come, none, or too many instants.
    """
    if trigger.kind not in ("cron", "every"):
        raise SpecError(
            "only a schedule can be filled in for days that are past",
            found=f"a trigger of kind {trigger.kind}",
            expected="cron or every",
            next_step="python -m pipeline triggers fire",
        )
    zone = ZoneInfo(trigger.time_zone)
    begin = datetime.combine(first, time(), tzinfo=zone)
    end = min(datetime.combine(last + timedelta(days=1), time(), tzinfo=zone), now)
    found = []
    for instant in instants(trigger, after=begin - timedelta(seconds=1), until=end):
        if instant >= end and instant != now:
            break
        found.append(instant)
        if len(found) > MOST:
            raise SpecError(
                "those are too many times for one backfill",
                found=f"more than {MOST:,} from {first} to {last}",
                next_step="fill in fewer days at once",
            )
    if not found:
        raise SpecError(
            "the schedule has no time on these days that is past",
            found=f"{first} to {last}",
            next_step="python -m pipeline triggers next",
        )
    return tuple(found)


def backfill(log: Log, times: Sequence[datetime], *, max_parallel: int, clock: Callable[[], datetime]) -> list[str]:
    """Ask for the jobs of these instants. Each has the id that the schedule would have given it, and so the same job,
    where it has had one. Gives the ids."""
    entries = [
        Entry(
            "fired",
            firing=Firing(firing_id(one), "backfill", to_text(one), "backfill", max_parallel=max(1, max_parallel)),
        )
        for one in times
    ]
    record(log, entries, clock=clock)
    return [firing_id(one) for one in times]
