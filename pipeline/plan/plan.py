"""The types of a plan: `Plan`, its `Partition`s, and the `Limits` of the cluster."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline.common.digest import digest_json
from pipeline.common.rows import Fragment, InputFile, QuarantinedFile
from pipeline.common.step_code import StepCode, digests_of
from pipeline.common.text import listed
from pipeline.common.units import format_bytes, plural
from pipeline.errors import InsufficientMemory
from pipeline.models.model import ModelVersion, joint_digest
from pipeline.models.record import model_identity
from pipeline.plan.dask_recipe import DaskWork
from pipeline.plan.incremental import FULL_INPUT, IncrementalState
from pipeline.plan.memory import MIN_BATCH_ROWS, MOST_GROUP_BYTES, USABLE, shared_memory
from pipeline.plan.pushdown import read_source
from pipeline.plan.recipe import ColumnRule, MapRecipe, ScoreRecipe, StageRecipe, StepRecipe, scores_of
from pipeline.plan.stages import PlannedStage, StageRole
from pipeline.plan.step_record import step_identity
from pipeline.sources.versions import content_version
from pipeline.spec.job_spec import JobSpec


@dataclass(frozen=True, slots=True)
class Partition:
    """The unit of work: one Dask partition, one task, one checkpoint file."""

    id: str
    """Five digits in source order, ``00042``. Parts of a split partition append ``.0``, ``.1``, …."""
    fragments: tuple[Fragment, ...]

    @property
    def rows(self) -> int:
        """Rows of the fragments; a row filter may drop some of them."""
        return sum(fragment.rows for fragment in self.fragments)

    @property
    def bytes(self) -> int:
        """Uncompressed bytes of the columns that the job reads."""
        return sum(fragment.bytes for fragment in self.fragments)


@dataclass(frozen=True)
class Limits:
    """The limits of the cluster that planning uses."""

    workers: int
    threads: int
    """Threads per worker."""
    memory: int
    """Bytes per worker; 0 means no limit."""


@dataclass(frozen=True)
class ChildPlan:
    """One child in the plan of a fan-out."""

    slug: str
    """Name of the child's folder, and end of its job id."""
    value: str | int | float | bool | None
    matching: int | None
    """Rows of the source that have the value; None if the values are a list."""
    rows: int
    """Rows of the child's input files."""
    partitions: int
    work_digest: str
    """`Plan.work_digest` of the child's plan."""
    plan_digest: str
    """`Plan.digest` of the child's plan."""
    plan: Plan | None = field(default=None, repr=False, compare=False)
    """The child's plan while the fan-out is planned; later it is read from the child's own directory."""

    @property
    def planned(self) -> Plan:
        """The child's plan, available only while the fan-out is planned."""
        if self.plan is None:
            raise ValueError(f"the plan of child {self.slug} is in its own directory")
        return self.plan

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for storage and JSON output, without the plan."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "plan"}


@dataclass(frozen=True)
class Plan:
    """A job spec, a model version and input files, cut into partitions."""

    spec: JobSpec
    model: ModelVersion
    """Model of the first ``score`` step; `NO_MODEL` for a job that only prepares data."""
    files: tuple[InputFile, ...]
    partitions: tuple[Partition, ...]
    """Partitions in source order. Every wanted row of every file is in exactly one of them."""
    source_columns: tuple[str, ...]
    """Physical columns that are read."""
    source_schema: bytes
    """Arrow schema (IPC) of a source batch: physical columns and hive keys."""
    output_schema: bytes
    """Arrow schema (IPC) of the output."""
    source_rules: tuple[ColumnRule, ...]
    score_rules: tuple[ColumnRule, ...]
    features: tuple[str, ...]
    keep: tuple[str, ...]
    outputs: tuple[str, ...]
    batch_rows: int
    """Rows of a batch to start with."""
    pruned_rows: int
    """Rows of row groups that the filter drops, as statistics prove; they count as filtered."""
    task_memory: int
    """Projected peak bytes of one task, process and model included."""
    batch_bytes: int = 0
    """Limit for the decoded bytes of a batch, however many rows it has; 0: no limit."""
    device_batch_rows: int = 0
    """Rows of a batch where a GPU scores; 0: as on CPUs."""
    row_bytes_out: int = 0
    """Estimated bytes of an uncompressed row of the output."""
    row_group_rows: int = 1 << 20
    """Rows per row group of the output."""
    row_group_bytes: int = MOST_GROUP_BYTES
    """Limit for the decoded bytes of a row group of the output, however many rows it has."""
    workers: int = 1
    """Number of worker processes at planning time. The number changes no row, so no digest includes it."""
    can_use_tree_engine: bool = False
    """True if workers may start the tree engine; ``task_memory`` then includes it. No digest includes this field."""
    quarantined_files: tuple[QuarantinedFile, ...] = ()
    """Quarantined files of the source, sorted by path; none of them is in ``files``."""
    children: tuple[ChildPlan, ...] = ()
    """Children of a fan-out; its own plan has no files and no partitions."""
    progress: IncrementalState = FULL_INPUT
    """Published state that an incremental plan continues from."""
    code: tuple[StepCode, ...] = ()
    """Code of the modules of the ``map`` steps; empty without such steps, and for a fan-out."""
    sources: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """Python sources of ``code`` by SHA-256, until the plan is stored; a stored plan has none."""
    never_null: tuple[str, ...] = ()
    """Columns of the source without nulls in all planned row groups, as their statistics say; only with map steps."""
    frame_schemas: tuple[bytes, ...] = ()
    """Arrow schema (IPC) after each map step, equal for all batches."""
    chain: tuple[StepRecipe, ...] = ()
    """Resolved steps of a spec that is not plain (`JobSpec.is_plain`); then ``model`` and ``features`` are those of the
    first score, and ``score_rules`` and ``frame_schemas`` are empty. Empty for a plain spec."""

    model_bytes: int = 0
    """Bytes of the model files that a worker holds at a time, if there are models by key; 0: all."""
    stages: tuple[PlannedStage, ...] = ()
    """Stages of a job with checkpoints between its steps; partitions and memory are then those of the first. Empty for
    any other job, and for a stage."""
    dask: DaskWork | None = None
    """Work of a stage with a ``dask`` step; its partitions have no fragments. None for any other plan."""
    role: StageRole | None = None
    """Place of a stage in its job; None for a job."""

    @property
    def rows(self) -> int:
        """All rows of the input, including filtered ones."""
        return sum(file.rows for file in self.files) + sum(child.rows for child in self.children)

    @property
    def is_plain(self) -> bool:
        """True if the plan has no ``chain``, because its spec needs none; see `JobSpec.is_plain`."""
        return self.role is None and self.spec.is_plain

    @property
    def scores(self) -> tuple[ScoreRecipe, ...]:
        """Recipes of the models, in order; those of a step with several one by one."""
        return (self._score_recipe(),) if self.is_plain else scores_of(self.chain)

    @property
    def score_models(self) -> tuple[ModelVersion, ...]:
        """Model version of each model reference of the spec, in order."""
        return (self.model,) if self.is_plain else tuple(score.model for score in self.scores)

    @property
    def models(self) -> tuple[ModelVersion, ...]:
        """Distinct model versions of the ``score`` steps, in order."""
        return tuple(dict.fromkeys(self.score_models))

    @property
    def pins(self) -> dict[str, ModelVersion]:
        """Pinned version of each model reference in the spec; none where the children of a fan-out list models."""
        if self.spec.has_listing:
            return {}
        return dict(zip(self.spec.references, self.score_models, strict=True))

    @property
    def flavors(self) -> tuple[str, ...]:
        """Distinct flavors of the models."""
        return tuple(dict.fromkeys(version.flavor for version in self.models))

    @property
    def model_digest(self) -> str:
        """Digest of the models; see `pipeline.models.model.joint_digest`."""
        return joint_digest(self.models)

    @property
    def model_details(self) -> dict[str, str]:
        """Name, version and digest of the model version; of several, names and versions in order; "" without any."""
        names, versions = (listed([getattr(one, key) for one in self.models]) for key in ("name", "version"))
        return {"name": names, "version": versions, "digest": self.model_digest}

    @property
    def tolerance(self) -> float:
        """Largest tolerance of a ``score`` step."""
        return max((score.tolerance for score in self.spec.scores), default=0.0)

    @property
    def frames(self) -> tuple[pa.Schema, ...]:
        """Schema after each map step."""
        return tuple(pa.ipc.read_schema(pa.py_buffer(schema)) for schema in self.frame_schemas)

    @cached_property
    def versions(self) -> dict[str, tuple[int, str]]:
        """Size and version of each file by path. Workers check both before and after reading."""
        return {file.path: (file.size, file.version) for file in self.files}

    @cached_property
    def work_digest(self) -> str:
        """SHA-256 over the work, without partitions: spec, model, files, columns and rules.

        Plans for clusters of different sizes have the same work digest, but different values of `digest`. The code of
        the steps is not part of it: ``step_change`` decides about a job whose code changed.
        """
        seen = hashlib.sha256()
        for file in self.files:
            groups = [(group.rows, group.selected) for group in file.row_groups]
            seen.update(
                json.dumps([file.path, file.size, content_version(file.version), file.hive_keys, groups]).encode()
                + b"\n"
            )
        for quarantined in self.quarantined_files:
            seen.update(json.dumps([quarantined.path, quarantined.reason]).encode() + b"\n")
        return digest_json(
            {
                "spec": self.spec.digest,
                "model": model_identity(self.model),
                "files": seen.hexdigest(),
                "columns": self.source_columns,
                "schemas": [self.source_schema.hex(), self.output_schema.hex()],
                "rules": [self.source_rules, self.score_rules],
                "frames": [self.never_null, *(schema.hex() for schema in self.frame_schemas)]
                if self.frame_schemas
                else None,
                "scored": [self.features, self.keep, self.outputs],
                "chain": [step_identity(step) for step in self.chain],
                "children": [[child.slug, child.value, child.work_digest] for child in self.children],
                "incremental baseline": [self.progress.baseline, self.progress.replaces]
                if self.progress.baseline
                else None,
                "stages": [stage.identity for stage in self.stages] or None,
                "role": self.role.to_record() if self.role else None,
                "dask": self.dask.digest if self.dask else None,
            }
        )

    @property
    def submission_digest(self) -> str:
        """SHA-256 over `work_digest` and the code of the steps: submissions with equal digests are one job."""
        code = digests_of(
            step for plan in [self, *(child.plan for child in self.children if child.plan)] for step in plan.code
        )
        return digest_json({"work": self.work_digest, "code": code}) if code else self.work_digest

    @cached_property
    def digest(self) -> str:
        """SHA-256 over `work_digest`, the code of the steps and the partitions.

        Batch sizes are excluded: they change no row.
        """
        seen = hashlib.sha256(self.work_digest.encode())
        for step in self.code:
            seen.update(json.dumps([step.module, step.digest]).encode() + b"\n")
        for partition in self.partitions:
            ranges = [(part.path, part.row_start, part.row_stop) for part in partition.fragments]
            seen.update(json.dumps([partition.id, ranges]).encode() + b"\n")
        for child in self.children:
            seen.update(json.dumps([child.slug, child.plan_digest]).encode() + b"\n")
        return seen.hexdigest()

    def recipe(
        self,
        *,
        job: str,
        directory: str,
        fsync: bool = True,
        import_paths: Sequence[str] = (),
        round: int = 0,
        sketch_every: int = 0,
    ) -> StageRecipe:
        """Return the recipe with which workers can score any partition.

        :param job: id of the job.
        :param directory: root of the job directory, path or URL.
        :param round: number of the round.
        :param sketch_every: see the field of the recipe.
        """
        spec = self.spec
        return StageRecipe(
            job=job,
            plan=self.digest,
            directory=directory,
            round=round,
            columns=self.source_columns,
            filter=read_source(spec).filter,
            schema=self.source_schema,
            chain=(*self._map_recipes(), self._score_recipe()) if self.is_plain else self.chain,
            source_rules=self.source_rules,
            output_schema=self.output_schema,
            batch_rows=self.batch_rows,
            batch_bytes=self.batch_bytes,
            device_batch_rows=self.device_batch_rows,
            source_format=spec.source.reader,
            compression=spec.sink.compression,
            row_group_rows=self.row_group_rows,
            row_group_bytes=self.row_group_bytes,
            fsync=fsync,
            import_paths=tuple(import_paths),
            code=self.code,
            pin_code=spec.step_change == "pin",
            errors=spec.errors,
            storage=spec.storage,
            never_null=self.never_null,
            sketch_every=sketch_every,
            keeps_origin=self.role is not None and self.role.keeps_origin,
            reads_origin=self.role is not None and self.role.reads_origin,
        )

    def _map_recipes(self) -> Iterator[MapRecipe]:
        # Plans of retries that took a step out may have the frames of more steps.
        frames = (*self.frame_schemas, *(b"" for _ in self.spec.maps))
        for step, frame in zip(self.spec.maps, frames, strict=False):
            yield MapRecipe.of(step, frame)

    def _score_recipe(self) -> ScoreRecipe:
        score = self.spec.score
        return ScoreRecipe(
            model=self.model,
            features=self.features,
            kind=score.output_spec.kind,
            outputs=self.outputs,
            rules=self.score_rules,
            engine=score.engine,
            tolerance=score.tolerance,
        )

    def worker_memory(self, limits: Limits) -> int:
        """Projected peak bytes of a worker while each of its threads runs a task."""
        return self._shared_memory + limits.threads * (self.task_memory - self._shared_memory)

    @property
    def _shared_memory(self) -> int:
        nbytes = self.model_bytes or sum(model.nbytes for model in self.models)
        return shared_memory(nbytes, engine=self.can_use_tree_engine)

    def validate(self, limits: Limits) -> None:
        """Check that the plan can run within ``limits``.

        :raises InsufficientMemory: if a worker needs more than `USABLE` of its memory limit.
        """
        if limits.memory <= 0 or self.children:
            return
        needed, usable = self.worker_memory(limits), int(USABLE * limits.memory)
        if needed <= usable:
            return
        fewer = " or fewer threads," if limits.threads > 1 else ""
        fewer += " or score with engine: library," if self.can_use_tree_engine else ""
        smaller = " or keep and read fewer columns" if self.batch_rows <= MIN_BATCH_ROWS else ""
        raise InsufficientMemory(
            "a worker does not have the memory this plan needs",
            where=f"{plural(limits.threads, 'thread')} per worker, batches of {self.batch_rows:,} rows",
            found=f"{format_bytes(needed)} needed, of which {format_bytes(self._shared_memory)} for the "
            f"process and the model",
            expected=f"at most {format_bytes(usable)}, {USABLE:.0%} of the worker's limit of "
            f"{format_bytes(limits.memory)}",
            next_step=f"give each worker {format_bytes(needed / USABLE)},{fewer}{smaller}".rstrip(","),
        )
