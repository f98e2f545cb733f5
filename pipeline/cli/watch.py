"""``watch``, ``wait`` and ``logs``: follow a job that another process drives."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from pipeline.cli.inspect import current_report, job_argument
from pipeline.cli.options import directory_option, emit, is_quiet, output_options, settings_for, wants_json
from pipeline.cli.run import WARNED, strict_option
from pipeline.cli.terminal import relay_if_shown

if TYPE_CHECKING:
    from pipeline.jobs.directory import JobDirectory
    from pipeline.jobs.status import Status
    from pipeline.service.logs import LogLine

TIMED_OUT = 124
"""Exit status when the job has not ended in time, as for timeout(1)."""


@click.command(short_help="Show the progress of a job until it ends.")
@job_argument
@strict_option
@directory_option
@output_options
def watch(job: str, strict: bool, directory: str | None) -> None:
    """Show the progress of a job that another process drives, then its report; exit with its exit code."""
    from pipeline.events import notify
    from pipeline.report.progress import show_progress
    from pipeline.service.follow import EndMonitor, Follower, pause_for

    job_directory, lease_seconds = _find(job, directory)
    follower, ending = Follower(job_directory), EndMonitor(job_directory, lease_seconds)
    with relay_if_shown() as relay, show_progress(quiet=is_quiet(), on_live=relay.print_with) as callbacks:
        _say_if_nobody_serves(job_directory)
        while True:
            # First the status: what has come before it is told before the end.
            status = ending.poll()
            for event in follower.poll():
                notify(callbacks, event)
            if status is not None:
                break
            time.sleep(pause_for(job_directory))
    _end(job_directory, status, strict=strict)


@click.command(short_help="Wait until a job ends.")
@job_argument
@click.option(
    "--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Stop waiting after this time and exit with 124."
)
@strict_option
@directory_option
@output_options
@click.pass_context
def wait(context: click.Context, job: str, timeout: float | None, strict: bool, directory: str | None) -> None:
    """Wait until a job ends, and print its report; exit with its exit code, or 124 after --timeout."""
    from pipeline.service.follow import EndMonitor

    job_directory, lease_seconds = _find(job, directory)
    _say_if_nobody_serves(job_directory)
    try:
        status = EndMonitor(job_directory, lease_seconds).wait(timeout=timeout)
    except TimeoutError as error:
        message = str(error)
        emit({"job": job_directory.id, "status": str(job_directory.status()), "timed_out": True}, lambda: message)
        context.exit(TIMED_OUT)
    _end(job_directory, status, strict=strict)


@click.command(short_help="Show the events and log of a job.")
@job_argument
@click.option("-f", "--follow", is_flag=True, help="Keep showing new lines until the job ends.")
@click.option("--partition", metavar="P", default="", help="Only lines about this partition and its parts.")
@click.option("--errors", is_flag=True, help="Only warnings and errors.")
@directory_option
@output_options
def logs(job: str, follow: bool, partition: str, errors: bool, directory: str | None) -> None:
    """Show the events of a job and the log of its drivers. With -f, --json prints one object per line."""
    from pipeline.service.follow import EndMonitor, pause_for
    from pipeline.service.logs import LogReader

    job_directory, lease_seconds = _find(job, directory)
    reader = LogReader(job_directory, partition=partition, errors=errors)
    if not follow:
        lines = [*reader.read(), *reader.receipts()]
        emit(
            {"job": job_directory.id, "lines": [line.to_dict() for line in lines]},
            lambda: _text(lines, job_directory.id),
        )
        return
    ending = EndMonitor(job_directory, lease_seconds)
    while True:
        status = ending.poll()
        _print_lines(reader.read())
        if status is not None:
            return
        time.sleep(pause_for(job_directory))


def _find(job: str, directory: str | None) -> tuple[JobDirectory, float]:
    from pipeline.jobs.listing import find_job

    settings = settings_for(directory=directory)
    return find_job(settings.directory, job), settings.lease_seconds


def _text(lines: list[LogLine], job: str) -> str:
    return "\n".join(line.text() for line in lines) or f"no matching lines in the log of {job}"


def _print_lines(lines: list[LogLine]) -> None:
    import json

    for line in lines:
        click.echo(json.dumps(line.to_dict()) if wants_json() else line.text())


def _say_if_nobody_serves(job: JobDirectory) -> None:
    """Warn if the job is queued and no server runs: it would wait forever."""
    from pipeline.common.units import utc_now
    from pipeline.jobs.status import Status
    from pipeline.service.queue import LeaseWatch, view_job
    from pipeline.service.servers import is_served
    from pipeline.storage.store import open_store

    if is_quiet() or job.status() is not Status.QUEUED:
        return
    view = view_job(job, LeaseWatch(), now=utc_now())
    if (
        view is not None
        and not view.is_driven
        and not is_served(open_store(job.root.rpartition("/")[0]), now=utc_now())
    ):
        click.echo("the job is queued, but no server runs: python -m pipeline serve", err=True)


def _end(job: JobDirectory, status: Status, *, strict: bool) -> None:
    """Print the report, and exit with the exit code of the job."""
    from pipeline.jobs.status import Status
    from pipeline.service.queue import exit_code

    report = current_report(job)
    emit(report.to_dict(), report.text)
    code = WARNED if strict and report.status is Status.SUCCEEDED_WITH_WARNINGS else exit_code(job, status)
    if code:
        raise click.exceptions.Exit(code)
