"""`plan --probe`: score a few partitions of a job that is kept, and estimate the rest from them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from pipeline.common.units import utc_now
from pipeline.driver.prepare import Prepared
from pipeline.errors import InputError
from pipeline.events import Callback
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.record import new_job_id
from pipeline.report.estimate import Estimate, choose_sample, make_estimate, write_estimate
from pipeline.report.report import make_report
from pipeline.runner import probe
from pipeline.settings import Settings
from pipeline.sinks import prove


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
    prove(plan.spec.sink)
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
        start_seconds=make_report(job).seconds["provision"],
        projected=plan.worker_memory(limits),
    )
    write_estimate(job, estimate)
    return job.job, estimate
