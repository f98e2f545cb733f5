"""``submit`` and ``cancel``: jobs in the background."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.cli.options import (
    cluster_options,
    directory_option,
    emit,
    is_quiet,
    load,
    not_empty,
    output_options,
    override_option,
    settings_for,
)
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.execution.clusters.batch_systems import Slurm
    from pipeline.service.submit import SubmitResult
    from pipeline.settings import Settings
    from pipeline.spec.job_spec import JobSpec


@click.command(short_help="Run a job in the background.")
@click.argument("job_file", metavar="JOB.YAML")
@click.option("--job", "job_id", metavar="ID", callback=not_empty, help="Id of the job, if it is new.")
@click.option("--force", is_flag=True, help="Start a new job even if one exists for the same spec, input and model.")
@click.option(
    "--key",
    metavar="TEXT",
    callback=not_empty,
    help="Deduplication key of the submission. Default: spec, input and model.",
)
@click.option(
    "--priority", type=int, default=0, show_default=True, help="Priority in the queue of serve; higher starts first."
)
@click.option("--queue", is_flag=True, help="Start no driver; queue the job for serve.")
@click.option(
    "--driver",
    type=click.Choice(["process", "batch"]),
    default="process",
    show_default=True,
    help="Run the driver as a process of this machine, or as a batch job of Slurm that outlives its walltime.",
)
@override_option
@cluster_options
@directory_option
@output_options
def submit(
    job_file: str,
    *,
    job_id: str | None,
    force: bool,
    key: str | None,
    priority: int,
    queue: bool,
    driver: str,
    overrides: tuple[str, ...],
    params: tuple[str, ...],
    **flags: str | int | None,
) -> None:
    """Plan and check a job, start it in the background, and print its id. It survives the terminal."""
    from pipeline.service.submit import submit as submit_job

    loaded = load(job_file, overrides=overrides, params=params)
    settings = settings_for(loaded, **flags)
    cluster = _batch_system(loaded.spec, settings) if driver == "batch" else None
    try:
        result = submit_job(
            loaded.spec,
            settings=settings,
            key=key,
            force=force,
            job_id=job_id,
            priority=priority,
            start=not queue and cluster is None,
        )
    except PipelineError as error:
        from pipeline.jobs.refusals import record_refusal

        record_refusal(settings.directory, loaded.spec.name, error)
        raise
    if cluster is not None and not queue and (result.is_new or result.is_resumed):
        from pipeline.jobs.directory import JobDirectory
        from pipeline.service.batch_driver import submit_batch_driver

        started = submit_batch_driver(JobDirectory.open(result.directory), cluster)
        if not is_quiet():
            click.echo(f"batch job {started.id} drives it; its output: {started.output}", err=True)
    tell_submitted(result, is_queued=queue)


def _batch_system(spec: JobSpec, settings: Settings) -> Slurm:
    """Return the batch system that runs the driver.

    :raises SpecError: for a cluster that cannot.
    """
    from pipeline.execution.clusters import cluster_of
    from pipeline.service.batch_driver import check_batch_driver

    return check_batch_driver(cluster_of(spec, settings=settings))


def tell_submitted(result: SubmitResult, *, is_queued: bool = False) -> None:
    """Print the id to stdout, and the details to stderr."""
    details = {
        "job": result.job,
        "status": str(result.status),
        "new": result.is_new,
        "resumed": result.is_resumed,
        "directory": result.directory,
    }
    if not is_quiet():
        click.echo(_submit_text(result, is_queued=is_queued), err=True)
    emit(details, lambda: result.job)


def _submit_text(result: SubmitResult, *, is_queued: bool) -> str:
    """The details of a submission, without the id."""
    if result.status.is_success:
        message = f"that job exists already and ended as {result.status}; --force makes a new one"
    elif result.is_new:
        message = "submitted" + (", for a server to take" if is_queued else "")
    elif result.is_resumed:
        message = "that job exists and had not succeeded; it is resumed"
    else:
        message = f"that job exists already and is {result.status}"
    return f"{message}\n  next:     python -m pipeline watch {result.job}"


@click.command(short_help="Cancel a job; servers will not restart it.")
@click.argument("job", default="@last")
@click.option("--now", is_flag=True, help="Do not wait for running partitions.")
@click.option("--reason", metavar="TEXT", default="", help="Reason, kept with the job.")
@directory_option
@output_options
def cancel(job: str, now: bool, reason: str, directory: str | None) -> None:
    """Cancel a job: its driver starts no more partitions and publishes nothing. resume can still continue it."""
    from pipeline.driver.outcome import cancel_job
    from pipeline.jobs.cancellation import CancelOutcome
    from pipeline.jobs.listing import find_job

    settings = settings_for(directory=directory)
    target = find_job(settings.directory, job)
    outcome = cancel_job(target, now=now, reason=reason, lease_seconds=settings.lease_seconds)
    status = str(target.status())
    texts = {
        CancelOutcome.CANCELLED: f"{target.id} is cancelled",
        CancelOutcome.ASKED: f"the driver of {target.id} was asked to stop"
        f"\n  next:     python -m pipeline wait {target.id}",
        CancelOutcome.ENDED: f"{target.id} had ended already: {status}",
        CancelOutcome.PUBLISHED: f"{target.id} had published its output already: {status}",
        CancelOutcome.COMMITTED: f"{target.id} has committed its output and cannot be cancelled"
        f"\n  next:     python -m pipeline resume {target.id}",
    }
    emit({"job": target.id, "outcome": str(outcome), "status": status}, lambda: texts[outcome])
