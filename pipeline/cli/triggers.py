"""``triggers``: submit jobs on schedules, new files, or after other jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.cli.options import directory_option, emit, is_quiet, output_options, settings_for
from pipeline.errors import SpecError

if TYPE_CHECKING:
    from pipeline.service.triggers.arrivals import ArrivedFile
    from pipeline.service.triggers.definitions import WatchedTrigger
    from pipeline.service.triggers.log import State
    from pipeline.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])
_POLL_SECONDS = 1.0
"""Seconds between two polls while a backfill runs."""


def file_option(command: Command) -> Command:
    """``--file``."""
    text = (
        "A triggers.yaml, or a job spec with triggers; may be repeated. Default: pipeline.triggers, else triggers.yaml."
    )
    return click.option("-f", "--file", "files", metavar="FILE", multiple=True, help=text)(command)


@click.group(short_help="Submit jobs on schedules, new files, or after other jobs.")
def triggers() -> None:
    """Inspect triggers (schedules, new files, after other jobs), and fire them manually.

    python -m pipeline serve evaluates them.
    """


@triggers.command("list", short_help="List the triggers with their status.")
@file_option
@directory_option
@output_options
def list_triggers(files: Sequence[str], directory: str | None) -> None:
    """List the triggers with their next time, running job and last result."""
    from pipeline.common.text import table_text

    settings, watched = _load(files, directory)
    now = _now()
    shown = [_details(trigger, settings=settings, now=now) for trigger in watched]
    header = ["TRIGGER", "KIND", "WHEN", "NEXT", "FIRED", "RUNS", "LAST"]
    emit({"triggers": shown}, lambda: table_text(header, [_row(trigger) for trigger in shown]))


@triggers.command("next", short_help="Show the next times of schedules.")
@click.argument("name", required=False)
@click.option("-n", "count", type=click.IntRange(1, 1000), default=5, show_default=True, help="Times of each.")
@file_option
@directory_option
@output_options
def next_times(name: str | None, count: int, files: Sequence[str], directory: str | None) -> None:
    """Show the next times of schedules, in their time zone and in UTC."""
    from itertools import islice
    from zoneinfo import ZoneInfo

    from pipeline.common.text import table_text
    from pipeline.service.triggers.schedule import firing_id, instants

    _, watched = _load(files, directory, name=name)
    now, upcoming = _now(), []
    for entry in watched:
        times = instants(entry.trigger, after=now, until=now + timedelta(days=366 * 40))
        zone = ZoneInfo(entry.trigger.time_zone)
        upcoming += [
            {
                "trigger": entry.name,
                "time": moment.isoformat(timespec="seconds").replace("+00:00", "Z"),
                "local": f"{moment.astimezone(zone):%Y-%m-%d %H:%M:%S %Z}",
                "firing": firing_id(moment),
            }
            for moment in islice(times, count)
        ]
    rows = [[row["trigger"], row["local"], row["time"]] for row in upcoming]
    emit(
        {"times": upcoming},
        lambda: table_text(["TRIGGER", "LOCAL", "UTC"], rows) if rows else "No trigger has a schedule.",
    )


@triggers.command(short_help="Show which triggers would fire now, and why the others would not; writes nothing.")
@click.argument("name", required=False)
@file_option
@directory_option
@output_options
def test(name: str | None, files: Sequence[str], directory: str | None) -> None:
    """Show which triggers would fire now, and why the others would not. Writes and submits nothing."""
    from pipeline.common.text import next_lines

    settings, watched = _load(files, directory, name=name)
    shown = [_tested(trigger, settings) for trigger in watched]
    lines = []
    for trigger in shown:
        lines.append(
            f"{trigger['trigger']}: {'would fire' if trigger['fires'] else 'would not fire'}: {trigger['reason']}"
        )
        lines += [f"  file       {path}" for path in trigger["files"][:10]]
        lines += [f"  … and {len(trigger['files']) - 10:,} more"] if len(trigger["files"]) > 10 else []
        lines += [f"  problem    {' '.join(trigger['problem'].split())}"] if trigger["problem"] else []
    emit({"triggers": shown}, lambda: "\n".join([*lines, *next_lines(["python -m pipeline serve"])]))


@triggers.command(short_help="Fire a trigger by hand.")
@click.argument("name")
@click.option("--key", metavar="TEXT", help="Fire at most once per key. Default: the time.")
@file_option
@directory_option
@output_options
def fire(name: str, key: str | None, files: Sequence[str], directory: str | None) -> None:
    """Fire a trigger now, and print the id of its job. An arrival trigger scores all files that have not fired yet."""
    from pipeline.service.triggers import backfill as by_hand
    from pipeline.service.triggers.evaluate import scan_in_process
    from pipeline.service.triggers.log import open_log
    from pipeline.service.triggers.schedule import firing_id

    settings, (watched,) = _load(files, directory, name=name)
    now = _now()
    log = open_log(settings.directory, watched.name, fsync=settings.fsync)
    arrival = watched.trigger.arrival
    arrived: tuple[ArrivedFile, ...] = ()
    if arrival is not None:
        state = log.read()
        arrived = by_hand.unseen_files(scan_in_process(arrival, seen=state.seen), state)
        if not arrived:
            raise SpecError("no file is waiting to fire", where=f"trigger {name}", found=arrival.path)
    watch = _watch(settings)
    watch.evaluate(watched)
    firing = by_hand.fire(log, key=_checked_key(key) or firing_id(now), now=now, files=arrived)
    watch.evaluate(watched)
    state = log.read()
    submission = state.find(firing.id)
    past = next((past for past in reversed(state.recent) if past.id == firing.id), None)
    job = submission.job if submission else past.job if past else ""
    if past is not None and not past.job:
        raise SpecError("the job was refused", where=f"trigger {name}", found=past.reason)
    if not is_quiet():
        message = "submitted" if job else "it waits for the end of the trigger's last job"
        click.echo(f"{message}\n  next:     python -m pipeline {f'watch {job}' if job else 'serve'}", err=True)
    emit({"trigger": name, "firing": firing.id, "job": job, "files": [file.path for file in arrived]}, lambda: job)


@triggers.command(short_help="Run a schedule for past days.")
@click.argument("name")
@click.option("--from", "first", required=True, metavar="DATE", help="First day, such as 2026-01-01.")
@click.option("--to", "last", required=True, metavar="DATE", help="Last day, inclusive.")
@click.option("--max-parallel", type=click.IntRange(min=1), default=1, show_default=True, help="Jobs at once.")
@click.option("--no-wait", is_flag=True, help="Leave it to serve.")
@file_option
@directory_option
@output_options
def backfill(
    name: str,
    *,
    first: str,
    last: str,
    max_parallel: int,
    no_wait: bool,
    files: Sequence[str],
    directory: str | None,
) -> None:
    """Run a schedule for past days: each time once, as the schedule would have, even if it ran already.

    If interrupted, it continues where it stopped when it is called again, or under serve.
    """
    from pipeline.service.triggers import backfill as by_hand
    from pipeline.service.triggers.log import open_log

    settings, (watched,) = _load(files, directory, name=name)
    days = _day(first, "--from"), _day(last, "--to")
    times = by_hand.backfill_instants(watched.trigger, first=days[0], last=days[1], now=_now())
    log = open_log(settings.directory, watched.name, fsync=settings.fsync)
    watch = _watch(settings)
    watch.evaluate(watched)
    wanted = set(by_hand.backfill(log, times, max_parallel=max_parallel, clock=_now))
    ends = _follow(watch, watched, wanted, no_wait=no_wait)
    shown = [ends[firing] for firing in sorted(ends)]
    remaining = len(wanted) - len(ends)
    emit(
        {"trigger": name, "times": len(wanted), "ended": shown, "left": remaining},
        lambda: (
            "\n".join([f"{end['time'][:19]}Z  {end['status']}  {end['job']}" for end in shown])
            or f"{remaining:,} times are left to serve"
        ),
    )


def _follow(watch: Any, watched: WatchedTrigger, wanted: set[str], *, no_wait: bool) -> dict[str, dict[str, str]]:
    """Evaluate the trigger until no firing of ``wanted`` is open. Return the ends by firing."""
    ends: dict[str, dict[str, str]] = {}
    while True:
        state = watch.evaluate(watched).state
        for past in state.recent:
            if past.id in wanted:
                ends[past.id] = {"firing": past.id, "time": past.time, "job": past.job, "status": past.status}
        if no_wait or not any(submission.firing.id in wanted for submission in state.open):
            return ends
        time.sleep(_POLL_SECONDS)


def _load(
    files: Sequence[str], directory: str | None, *, name: str | None = None
) -> tuple[Settings, tuple[WatchedTrigger, ...]]:
    from pipeline.service.triggers.definitions import find_trigger, load_triggers
    from pipeline.service.triggers.jobs import trigger_files

    settings = settings_for(directory=directory)
    named = trigger_files(settings, files)
    if not named:
        raise SpecError(
            "there are no triggers",
            found="no triggers.yaml in the working directory",
            next_step="name a file with --file, or write one (docs/triggers.md)",
        )
    watched = load_triggers(named)
    return settings, watched if name is None else (find_trigger(watched, name),)


def _watch(settings: Settings) -> Any:
    """A server that polls triggers, and leaves jobs to another server if one runs."""
    from pipeline.service.servers import is_served
    from pipeline.service.triggers.jobs import TriggerWatch
    from pipeline.storage.store import open_store

    has_server = is_served(open_store(settings.directory, private=True), now=_now())
    return TriggerWatch(settings, (), start=not has_server)


def _now() -> datetime:
    from pipeline.common.units import utc_now

    return utc_now()


def _day(text: str, flag: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise SpecError("not a valid date", where=flag, found=text, expected="such as 2026-01-31") from error


def _checked_key(key: str | None) -> str:
    if key is not None and (not key.isprintable() or "/" in key or not key.strip() or len(key) > 100):
        raise SpecError("invalid key", where="--key", found=repr(key), expected="a text without slashes")
    return key or ""


def _details(watched: WatchedTrigger, *, settings: Settings, now: datetime) -> dict[str, Any]:
    from pipeline.service.triggers.log import open_log
    from pipeline.service.triggers.schedule import next_instant

    trigger = watched.trigger
    state = open_log(settings.directory, watched.name).read()
    after = next_instant(trigger, after=now)
    return {
        "trigger": watched.name,
        "kind": trigger.kind,
        "when": _when(watched),
        "job": watched.job,
        "file": watched.file,
        "missed": trigger.missed,
        "overlap": trigger.overlap,
        "since": state.since,
        "next": after.isoformat(timespec="seconds").replace("+00:00", "Z") if after else "",
        "fired": state.fired,
        "skipped": state.skipped,
        "open": _open(state),
        "recent": [
            {"firing": past.id, "time": past.time, "job": past.job, "status": past.status, "reason": past.reason}
            for past in state.recent
        ],
    }


def _open(state: State) -> list[dict[str, Any]]:
    return [
        {
            "firing": submission.firing.id,
            "time": submission.firing.time,
            "job": submission.job,
            "files": len(submission.firing.files),
            "cancelling": submission.is_cancelling,
        }
        for submission in state.open
    ]


def _when(watched: WatchedTrigger) -> str:
    trigger = watched.trigger
    if trigger.cron is not None:
        return f"{trigger.cron} {trigger.time_zone}"
    if trigger.arrival is not None:
        return trigger.arrival.path
    return str(trigger.every or trigger.after or "")


def _row(trigger: dict[str, Any]) -> list[str]:
    running = [item["job"] or "waiting" for item in trigger["open"]]
    last = trigger["recent"][-1] if trigger["recent"] else None
    last_result = f"{last['status']} {last['job']}".strip() if last else ""
    return [
        trigger["trigger"],
        trigger["kind"],
        trigger["when"],
        trigger["next"],
        f"{trigger['fired']:,}",
        running[0] + (f" +{len(running) - 1}" if len(running) > 1 else "") if running else "",
        last_result,
    ]


def _tested(watched: WatchedTrigger, settings: Settings) -> dict[str, Any]:
    from pipeline.errors import PipelineError
    from pipeline.service.triggers.evaluate import explain
    from pipeline.service.triggers.jobs import TriggerJobs, spec_of
    from pipeline.service.triggers.log import Firing, open_log, to_text

    now, problem = _now(), ""
    jobs = TriggerJobs(watched, settings)
    _, decision = explain(watched.trigger, open_log(settings.directory, watched.name), jobs=jobs, now=now)
    fired = [entry.firing for entry in decision.entries if entry.what == "fired" and entry.firing is not None]
    try:
        spec_of(watched, fired[0] if fired else Firing("test", watched.trigger.kind, to_text(now)))
    except PipelineError as error:
        problem = str(error)
    return {
        "trigger": watched.name,
        "fires": bool(fired),
        "firings": [firing.id for firing in fired],
        "files": [file.path for firing in fired for file in firing.files],
        "reason": decision.reason,
        "problem": problem,
    }
