"""``chaos``: test the crash recovery of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import emit, is_quiet, load, output_options, override_option
from pipeline.common.units import plural

if TYPE_CHECKING:
    from pipeline.testing.chaos import TrialResult


@click.command(short_help="Test crash recovery: kill processes while a sample of a job runs.")
@click.argument("target", metavar="JOB.YAML")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, metavar="N", help="Trials to run.")
@click.option(
    "--seed",
    "first_seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="S",
    help="The first seed.",
)
@click.option("--rows", type=click.IntRange(min=1), default=40_000, show_default=True, help="Rows of the sample.")
@click.option("--minutes", type=click.FloatRange(min=0), metavar="M", help="Start no trial after this many minutes.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Worker processes.")
@click.option(
    "--memory-limit", "memory", default="2 GiB", show_default=True, metavar="SIZE", help="Memory of one worker."
)
@override_option
@output_options
def chaos(target: str, overrides: tuple[str, ...], params: tuple[str, ...], **asked: Any) -> None:
    """Run a sample of a job while its processes are killed, then verify the result.

    Workers, nannies, scheduler and drivers are killed, stopped and continued at seeded moments. The job is resumed and
    verified, and every row is compared with an undisturbed run. Your sink is not touched; only processes that this
    command started are killed.
    """
    from pipeline.testing.chaos import chaos as unleash

    loaded = load(target, overrides=overrides, params=params)
    say = _ignore if is_quiet() else _say
    report = unleash(loaded.spec, import_paths=loaded.folders, on_trial=say, **asked)
    details = report.to_dict()
    emit(details, lambda: report_text(details))
    raise click.exceptions.Exit(report.exit_code)


def _ignore(trial: TrialResult) -> None:
    """Print nothing."""


def _say(trial: TrialResult) -> None:
    click.echo(trial_text(trial.to_dict()), err=True)


def report_text(details: Mapping[str, Any]) -> str:
    """A summary of all trials, and each failed trial in detail."""
    trials = details["trials"]
    few = f" of {details['asked']:,} that were asked for" if details["tried"] < details["asked"] else ""
    lines = [
        f"{'HELD' if details['ok'] else 'BROKEN'}  {details['name']}",
        f"  sample     {plural(details['rows'], 'row')} in {plural(details['partitions'], 'partition')}",
        f"  trials     {details['tried']:,}{few}, in {details['seconds']:,.0f} s",
        f"  faults     {_faults(trials)}",
        f"  drivers    {sum(len(trial['attempts']) for trial in trials):,} to end {details['tried']:,} jobs",
        f"  rows       {details['lost']:,} lost, {details['duplicated']:,} duplicated",
        f"  readers    {sum(trial['reads'] for trial in trials):,} reads of the output while the jobs ran",
    ]
    broken = [trial for trial in trials if not trial["ok"]]
    lines += [trial_text(trial) for trial in broken]
    if broken:
        lines += [f"  folder     {details['folder']}"]
        lines += [f"  next       python -m pipeline chaos JOB.YAML --seeds 1 --seed {broken[0]['seed']}"]
    return "\n".join(lines)


def trial_text(trial: Mapping[str, Any]) -> str:
    """One trial in a line, with its failures."""
    faults = [f"{fault['kind']} {fault['moment']}" for fault in trial["faults"] if fault["seconds"] is not None]
    if trial["worker_lifetime"]:
        faults.append(f"workers live {trial['worker_lifetime']:.0f} s")
    drivers = len(trial["attempts"])
    outcome = f"{'held' if trial['ok'] else 'BROKEN'}, {drivers} {'driver' if drivers == 1 else 'drivers'}"
    line = f"seed {trial['seed']}: {outcome}, {trial['seconds']:.0f} s: {', '.join(faults) or 'no fault in time'}"
    return line if trial["ok"] else f"{line}\n  {trial['detail']}"


def _faults(trials: list[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for trial in trials:
        kinds = [fault["kind"] for fault in trial["faults"] if fault["seconds"] is not None]
        for kind in [*kinds, *(["lifetime"] if trial["worker_lifetime"] else [])]:
            counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} × {kind}" for kind, count in sorted(counts.items(), key=lambda item: -item[1])) or "none"
