"""The types of a plan: `Plan`, its `Partition`s, and the `Limits` it was made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from pipeline.common.digest import digest_json
from pipeline.common.rows import Fragment, InputFile, QuarantinedFile
from pipeline.common.units import format_bytes, plural
from pipeline.errors import InsufficientMemory
from pipeline.models.model import ModelVersion
from pipeline.plan.incremental import FULL_INPUT, IncrementalState
from pipeline.plan.memory import MIN_BATCH_ROWS, USABLE, shared_memory
from pipeline.plan.recipe import ColumnRule, MapRecipe, ScoreRecipe, StageRecipe
from pipeline.spec.job_spec import JobSpec


@dataclass(frozen=True, slots=True)
class Partition:
    """The unit of work: one Dask partition, one task, one checkpoint file."""

    id: str
    """Five digits in source order, ``00042``; parts of a split one append ``.0``, ``.1``, …."""
    fragments: tuple[Fragment, ...]

    @property
    def rows(self) -> int:
        """Rows of its fragments; a row filter may drop some of them."""
        return sum(fragment.rows for fragment in self.fragments)

    @property
    def bytes(self) -> int:
        """Uncompressed bytes of the columns the job reads."""
        return sum(fragment.bytes for fragment in self.fragments)


@dataclass(frozen=True)
class Limits:
    """What the cluster offers, as far as planning needs to know."""

    workers: int
    threads: int
    """Threads per worker."""
    memory: int
    """Bytes per worker; 0 means no limit."""


@dataclass(frozen=True)
class ChildPlan:
    """What the plan of a fan-out says of one child."""

    slug: str
    """Names its folder, and ends its job id."""
    value: str | int | float | bool | None
    matching: int | None
    """Rows of the source that have the value; None where values are a list."""
    rows: int
    """Rows of its input files."""
    partitions: int
    work: str
    """`Plan.work_digest` of its plan."""
    cut: str
    """`Plan.digest` of its plan."""
    plan: Plan | None = field(default=None, repr=False, compare=False)
    """Its plan, while it is made; later it is read from the child's own directory."""

    @property
    def planned(self) -> Plan:
        """Its plan, which is there as long as the fan-out is being made."""
        if self.plan is None:
            raise ValueError(f"the plan of child {self.slug} is in its own directory")
        return self.plan

    def details(self) -> dict[str, Any]:
        """As it is stored, and JSON output shows it."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "plan"}


@dataclass(frozen=True)
class Plan:
    """A job spec, a model version and input files, cut into partitions."""

    spec: JobSpec
    model: ModelVersion
    files: tuple[InputFile, ...]
    partitions: tuple[Partition, ...]
    """In source order; every wanted row of every file is in exactly one."""
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
    """Rows of row groups that statistics proved unwanted; they count as filtered."""
    task_memory: int
    """Projected peak bytes of one task, process and model included."""
    row_bytes_out: int = 0
    """Estimated bytes of an uncompressed row of the output."""
    row_group_rows: int = 1 << 20
    """Rows per row group of the output."""
    workers: int = 1
    """Worker processes it was made for; decides no row, so that it is in no digest."""
    can_use_tree_engine: bool = False
    """Whether workers may start the tree engine, so that ``task_memory`` has room for it; in no digest either."""
    quarantined_files: tuple[QuarantinedFile, ...] = ()
    """Files of the source that were quarantined, by path; none of them is in ``files``."""
    children: tuple[ChildPlan, ...] = ()
    """Of a fan-out, which has no files and partitions of its own."""
    progress: IncrementalState = FULL_INPUT
    """What it goes on from, where it is incremental."""

    @property
    def rows(self) -> int:
        """All rows of the input, filtered ones too."""
        return sum(file.rows for file in self.files) + sum(child.rows for child in self.children)

    @property
    def rows_per_worker(self) -> int:
        """Rows a worker process will read, when all get as many."""
        return (self.rows - self.pruned_rows) // max(1, self.workers)

    @cached_property
    def versions(self) -> dict[str, tuple[int, str]]:
        """Size and version of each file by path, as workers check them before and after reading."""
        return {file.path: (file.size, file.version) for file in self.files}

    @cached_property
    def work_digest(self) -> str:
        """SHA-256 over what is to be done, however it is cut: spec, model, files, columns and rules.

        Two plans for clusters of different sizes have it in common, while their `digest` differs.
        """
        seen = hashlib.sha256()
        for file in self.files:
            groups = [(group.rows, group.selected) for group in file.row_groups]
            seen.update(json.dumps([file.path, file.size, file.version, file.hive_keys, groups]).encode() + b"\n")
        for quarantined in self.quarantined_files:
            seen.update(json.dumps([quarantined.path, quarantined.reason]).encode() + b"\n")
        return digest_json(
            {
                "spec": self.spec.digest,
                "model": [self.model.digest, self.model.flavor, self.model.features],
                "files": seen.hexdigest(),
                "columns": self.source_columns,
                "schemas": [self.source_schema.hex(), self.output_schema.hex()],
                "rules": [self.source_rules, self.score_rules],
                "scored": [self.features, self.keep, self.outputs],
                "children": [[child.slug, child.value, child.work] for child in self.children],
                "goes on from": [self.progress.baseline, self.progress.replaces] if self.progress.baseline else None,
            }
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over `work_digest` and the partitions. Sizes of batches are left out: they change no row."""
        seen = hashlib.sha256(self.work_digest.encode())
        for partition in self.partitions:
            ranges = [(part.path, part.row_start, part.row_stop) for part in partition.fragments]
            seen.update(json.dumps([partition.id, ranges]).encode() + b"\n")
        for child in self.children:
            seen.update(json.dumps([child.slug, child.cut]).encode() + b"\n")
        return seen.hexdigest()

    def recipe(
        self, *, job: str, directory: str, fsync: bool = True, import_paths: Sequence[str] = (), round: int = 0
    ) -> StageRecipe:
        """What workers must know to do any partition.

        :param job: id of the job.
        :param directory: root of the job directory, path or URL.
        :param round: number of the round.
        """
        spec = self.spec
        return StageRecipe(
            job=job,
            plan=self.digest,
            directory=directory,
            round=round,
            columns=self.source_columns,
            filter=spec.source.filter,
            schema=self.source_schema,
            maps=tuple(MapRecipe(step.map, step.dtype_backend) for step in spec.maps),
            score=ScoreRecipe(
                model=self.model,
                features=self.features,
                kind=spec.score.output_spec.kind,
                outputs=self.outputs,
                keep=self.keep,
                engine=spec.score.engine,
                tolerance=spec.score.tolerance,
                rows_per_worker=self.rows_per_worker,
            ),
            source_rules=self.source_rules,
            score_rules=self.score_rules,
            output_schema=self.output_schema,
            batch_rows=self.batch_rows,
            source_format=spec.source.format,
            compression=spec.sink.compression,
            row_group_rows=self.row_group_rows,
            fsync=fsync,
            import_paths=tuple(import_paths),
            storage=spec.storage,
        )

    def worker_memory(self, limits: Limits) -> int:
        """Projected peak bytes of a worker while each of its threads runs a task."""
        return self._shared_memory + limits.threads * (self.task_memory - self._shared_memory)

    @property
    def _shared_memory(self) -> int:
        return shared_memory(self.model.nbytes, engine=self.can_use_tree_engine)

    def validate(self, limits: Limits) -> None:
        """Refuse what cannot run within ``limits``.

        :raises InsufficientMemory: with what is needed and what there is.
        """
        if limits.memory <= 0 or self.children:
            return
        needed, usable = self.worker_memory(limits), int(USABLE * limits.memory)
        if needed <= usable:
            return
        fewer = " or fewer threads," if limits.threads > 1 else ""
        fewer += " or score with engine: xgboost," if self.can_use_tree_engine else ""
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
