"""Plan, score and publish a job in this process and thread with the real parts, without Dask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.driver.prepare import prepare
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.status import Status
from pipeline.plan.plan import Plan
from pipeline.scoring.partition import score_partition
from pipeline.settings import Settings
from pipeline.sinks import SinkContents, publish
from pipeline.spec.job_spec import JobSpec


def plan_inline(spec: JobSpec, *, directory: Path, import_paths: Sequence[str] = ()) -> Plan:
    """Return the plan of a job under ``directory``, for one worker with one thread.

    :param import_paths: folders of the modules of its steps and models.
    """
    settings = Settings(directory=str(directory), workers=1, threads=1, fsync=False, import_paths=tuple(import_paths))
    return prepare(spec, settings=settings).plan


def score_inline(plan: Plan, *, directory: Path, job: str) -> JobDirectory:
    """Create a job and score all its partitions, without publishing."""
    made = JobDirectory.open_or_create(directory, plan, job=job, options=JobOptions(fsync=False))
    for partition in plan.partitions:
        score_partition(made.recipe, partition, plan.versions)
    return made


def publish_inline(job: JobDirectory) -> SinkContents:
    """Commit and publish a scored job; safe to repeat after a crash at any point of it."""
    committed = job.manifests.commit(job.manifests.prepare(job.ledger()))
    published = publish(committed.manifest, job)
    if not job.status().is_success:
        for status in (Status.PUBLISHING, Status.SUCCEEDED):
            job.set_status(status)
    return published
