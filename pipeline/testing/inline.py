"""Plan, score and publish a job in this process and thread with the real parts, without Dask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.driver.prepare import prepare
from pipeline.driver.stage_plan import plan_next_stage
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.manifest import Manifest
from pipeline.jobs.stages import SealedStage, commit_stages, create_stage, folder_name, sealed_stage
from pipeline.jobs.status import Status
from pipeline.plan.outline import outline
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


def seal_inline(plan: Plan, *, directory: Path, job: str, settings: Settings) -> tuple[JobDirectory, Manifest]:
    """Create a job with stages, run each of them in this process, and commit the job, without publishing."""
    options = JobOptions(fsync=False, import_paths=settings.import_paths)
    made = JobDirectory.open_or_create(directory, plan, job=job, options=options)
    sealed: list[SealedStage] = []
    for stage in outline(plan.spec):
        before = sealed[-1] if sealed else None
        planned = plan_next_stage(made.plan, stage, before, settings=settings)
        directory_of_stage = create_stage(made, folder_name(stage, before.first_digest if before else ""), planned)
        for partition in directory_of_stage.plan.partitions:
            score_partition(directory_of_stage.recipe, partition, planned.versions)
        directory_of_stage.manifests.commit(directory_of_stage.manifests.prepare(directory_of_stage.ledger()))
        done = sealed_stage(directory_of_stage, before)
        assert done is not None
        sealed.append(done)
    return made, commit_stages(made, sealed)


def publish_inline(job: JobDirectory) -> SinkContents:
    """Commit and publish a scored job; safe to repeat after a crash at any point of it."""
    committed = job.manifests.commit(job.manifests.prepare(job.ledger()))
    published = publish(committed.manifest, job)
    if not job.status().is_success:
        for status in (Status.PUBLISHING, Status.SUCCEEDED):
            job.set_status(status)
    return published
