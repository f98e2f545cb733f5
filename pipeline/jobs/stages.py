"""Stages of a job on disk: a job directory each, named by its steps and by the manifest that it reads.

::

    steps/0-1/            the stage of steps 0 and 1, which reads the source
    steps/3-9f3c2a1b/     the stage of step 3, which reads the files of the manifest with this digest

Other files to read are thus another directory. A stage is sealed once its manifest names the rows of all its rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pipeline.common.digest import digest_bytes
from pipeline.common.rows import RowCounts
from pipeline.common.units import iso_time, utc_now
from pipeline.errors import ReconciliationFailed
from pipeline.jobs import layout
from pipeline.jobs.code_archive import copy_sources
from pipeline.jobs.directory import DEFAULT_OPTIONS, JobDirectory, JobOptions
from pipeline.jobs.manifest import Manifest, ManifestFile, ManifestModel, reconcile
from pipeline.jobs.record import child_id
from pipeline.plan.outline import Stage, outline
from pipeline.plan.plan import Plan
from pipeline.plan.stages import SealedInput
from pipeline.storage.store import open_store

_DIGITS = 8
"""Digits of a digest in the name of a stage's folder."""


@dataclass(frozen=True)
class SealedStage:
    """A stage whose rows are all done, and named by a manifest."""

    name: str
    """Folder of the stage below ``steps``."""
    job: JobDirectory
    number: int
    """Number of the manifest."""
    digest: str
    """SHA-256 of the manifest's file."""
    first_digest: str
    """SHA-256 of the file of manifest 1, which a retry does not change."""
    manifest: Manifest

    def digest_for(self, stage: Stage) -> str:
        """Return the digest that names the folder of the next stage. A ``dask`` step makes all its rows anew."""
        return self.digest if stage.kind == "dask" else self.first_digest

    @property
    def input(self) -> SealedInput:
        """The manifest, as the plan of the next stage names it."""
        return SealedInput(self.name, self.number, self.digest)

    def paths(self) -> tuple[str, ...]:
        """Return the absolute path or URL of each data file, in the order of the rows."""
        return tuple(self.job.store.url(file.name) for file in self.manifest.files)


@dataclass(frozen=True)
class StageState:
    """A stage of a job, as far as it got."""

    stage: Stage
    name: str
    """Folder of the stage below ``steps``; empty while the stage before it has no manifest."""
    job: JobDirectory | None
    """Its directory; None before it is planned."""
    sealed: SealedStage | None
    """None while rows are left to do: its own, or those that the stage before has added."""


def stage_states(job: JobDirectory) -> tuple[StageState, ...]:
    """Return the stages of a job, in order; empty for a job without stages."""
    if not job.record.stages:
        return ()
    states: list[StageState] = []
    first, before = "", None
    for stage in outline(job.plan.spec):
        digest = before.digest_for(stage) if before is not None else "" if stage.kind == "dask" else first
        name = "" if stage.number and not digest else folder_name(stage, digest)
        directory = find_stage(job, name) if name else None
        sealed = None
        if directory is not None and (before is not None or not stage.number):
            sealed = sealed_stage(directory, before)
        states.append(StageState(stage, name, directory, sealed))
        first = _digest_of(directory, 1) if directory is not None and 1 in directory.manifests.numbers() else ""
        before = sealed
    return tuple(states)


@dataclass(frozen=True)
class Progress:
    """Partitions and rows of a job, over all its stages."""

    partitions: int
    """Planned partitions; estimated for stages that are not planned yet."""
    done: int
    rows: int
    """Rows into all stages; as many as into the first for stages that are not planned yet."""
    rows_pending: int

    @property
    def left(self) -> int:
        """Partitions that are not done."""
        return self.partitions - self.done


def progress_of(job: JobDirectory) -> Progress:
    """Return how far a job without children got, with or without stages."""
    states = [state for state in stage_states(job) if state.job is not None]
    ledgers = [state.job.ledger() for state in states if state.job] if job.record.stages else [job.ledger()]
    planned, done = sum(ledger.planned for ledger in ledgers), sum(len(ledger.done) for ledger in ledgers)
    pending = sum(partition.rows for ledger in ledgers for partition in ledger.todo)
    rows = sum(partition.rows for ledger in ledgers for partition in ledger.base.plan.partitions)
    later = job.plan.stages[len(states) :]
    own = sum(partition.rows for partition in job.plan.partitions) * len(later)
    return Progress(planned + sum(stage.partitions for stage in later), done, rows + own, pending + own)


def output_rows(job: JobDirectory) -> int:
    """Return the rows of the output of a job without children: of the last stage, if it has stages."""
    if not job.record.stages:
        return job.ledger().rows.output
    last = stage_states(job)[-1].job
    return last.ledger().rows.output if last is not None else 0


def is_done(job: JobDirectory) -> bool:
    """Return True if no row of a job without children is left to do, in any stage."""
    if job.record.stages:
        return all(state.sealed is not None for state in stage_states(job))
    return not job.ledger().todo


def folder_name(stage: Stage, first_digest: str) -> str:
    """Return the name of a stage's folder.

    :param first_digest: SHA-256 of manifest 1 of the stage before; empty for the first stage.
    """
    return f"{stage.slug}-{first_digest[:_DIGITS]}" if stage.number else stage.slug


def find_stage(job: JobDirectory, name: str) -> JobDirectory | None:
    """Return the job directory of a stage; None before it is planned."""
    store = open_store(job.store.url(layout.stage_folder(name)), private=True, fsync=job.fsync)
    return JobDirectory.open(store.root, store=store, fsync=job.fsync) if store.exists(layout.JOB_FILE) else None


def create_stage(job: JobDirectory, name: str, plan: Plan) -> JobDirectory:
    """Create the job directory of a stage inside that of its job. Concurrent callers all get the same one."""
    store = open_store(job.store.url(layout.stage_folder(name)), private=True, fsync=job.fsync)
    copy_sources(job.store, store, plan)
    return JobDirectory.create(
        "",
        plan,
        job=child_id(job.id, name),
        store=store,
        options=JobOptions(
            working_directory=job.record.working_directory,
            import_paths=job.record.import_paths,
            fsync=job.fsync,
            first_status=DEFAULT_OPTIONS.first_status,
            reason="the stage before it is sealed" if plan.role and plan.role.number else DEFAULT_OPTIONS.reason,
            parent=job.record,
            stage=name,
        ),
    )


def sealed_stage(job: JobDirectory, before: SealedStage | None) -> SealedStage | None:
    """Return a stage with its manifest; None while rows are left to do.

    :param before: the stage whose files it reads; None for the first stage.
    """
    manifest = job.committed()
    if manifest is None:
        return None
    if before is not None and before.input not in manifest.inputs:
        return None
    first, last = _digest_of(job, 1), _digest_of(job, manifest.number)
    return SealedStage(job.record.stage, job, manifest.number, last, first, manifest)


def _digest_of(job: JobDirectory, number: int) -> str:
    return digest_bytes(job.store.read(layout.manifest_path(number)))


def commit_stages(job: JobDirectory, stages: Sequence[SealedStage]) -> Manifest:
    """Commit the manifest of a job whose stages are all sealed: the files of the last one, the rejects of all.

    If the last manifest names the same, it is returned.

    :raises ReconciliationFailed: when the rows of the stages do not add up.
    """
    manifests = [stage.manifest for stage in stages]
    for before, after in pairwise(stages):
        if before.manifest.rows.output != after.manifest.rows.input:
            raise ReconciliationFailed(
                "the rows of two stages do not add up; nothing was published",
                where=f"job {job.id}",
                found=f"{before.manifest.rows.output:,} out of {before.name}, {after.manifest.rows.input:,} into "
                f"{after.name}",
                expected="as many",
                next_step="this is a defect of this package, not of your data: keep the job directory and report it",
            )
    rows = chain_rows([manifest.rows for manifest in manifests])
    files = tuple(_within(stages[-1], file) for file in manifests[-1].files)
    rejects = tuple(_within(stage, file) for stage in stages for file in stage.manifest.rejects)
    reconcile(rows, files=files, rejects=rejects)
    reasons: dict[str, int] = {}
    for manifest in manifests:
        for reason, count in manifest.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    plan, last = job.plan, job.manifests.last()
    manifest = Manifest(
        number=last.number if last else 1,
        job=job.id,
        plan=job.record.plan,
        model=ManifestModel(**plan.model_details),
        schema=plan.output_schema.hex(),
        files=files,
        rejects=rejects,
        rows=rows,
        created=iso_time(utc_now()),
        reasons=dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
        quarantined_files=manifests[0].quarantined_files,
        inputs=tuple(stage.input for stage in stages),
    )
    if last is not None:
        if manifest.is_same_output(last):
            return last
        manifest = replace(manifest, number=last.number + 1)
    return job.manifests.commit(manifest).manifest


def chain_rows(rows: Sequence[RowCounts]) -> RowCounts:
    """Return the counts of a job from those of its stages, in order: into the first, out of the last."""
    rejected, filtered = sum(one.rejected for one in rows), sum(one.filtered for one in rows)
    return RowCounts(rows[0].input, rows[-1].output, rejected, filtered, sum(one.made for one in rows))


def _within(stage: SealedStage, file: ManifestFile) -> ManifestFile:
    """Return a file of a stage with its path in the directory of the job."""
    return replace(file, name=f"{layout.stage_folder(stage.name)}/{file.name}")
