"""``list``, ``status``, ``verify`` and ``rejects``: what one looks at after, or while, a job runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import directory_option, emit, output_options, settings_for
from pipeline.errors import StateCorrupt

if TYPE_CHECKING:
    from pipeline.jobs.directory import JobDirectory

job_argument = click.argument("job", default="@last")


@click.command("list", short_help="List the jobs, newest first.")
@click.option(
    "--status", "statuses", metavar="STATUS", multiple=True, help="Only jobs of that status; may be repeated."
)
@click.option("--name", metavar="PATTERN", default="", help="Only jobs whose name or id is like that, such as churn-*.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@directory_option
@output_options
def list_command(*, statuses: tuple[str, ...], name: str, limit: int | None, directory: str | None) -> None:
    """List the jobs, newest first, with their age and how many of their partitions are done."""
    from pipeline.common.units import utc_now
    from pipeline.jobs.listing import list_jobs
    from pipeline.jobs.status import Status
    from pipeline.storage.urls import is_local_path, local_path

    known = {str(status).lower(): status for status in Status}
    unknown = [status for status in statuses if status.lower() not in known]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}", param_hint="--status")
    settings = settings_for(directory=directory)
    wanted = frozenset(known[status.lower()] for status in statuses)
    found = list_jobs(settings.directory, name=name, statuses=wanted, limit=limit)
    jobs = [summary.details(now=utc_now()) for summary in found]
    root = str(local_path(settings.directory)) if is_local_path(settings.directory) else settings.directory
    emit({"directory": root, "jobs": jobs}, lambda: _list_text(jobs, settings.directory, is_all=not (wanted or name)))


def _list_text(jobs: list[dict[str, Any]], directory: str, *, is_all: bool) -> str:
    from pipeline.common.units import format_seconds
    from pipeline.report.text import table_text

    if not jobs and not is_all:
        return f"There are no such jobs in {directory}."
    if not jobs:
        return f"There are no jobs in {directory}.\n  next:     python -m pipeline run job.yaml"
    rows = []
    for job in jobs:
        rows.append(_list_row(job, job["job"], format_seconds(job["age"])))
        rows += [_list_row(one, f"  {one['job'].removeprefix(job['job'])}", "") for one in job.get("children", ())]
    return table_text(["JOB", "STATUS", "AGE", "DONE", "ROWS", "OUTPUT"], rows)


def _list_row(job: dict[str, Any], name: str, age: str) -> list[str]:
    done = f"{job['partitions']['done']:,}/{job['partitions']['planned']:,}"
    return [name, job["status"], age, done, f"{job['rows']:,}", job["output"]]


@click.command(short_help="Show how a job stands.")
@job_argument
@directory_option
@output_options
def status(job: str, directory: str | None) -> None:
    """Show how a job stands: its id, a prefix of it, @last, or its directory."""
    from pipeline.report.text import summary_text

    details = status_details(_find(job, directory))
    emit(details, lambda: summary_text(details))


def status_details(job: JobDirectory) -> dict[str, Any]:
    """The report of a job that ended, else what its receipts say so far."""
    stored = job.read_report()
    if stored is not None and stored.get("status") == str(job.status()):
        return stored
    from pipeline.report.report import make_report

    return make_report(job).to_dict()


@click.command(short_help="Prove that every row was scored once.")
@job_argument
@click.option("--sample", type=click.IntRange(min=0), default=1000, show_default=True, help="Rows to score again.")
@click.option("--seed", type=int, help="Seed of the sample. Default: another sample every time.")
@directory_option
@output_options
@click.pass_context
def verify(context: click.Context, job: str, sample: int, seed: int | None, directory: str | None) -> None:
    """Prove from the receipts and the data that every row was scored once; score a sample again."""
    from pipeline.report.text import verification_text
    from pipeline.report.verify import verify as verify_job

    found = _find(job, directory)
    result = verify_job(found, sample=sample, seed=seed)
    checks = [asdict(check) for check in result.checks]
    emit(
        {"job": found.job, "ok": result.ok, "checks": checks},
        lambda: verification_text(found.job, ok=result.ok, checks=checks),
    )
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
    """Show the rows that could not be scored, by reason, the files that hold them, and input files set aside."""
    from pipeline.report.rejects import export, summarise
    from pipeline.report.text import rejects_text

    found = _find(job, directory)
    details = summarise(found, examples=limit, reason=reason).details()
    if path is not None:
        details["exported"] = {"path": path, "rows": export(found, path, reason=reason)}
    emit({"job": found.job, **details}, lambda: rejects_text(found.job, details))


@click.command(short_help="Show what differs between two jobs.")
@click.argument("before", metavar="JOB")
@click.argument("after", metavar="JOB")
@directory_option
@output_options
def diff(before: str, after: str, directory: str | None) -> None:
    """Show what differs between two jobs: spec, model, input files, rows, rejects by reason, times."""
    from pipeline.report.compare import compare, comparison_text

    found = compare(_find(before, directory), _find(after, directory))
    emit(found.details(), lambda: comparison_text(found))


def _find(job: str, directory: str | None) -> JobDirectory:
    from pipeline.jobs.listing import find_job

    return find_job(settings_for(directory=directory).directory, job)
