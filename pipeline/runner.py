"""The one way through a job. `run`, `resume`, the command line and a notebook cell all go it.

`plan --probe`: score a few partitions of a job that is kept, and estimate the rest from them.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from pipeline.common.secrets import masking_logs, redact_error
from pipeline.common.units import utc_now
from pipeline.driver.alias_change import pinned_version
from pipeline.driver.driver import Driver, ParentContext
from pipeline.driver.fan_out import FanOutDriver, is_ready
from pipeline.driver.prepare import Prepared, first_sink, prepare
from pipeline.driver.retry import RetryRequest, open_retry
from pipeline.errors import InputError, JobLocked
from pipeline.events import Callback
from pipeline.execution.clusters import settings_of
from pipeline.jobs.cancellation import Stop, on_signals, watch_for_cancel
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import Lease, hold_lease
from pipeline.jobs.listing import find_job, parent_of
from pipeline.jobs.record import new_job_id
from pipeline.plan.plan import Partition
from pipeline.report.build import make_report
from pipeline.report.estimate import Estimate, choose_sample, make_estimate, write_estimate
from pipeline.report.hooks import hooks_of, run_hooks
from pipeline.report.job_log import record_log
from pipeline.report.report import Report
from pipeline.scoring.steps import prepended_sys_path
from pipeline.settings import Settings
from pipeline.sinks import check_conditional_writes
from pipeline.spec.job_spec import JobSpec

logger = logging.getLogger(__name__)
Ending = TypeVar("Ending")


def run(
    spec: JobSpec,
    *,
    settings: Settings | None = None,
    job_id: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Plan ``spec``, score every row, and publish.

    :param job_id: id for the job; one that exists with the same plan is gone on with. Default: a new one.
    :raises PipelineError: when the job failed or was interrupted; its directory says why and can be resumed.
    """
    settings = settings or Settings.load()
    pinned = pinned_version(spec, job=job_id, settings=settings) if spec.fan_out is None else None
    prepared = prepare(spec, settings=settings, job=job_id or "", version=pinned)
    check_conditional_writes(first_sink(prepared.plan))
    job = JobDirectory.open_or_create(
        settings.directory,
        prepared.plan,
        job=job_id or new_job_id(spec.name, now=utc_now(), entropy=secrets.token_hex(2)),
        import_paths=settings.import_paths,
        fsync=settings.fsync,
    )
    return execute(job, settings=settings, callbacks=callbacks)


def resume(job: str, *, settings: Settings | None = None, callbacks: Sequence[Callback] = ()) -> Report:
    """Go on with an unfinished job; what is done is not done again. A finished job gives its report.

    :param job: id, unique prefix of one, ``@last``, or the path of a job directory.
    """
    settings = settings or Settings.load()
    directory = find_job(settings.directory, job)
    directory.fsync = settings.fsync
    return execute(directory, settings=settings, callbacks=callbacks)


def retry(
    job: str,
    *,
    model: str | None = None,
    overrides: Sequence[str] = (),
    settings: Settings | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Score again what a job left out: rejected rows, undone partitions, mended files; heal its output in one commit.

    :param job: id, unique prefix of one, ``@last``, or the path of a job directory.
    :param model: a model reference or file to score them with. Default: what was used last.
    :param overrides: such as ``steps.0.map=features:mended``; steps, contract and errors may be changed.
    :raises PipelineError: when it failed; ``retry`` or `resume` goes on with it.
    """
    settings = settings or Settings.load()
    directory = find_job(settings.directory, job)
    directory.fsync = settings.fsync
    begin = partial(open_retry, wanted=RetryRequest(model, tuple(overrides)), settings=settings)
    return execute(directory, settings=settings, callbacks=callbacks, begin=begin)


def execute(
    job: JobDirectory,
    *,
    settings: Settings,
    callbacks: Sequence[Callback] = (),
    unless: Callable[[JobDirectory], bool] = lambda job: job.is_ended,
    begin: Callable[..., object] | None = None,
    within: ParentContext | None = None,
) -> Report:
    """Take ``job`` from where it is to its end, as its only driver.

    :param unless: whether there is nothing to do for this driver; its report is given then as it is.
    :param begin: what its driver does first, given its ``epoch``, such as to open a round; it may refuse to.
    :param within: of the fan-out whose driver drives it as a child.
    :raises JobLocked: when another driver is at work on it.
    :raises Fenced: when another one took it over meanwhile; this one then leaves everything as it is.
    """
    if begin is None and unless(job):
        return make_report(job)
    settings = settings_of(job.plan.spec, settings=settings)
    hooks = hooks_of(job.plan.spec, settings) if within is None else ()
    with (
        run_hooks(job, hooks, grace=settings.hook_timeout) as told,
        hold_lease(job.store, lease_seconds=settings.lease_seconds) as lease,
    ):
        if begin is not None:
            begin(job, epoch=lease.epoch)
        # Another driver may have ended the job while this one waited for it.
        if unless(job):
            return make_report(job)
        with record_log(job.store, epoch=lease.epoch) as log:
            driver = _driver(job, lease, settings, (*callbacks, log, *told), within)
            report = _drive(driver, driver.drive)
    return _add_up(job, report, settings) if job.record.parent and within is None else report


def _driver(
    job: JobDirectory, lease: Lease, settings: Settings, callbacks: tuple[Callback, ...], within: ParentContext | None
) -> Driver | FanOutDriver:
    def drive_child(child: JobDirectory, within: ParentContext, callbacks: Sequence[Callback]) -> Report:
        return execute(child, settings=settings, callbacks=callbacks, within=within)

    if job.record.children:
        return FanOutDriver(job, lease, settings, callbacks, drive_child)
    return Driver(job, lease, settings, callbacks, within or ParentContext(Stop(), None, job.record.publishes))


def _add_up(child: JobDirectory, report: Report, settings: Settings) -> Report:
    """The report of a child that was driven alone, once its fan-out has taken note. If it was the last that the others
    waited for, all are published now."""
    parent = parent_of(child)
    try:
        if all(is_ready(one) for one in parent.children()):
            execute(parent, settings=settings)
            return make_report(child)
        with hold_lease(parent.store, lease_seconds=settings.lease_seconds):
            parent.write_report(make_report(parent).to_dict())
    except JobLocked:
        logger.info("the driver of %s takes note of what became of its children", parent.job)
    return report


def probe(
    job: JobDirectory, partitions: Sequence[Partition], *, settings: Settings, callbacks: Sequence[Callback] = ()
) -> None:
    """Score ``partitions`` of ``job`` and no more. They stay done; the job is PLANNED afterwards, and `resume` goes on.

    :raises JobLocked: when another driver is at work on it.
    """
    with hold_lease(job.store, lease_seconds=settings.lease_seconds) as lease:
        driver = Driver(job, lease, settings, tuple(callbacks), ParentContext(Stop(), None, False))
        _drive(driver, lambda: driver.probe(partitions))


def _drive(driver: Driver | FanOutDriver, go: Callable[[], Ending]) -> Ending:
    job, lease = driver.job, driver.lease
    job.append_event("driver", epoch=lease.epoch, taken=str(lease.taken), host=lease.holder.host, pid=lease.holder.pid)
    try:
        with (
            masking_logs(),
            on_signals(driver.stop),
            watch_for_cancel(job.store, lease.epoch, driver.stop),
            prepended_sys_path(job.record.import_paths),
        ):
            return go()
    except BaseException as error:
        masked = redact_error(error)
        if (fenced := driver.lease.fenced_as_far_as_known()) is not None:
            raise fenced from masked
        driver.give_up(masked)
        if masked is not error:
            raise masked from None
        raise


def probe_plan(
    prepared: Prepared, *, settings: Settings, count: int, callbacks: Sequence[Callback] = ()
) -> tuple[str, Estimate]:
    """Make a job of ``prepared``, score ``count`` of its partitions (they stay done), and store the estimate with it.

    :returns: the id of the job, and the estimate.
    :raises InputError: when there is no row to score.
    """
    plan = prepared.plan
    if not plan.partitions:
        raise InputError(
            "there is nothing to probe", found="no row to score", next_step="look at source.path and source.filter"
        )
    check_conditional_writes(plan.spec.sink)
    job = JobDirectory.create(
        settings.directory,
        plan,
        job=new_job_id(plan.spec.name, now=utc_now(), entropy=secrets.token_hex(2)),
        import_paths=settings.import_paths,
        fsync=settings.fsync,
    )
    probe(job, choose_sample(plan.partitions, count=count), settings=settings, callbacks=callbacks)
    limits = prepared.limits
    estimate = make_estimate(
        plan,
        {receipt.partition: receipt for receipt in job.receipts()},
        workers=limits.workers,
        threads=limits.threads,
        start_seconds=make_report(job).seconds.provision,
        projected=plan.worker_memory(limits),
    )
    write_estimate(job, estimate)
    return job.job, estimate
