"""``list``, ``status``, ``report``, ``verify``, ``rejects`` and ``diff``: inspect jobs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import directory_option, emit, output_options, settings_for
from pipeline.errors import StateCorrupt

if TYPE_CHECKING:
    from pipeline.jobs.directory import JobDirectory
    from pipeline.jobs.refusals import Refusal
    from pipeline.report.report import Report

SHOWN_REFUSALS = 5
"""Runs refused since the newest job that `list` shows."""


def complete_job(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the ids that begin like that, newest first; for shells."""
    from pipeline.jobs.listing import LAST, job_ids

    directory = context.params.get("directory")
    with suppress(Exception):
        ids = job_ids(settings_for(directory=directory).directory)
        return [name for name in (LAST, *ids) if name.startswith(incomplete)]
    return []


job_argument = click.argument("job", default="@last", shell_complete=complete_job)


@click.command("list", short_help="List the jobs, newest first.")
@click.option(
    "--status", "statuses", metavar="STATUS", multiple=True, help="Only jobs with this status; may be repeated."
)
@click.option("--name", metavar="PATTERN", default="", help="Only jobs whose name or id matches, such as churn-*.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@click.option("--trend", metavar="NAME", help="Compare the jobs of this name, oldest first: speed, rejects, memory.")
@directory_option
@output_options
def list_command(
    *, statuses: tuple[str, ...], name: str, limit: int | None, trend: str | None, directory: str | None
) -> None:
    """List the jobs, newest first, with their age and completed partitions."""
    if trend is not None:
        if statuses or name:
            raise click.UsageError("--trend goes with --limit only")
        _show_trend(trend, limit, directory)
        return
    from pipeline.common.units import utc_now
    from pipeline.jobs.listing import list_jobs
    from pipeline.jobs.refusals import read_refusals
    from pipeline.jobs.status import Status
    from pipeline.storage.urls import is_local_path, local_path

    known = {str(status).lower(): status for status in Status}
    unknown = [status for status in statuses if status.lower() not in known]
    if unknown:
        raise click.BadParameter(
            f"unknown status {unknown[0]!r}, expected one of {', '.join(known)}", param_hint="--status"
        )
    settings = settings_for(directory=directory)
    wanted = frozenset(known[status.lower()] for status in statuses)
    summaries = list_jobs(settings.directory, name=name, statuses=wanted, limit=limit)
    jobs = [summary.to_dict(now=utc_now()) for summary in summaries]
    root = str(local_path(settings.directory)) if is_local_path(settings.directory) else settings.directory
    refusals = read_refusals(settings.directory) if not (wanted or name) else ()
    details = {"directory": root, "jobs": jobs, "refused": [refusal.to_dict() for refusal in refusals]}
    emit(
        details,
        lambda: "\n".join(
            [
                _list_text(jobs, settings.directory, is_all=not (wanted or name)),
                *_refusal_lines(refusals, created=str(jobs[0].get("created", "")) if jobs else ""),
            ]
        ),
    )


def _show_trend(name: str, limit: int | None, directory: str | None) -> None:
    from pipeline.report import trend as trends

    root = settings_for(directory=directory).directory
    points = trends.trend(root, name, limit=limit or trends.SHOWN)
    details = {"directory": root, "name": name, "jobs": [point.to_dict() for point in points]}
    emit(details, lambda: trends.trend_text(points) if points else f"no job named {name} in {root}")


def _list_text(jobs: list[dict[str, Any]], directory: str, *, is_all: bool) -> str:
    from pipeline.common.text import table_text
    from pipeline.common.units import format_seconds

    if not jobs and not is_all:
        return f"no matching jobs in {directory}"
    if not jobs:
        return f"no jobs in {directory}\n  next:     python -m pipeline run job.yaml"
    rows = []
    for job in jobs:
        rows.append(_list_row(job, job["job"], format_seconds(job["age"])))
        rows += [
            _list_row(child, f"  {child['job'].removeprefix(job['job'])}", "") for child in job.get("children", ())
        ]
    return table_text(["JOB", "STATUS", "AGE", "DONE", "ROWS", "OUTPUT"], rows)


def _refusal_lines(refusals: Sequence[Refusal], *, created: str) -> list[str]:
    """Return a line for each run that was refused since the newest job."""
    from pipeline.common.units import format_seconds, utc_now

    recent = [refusal for refusal in refusals if refusal.time > created][:SHOWN_REFUSALS]
    return [f"refused {format_seconds(refusal.age(utc_now()))} ago: {refusal.text()}" for refusal in recent]


def _list_row(job: dict[str, Any], name: str, age: str) -> list[str]:
    done = f"{job['partitions']['done']:,}/{job['partitions']['planned']:,}"
    return [name, job["status"], age, done, f"{job['rows']:,}", job["output"]]


@click.command(short_help="Show the status of a job.")
@job_argument
@directory_option
@output_options
def status(job: str, directory: str | None) -> None:
    """Show the status of a job, given by its id, a prefix of it, @last, or its directory."""
    report = current_report(_find(job, directory))
    emit(report.to_dict(), report.text)


def current_report(job: JobDirectory) -> Report:
    """Return the stored report of a job that ended, else one made from its receipts so far."""
    from pipeline.report.report import Report

    stored = job.read_report()
    if stored is not None and stored.get("status") == str(job.status()):
        # A report that was damaged, or changed by hand, is made again.
        with suppress(KeyError, TypeError, ValueError):
            return Report.from_dict(stored)
    from pipeline.report.build import make_report

    return make_report(job)


@click.command(short_help="Prove that every row was scored once.")
@job_argument
@click.option("--sample", type=click.IntRange(min=0), default=1000, show_default=True, help="Rows to score again.")
@click.option("--seed", type=int, help="Seed of the sample. Default: a new sample each time.")
@click.option("--call-services", is_flag=True, help="Ask services about the sample again, which costs.")
@directory_option
@output_options
@click.pass_context
def verify(context: click.Context, /, job: str, directory: str | None, **options: Any) -> None:
    """Prove from the receipts and the data that every row was scored once; score a sample again."""
    from pipeline.report.verify import verify as verify_job

    result = verify_job(_find(job, directory), **options)
    emit(result.to_dict(), result.text)
    if not result.ok:
        context.exit(StateCorrupt.exit_code)


@click.command(short_help="Show the rows that could not be scored.")
@job_argument
@click.option("--limit", type=click.IntRange(min=0), default=3, show_default=True, help="Examples of each reason.")
@click.option("--reason", default="*", metavar="PATTERN", help="Only these reasons, such as 'contract:*'.")
@click.option("--export", "path", metavar="PATH", help="Write the rows to a new file, .parquet or .csv.")
@directory_option
@output_options
def rejects(job: str, limit: int, reason: str, path: str | None, directory: str | None) -> None:
    """Show the rows that could not be scored, by reason, the files that hold them, and quarantined input files."""
    from pipeline.report.rejects import export, summarise

    directory_of_job = _find(job, directory)
    summary = summarise(directory_of_job, examples=limit, reason=reason)
    if path is not None:
        summary = replace(summary, exported=export(directory_of_job, path, reason=reason))
    emit(summary.to_dict(), summary.text)


@click.command(short_help="Write the report of a job as an HTML page.")
@job_argument
@click.option("--open", "is_opened", is_flag=True, help="Show the page in a browser.")
@click.option("--compare", "before", metavar="JOB", help="Compare with this job. Default: the one before, by its name.")
@click.option("--values", is_flag=True, help="Show messages and values of rejected rows, which may be personal.")
@click.option("--output", metavar="FILE", help="Write the page there. Default: report.html in the job's directory.")
@directory_option
@output_options
def report(
    *, job: str, is_opened: bool, before: str | None, values: bool, output: str | None, directory: str | None
) -> None:
    """Write the report of a job as one HTML file, which loads nothing from a network. Each run of a job writes it."""
    import webbrowser
    from pathlib import Path

    from pipeline.jobs.layout import REPORT_PAGE
    from pipeline.jobs.listing import previous_job
    from pipeline.report.distributions import sketches_of
    from pipeline.report.html.page import report_page

    found = _find(job, directory)
    earlier = _find(before, directory) if before is not None else previous_job(found)
    page = report_page(
        found,
        current_report(found),
        before=current_report(earlier) if earlier is not None else None,
        baseline=sketches_of(earlier) if earlier is not None else None,
        shows_values=values or found.plan.spec.report.show_values,
    )
    if output is None and not found.store.is_local:
        output = f"{found.id}.html"
    path = str(Path(output or f"{found.root}/{REPORT_PAGE}").absolute())
    Path(path).write_text(page, encoding="utf-8")
    if is_opened:
        webbrowser.open(Path(path).as_uri())
    emit({"job": found.id, "path": path, "compared_with": earlier.id if earlier is not None else None}, lambda: path)


@click.command(short_help="Compare two jobs.")
@click.argument("before", metavar="JOB")
@click.argument("after", metavar="JOB")
@directory_option
@output_options
def diff(before: str, after: str, directory: str | None) -> None:
    """Compare two jobs: spec, model, input files, rows, rejects by reason, times."""
    from pipeline.report.compare import compare, comparison_text

    differences = compare(_find(before, directory), _find(after, directory))
    emit(differences.to_dict(), lambda: comparison_text(differences))


def _find(job: str, directory: str | None) -> JobDirectory:
    from pipeline.jobs.listing import find_job

    return find_job(settings_for(directory=directory).directory, job)
