"""Run a job from plan to report. The command line, notebooks and servers all use this module.

Read it from top to bottom: `run` plans a job, `run_job` becomes its only driver, `drive_job` drives it to its end. At
the bottom, `probe_plan` (``plan --probe``) scores a few partitions and estimates the rest from them.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pipeline.common.secrets import masking_logs, redact_error
from pipeline.common.units import utc_now
from pipeline.driver.alias_change import pinned_versions
from pipeline.driver.chain import ChainDriver
from pipeline.driver.chain_retry import open_chain_retry
from pipeline.driver.driver import Driver
from pipeline.driver.fan_out import FanOutDriver, is_ready
from pipeline.driver.job_run import JobDriver, ParentContext
from pipeline.driver.outcome import check_superseded
from pipeline.driver.prepare import Prepared, first_sink, prepare
from pipeline.driver.retry import RetryRequest, open_retry
from pipeline.errors import InputError, JobLocked, SpecError
from pipeline.events import Callback
from pipeline.execution.clusters import cluster_of, settings_of
from pipeline.jobs.budget import set_budget
from pipeline.jobs.cancellation import on_signals, watch_for_cancel
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.lease import Lease
from pipeline.jobs.listing import find_job, parent_of
from pipeline.jobs.record import new_job_id
from pipeline.jobs.status import Status
from pipeline.plan.plan import Partition
from pipeline.report.build import make_report
from pipeline.report.estimate import Estimate, choose_sample, make_estimate, write_estimate
from pipeline.report.hooks import hooks_of, run_hooks
from pipeline.report.job_log import record_log
from pipeline.report.report import Report
from pipeline.scoring.steps import prepended_sys_path
from pipeline.settings import Settings
from pipeline.sinks import check_conditional_writes
from pipeline.spec.budget import Budget
from pipeline.spec.job_spec import JobSpec
from pipeline.storage.urls import own_storage_options

logger = logging.getLogger(__name__)


@own_storage_options()
def run(
    spec: JobSpec,
    *,
    settings: Settings | None = None,
    job_id: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Plan ``spec``, score every row, and publish.

    :param job_id: Id of the job. If a job with this id and the same plan exists, it is resumed. Default: a new id.
    :raises PipelineError: when the job failed or was interrupted. Its directory records why; `resume` continues it.
    """
    settings = settings or Settings.load()
    cluster = cluster_of(spec, settings=settings)
    cluster.preload(has_steps=bool(spec.maps))
    pinned = pinned_versions(spec, job=job_id, settings=settings) if spec.fan_out is None else {}
    prepared = prepare(spec, settings=settings, job=job_id or "", pins=pinned, cluster=cluster)
    check_conditional_writes(first_sink(prepared.plan))
    job = JobDirectory.open_or_create(
        settings.directory,
        prepared.plan,
        job=job_id or new_job_id(spec.name, now=utc_now(), entropy=secrets.token_hex(2)),
        options=JobOptions(import_paths=settings.import_paths, fsync=settings.fsync),
    )
    return run_job(job, settings=settings, callbacks=callbacks)


@own_storage_options()
def resume(
    job: str,
    *,
    budget: Budget | None = None,
    settings: Settings | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Resume an unfinished job. Completed partitions are not scored again. For a finished job, return its report.

    :param job: Id, unique prefix of an id, ``@last``, or the path of a job directory.
    :param budget: limits of all runs of the job from now on. Default: those that it has.
    """
    settings = settings or Settings.load()
    directory = find_job(settings.directory, job)
    directory.fsync = settings.fsync
    if budget is not None:
        set_budget(directory, budget)
    return run_job(directory, settings=settings, callbacks=callbacks)


@own_storage_options()
def retry(
    job: str,
    *,
    model: str | None = None,
    overrides: Sequence[str] = (),
    budget: Budget | None = None,
    settings: Settings | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Score what a job left out (rejected rows, pending partitions, repaired files) and publish it in one commit.

    :param job: Id, unique prefix of an id, ``@last``, or the path of a job directory.
    :param model: Model reference or file to score with. Default: the model used last.
    :param overrides: Such as ``steps.0.map=features:fixed``. Steps, contract and errors may be changed.
    :param budget: limits of all runs of the job from now on. Default: those that it has.
    :raises PipelineError: when it failed; ``retry`` or `resume` continues it.
    """
    settings = settings or Settings.load()
    directory = find_job(settings.directory, job)
    directory.fsync = settings.fsync
    if budget is not None:
        set_budget(directory, budget)
    request = RetryRequest(model, tuple(overrides))
    cluster_settings = settings_of(directory.plan.spec, settings=settings)
    _refuse_stage(directory)
    with _only_driver(directory, settings=cluster_settings) as (lease, hooks):
        if directory.record.stages:
            open_chain_retry(directory, request, settings=settings)
        else:
            open_retry(directory, request, epoch=lease.epoch, settings=settings)
        if directory.is_ended:
            return make_report(directory)
        report = drive_job(directory, lease, settings=cluster_settings, callbacks=callbacks, hooks=hooks)
    return _update_fan_out(directory, report, settings=cluster_settings)


@own_storage_options()
def run_job(
    job: JobDirectory,
    *,
    settings: Settings,
    callbacks: Sequence[Callback] = (),
    resume_cancelled: bool = True,
    parent: ParentContext | None = None,
) -> Report:
    """Become the only driver of ``job`` and drive it to its end. If it has ended, return its report.

    :param resume_cancelled: False: a cancelled job has ended, too.
    :param parent: Context of the fan-out whose driver runs ``job`` as a child, or of the job whose stage it is.
    :raises JobLocked: when another driver holds the job.
    :raises Fenced: when another driver took the job over meanwhile. This driver then changes nothing more.
    """
    if parent is None:
        _refuse_stage(job)
    if _is_done(job, resume_cancelled=resume_cancelled):
        return make_report(job)
    settings = settings_of(job.plan.spec, settings=settings)
    with _only_driver(job, settings=settings, parent=parent) as (lease, hooks):
        # Another driver may have ended the job while this one waited for the lease.
        if _is_done(job, resume_cancelled=resume_cancelled):
            return make_report(job)
        report = drive_job(job, lease, settings=settings, callbacks=callbacks, hooks=hooks, parent=parent)
    return report if parent is not None else _update_fan_out(job, report, settings=settings)


def _refuse_stage(job: JobDirectory) -> None:
    """Refuse to run one stage alone.

    :raises SpecError: if ``job`` is a stage.
    """
    if job.record.stage:
        raise SpecError(
            "a stage runs as a part of its job",
            where=job.root,
            found=f"stage {job.record.stage}",
            expected="the job whose stage it is",
            next_step=f"python -m pipeline resume {job.record.parent}",
        )


def _is_done(job: JobDirectory, *, resume_cancelled: bool) -> bool:
    return job.is_ended or (not resume_cancelled and job.status() is Status.CANCELLED)


@contextmanager
def _only_driver(
    job: JobDirectory, *, settings: Settings, parent: ParentContext | None = None
) -> Iterator[tuple[Lease, tuple[Callback, ...]]]:
    """Hold the lease of ``job`` inside the block, and run its hooks. The hooks of a child are those of its fan-out."""
    hooks = hooks_of(job.plan.spec, settings) if parent is None else ()
    with (
        run_hooks(job, hooks, grace=settings.hook_timeout) as hook_callbacks,
        job.hold(lease_seconds=settings.lease_seconds) as lease,
    ):
        check_superseded(job)
        yield lease, hook_callbacks


def drive_job(
    job: JobDirectory,
    lease: Lease,
    *,
    settings: Settings,
    callbacks: Sequence[Callback] = (),
    hooks: Sequence[Callback] = (),
    parent: ParentContext | None = None,
) -> Report:
    """Drive ``job`` to its end with `Driver`, `ChainDriver` or `FanOutDriver`, and record its log.

    :param lease: of ``job``, held by the caller.
    :param settings: with those of the chosen cluster's file; see `settings_of`.
    """
    with record_log(job.store, epoch=lease.epoch) as log:
        observers = (*callbacks, log, *hooks)
        driver: JobDriver
        parent = parent or ParentContext(publishes=job.record.publishes_itself)
        if job.record.children:
            driver = FanOutDriver(job, lease, settings, observers, run_child=run_job)
        elif job.record.stages:
            driver = ChainDriver(job, lease, settings, observers, parent, run_child=run_job)
        elif job.plan.dask is not None:
            driver = dask_stage_driver(job, lease, settings, observers, parent)
        else:
            driver = Driver(job, lease, settings, observers, parent)
        with _supervise(driver):
            return driver.drive()


def dask_stage_driver(
    job: JobDirectory, lease: Lease, settings: Settings, callbacks: tuple[Callback, ...], parent: ParentContext
) -> JobDriver:
    """Return the driver of a stage with a ``dask`` step."""
    from pipeline.driver.dask_stage import DaskStageDriver  # imports dask.dataframe, which takes seconds

    return DaskStageDriver(job, lease, settings, callbacks, parent)


@contextmanager
def _supervise(driver: JobDriver) -> Iterator[None]:
    """Record the driver as an event, forward signals and cancel requests to it, and record how it fails."""
    job, lease = driver.job, driver.lease
    job.events.append(
        "driver", epoch=lease.epoch, acquired=str(lease.acquired), host=lease.holder.host, pid=lease.holder.pid
    )
    try:
        with (
            masking_logs(),
            on_signals(driver.stop),
            watch_for_cancel(job.store, lease.epoch, driver.stop),
            prepended_sys_path(job.record.import_paths),
        ):
            yield
    except BaseException as error:
        masked = redact_error(error)
        if (fenced := lease.fenced_as_far_as_known()) is not None:
            raise fenced from masked
        driver.record_failure(masked)
        if masked is not error:
            raise masked from None
        raise


def _update_fan_out(job: JobDirectory, report: Report, *, settings: Settings) -> Report:
    """Update the fan-out of a child that was run alone. If all children are scored now, publish them.

    :returns: the report of ``job``. A job without a parent keeps ``report``.
    """
    if not job.record.parent:
        return report
    parent = parent_of(job)
    try:
        children = parent.children()
        if all(is_ready(child) for child in children) and not parent.is_ended:
            run_job(parent, settings=settings)
            return make_report(job)
        with parent.hold(lease_seconds=settings.lease_seconds) as lease:
            if all(child.is_ended for child in children):
                # A retry of one child gave it another manifest, which the next commit of the fan-out names.
                FanOutDriver(parent, lease, settings, (), run_child=run_job).commit(children)
            else:
                parent.write_report(make_report(parent).to_dict())
    except JobLocked:
        logger.info("the driver of %s will update its report", parent.id)
    return report


@own_storage_options()
def probe_plan(
    prepared: Prepared, *, settings: Settings, count: int, callbacks: Sequence[Callback] = ()
) -> tuple[str, Estimate]:
    """Create a job from ``prepared``, score ``count`` of its partitions, and store the estimate with it.

    The partitions stay done: `resume` scores only the others.

    :returns: the id of the job, and the estimate.
    :raises InputError: when there is no row to score.
    :raises SpecError: for a job of several stages: partitions of the first say nothing about the others.
    """
    plan = prepared.plan
    if plan.stages:
        raise SpecError(
            "a job with checkpoints cannot be probed: only its first stage is planned before it runs",
            where="steps",
            found=", ".join(f"steps {stage.slug}" for stage in plan.stages),
            expected="steps without a checkpoint",
            next_step="probe a job spec with the steps of the stage that takes longest",
        )
    if not plan.partitions:
        raise InputError(
            "there is nothing to probe", found="no row to score", next_step="look at source.path and source.filter"
        )
    check_conditional_writes(plan.spec.sink)
    job = JobDirectory.create(
        settings.directory,
        plan,
        job=new_job_id(plan.spec.name, now=utc_now(), entropy=secrets.token_hex(2)),
        options=JobOptions(import_paths=settings.import_paths, fsync=settings.fsync),
    )
    probe_job(job, choose_sample(plan.partitions, count=count), settings=settings, callbacks=callbacks)
    limits = prepared.limits
    estimate = make_estimate(
        plan,
        {receipt.partition: receipt for receipt in job.receipts.all()},
        workers=limits.workers,
        threads=limits.threads,
        start_seconds=make_report(job).seconds.provision,
        projected=plan.worker_memory(limits),
    )
    write_estimate(job, estimate)
    return job.id, estimate


def probe_job(
    job: JobDirectory, partitions: Sequence[Partition], *, settings: Settings, callbacks: Sequence[Callback] = ()
) -> None:
    """Score only ``partitions`` of ``job``. They stay done; the job is PLANNED afterwards.

    :raises JobLocked: when another driver holds the job.
    """
    with job.hold(lease_seconds=settings.lease_seconds) as lease:
        driver = Driver(job, lease, settings, tuple(callbacks), ParentContext(publishes=False))
        with _supervise(driver):
            driver.probe(partitions)
