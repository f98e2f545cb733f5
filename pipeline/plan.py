"""Make a plan: what will run, decided before anything runs, stored, and never changed. Pure functions only."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline.columns import Columns, resolve_columns
from pipeline.flavors.outlook import look_out
from pipeline.increment import ALL, Progress
from pipeline.memory import (
    projected_memory,
    row_memory,
    starting_batch_rows,
    task_memory,
    written_group_rows,
)
from pipeline.model import ModelVersion
from pipeline.packing import pack
from pipeline.plan_table import plan_from_table, plan_to_table
from pipeline.planned import Limits, Partition, Plan
from pipeline.rows import InputFile
from pipeline.sources.parquet import Discovery, resize, total_bytes
from pipeline.spec import NOT_THE_WORK, JobSpec

__all__ = [
    "Limits",
    "Partition",
    "Plan",
    "PlanSummary",
    "difference",
    "dispatch_order",
    "make_plan",
    "plan_from_table",
    "plan_summary",
    "plan_to_table",
    "spec_difference",
]

_UNKNOWN_WIDTH = 32
"""Bytes that are assumed for a value whose type has no fixed width and that no file holds."""


def make_plan(
    spec: JobSpec,
    *,
    model: ModelVersion,
    discovery: Discovery,
    frame_schema: pa.Schema,
    predictions: pa.Schema,
    limits: Limits,
    target_bytes: int | None = None,
    progress: Progress = ALL,
) -> Plan:
    """Decide everything that can be decided before anything runs.

    :param frame_schema: schema after the map steps; that of ``discovery`` when there are none.
    :param predictions: columns the scores go to.
    :param limits: decides how many partitions there are, and how large a batch is.
    :param progress: what an incremental plan goes on from.
    :param target_bytes: uncompressed bytes a partition should have at most; default 256 MiB.
    :raises SpecError: for names in the spec that fit nothing, or clash.
    :raises SchemaDrift: for a feature that is missing or has a type the model cannot take.
    """
    columns = resolve_columns(
        spec, model=model, discovery=discovery, frame=frame_schema, outputs=tuple(predictions.names)
    )
    files = resize(discovery, columns=columns.read)
    output = pa.schema([*(frame_schema.field(name) for name in columns.keep), *predictions])
    output = pa.schema([field.remove_metadata() for field in output])
    partitions = _partitions(files, limits=limits, target_bytes=target_bytes)
    sizes = _sizes(discovery, columns, files=files, output=output, limits=limits, maps=bool(spec.maps))
    engine = _may_use_trees(spec, model, files, workers=limits.workers)
    return Plan(
        spec=spec,
        model=model,
        files=files,
        partitions=partitions,
        source_columns=columns.read,
        source_schema=columns.source.serialize().to_pybytes(),
        output_schema=output.serialize().to_pybytes(),
        source_rules=columns.source_rules,
        score_rules=columns.score_rules,
        features=columns.features,
        keep=columns.keep,
        outputs=tuple(predictions.names),
        batch_rows=sizes.batch_rows,
        pruned_rows=sum(group.rows for file in files for group in file.input_groups if not group.wanted),
        task_memory=_projected(sizes, model, files, partitions, columns=len(columns.read), engine=engine),
        row_bytes_out=sizes.row_bytes_out,
        row_group_rows=sizes.row_group_rows,
        workers=limits.workers,
        may_use_trees=engine,
        progress=progress,
        rejected_files=discovery.rejected,
    )


def _partitions(files: tuple[InputFile, ...], *, limits: Limits, target_bytes: int | None) -> tuple[Partition, ...]:
    packed = pack(files, threads=max(1, limits.workers * limits.threads), target_bytes=target_bytes)
    width = max(5, len(str(len(packed) - 1)))
    return tuple(Partition(f"{number:0{width}d}", fragments) for number, fragments in enumerate(packed))


def _may_use_trees(spec: JobSpec, model: ModelVersion, files: tuple[InputFile, ...], *, workers: int) -> bool:
    rows = sum(group.rows for file in files for group in file.row_groups if group.wanted) // max(1, workers)
    return look_out(spec.score.engine, model, kind=spec.score.output_spec.kind, rows=rows).has_trees


def _projected(
    sizes: _Sizes,
    model: ModelVersion,
    files: tuple[InputFile, ...],
    partitions: tuple[Partition, ...],
    *,
    columns: int,
    engine: bool,
) -> int:
    most_rows = max((partition.rows for partition in partitions), default=0)
    task = task_memory(
        batch_rows=sizes.batch_rows,
        row_memory=sizes.row_memory,
        columns=columns,
        largest_group=max((group.bytes for file in files for group in file.row_groups if group.wanted), default=0),
        row_bytes_out=sizes.row_bytes_out,
        row_group_rows=min(sizes.row_group_rows, most_rows),
    )
    return projected_memory(task=task, model_bytes=model.nbytes, engine=engine)


@dataclass(frozen=True)
class _Sizes:
    """Figures that follow from the widths of rows."""

    row_memory: int
    row_bytes_out: int
    batch_rows: int
    row_group_rows: int


def _sizes(
    discovery: Discovery,
    columns: Columns,
    *,
    files: tuple[InputFile, ...],
    output: pa.Schema,
    limits: Limits,
    maps: bool,
) -> _Sizes:
    kept = [name for name in columns.keep if name in columns.read]
    rows = max(1, sum(file.rows for file in files))
    row_in = sum(group.bytes for file in files for group in file.input_groups) // rows
    row_in += sum(_width(field) for field in columns.source if field.name not in columns.read)
    row_out = total_bytes(discovery, columns=kept) // rows if kept else 0
    row_out += sum(_width(field) for field in output if field.name not in kept)
    memory = row_memory(row_bytes_in=row_in, row_bytes_out=row_out, features=len(columns.features), maps=maps)
    batch = starting_batch_rows(row_memory=memory, memory=limits.memory, threads=limits.threads)
    group = written_group_rows(row_bytes_out=row_out, batch_rows=batch, memory=limits.memory, threads=limits.threads)
    return _Sizes(memory, row_out, batch, group)


def _width(field: pa.Field) -> int:
    """Bytes a value takes, more or less, of a column that is in no file."""
    try:
        return -(-int(field.type.bit_width) // 8)
    except ValueError:
        return _UNKNOWN_WIDTH


@dataclass(frozen=True)
class PlanSummary:
    """What a person wants to know of a plan before it runs."""

    rows: int
    """All rows of the input."""
    pruned_rows: int
    """Rows in row groups that are never read, because statistics prove that the filter keeps none of them."""
    bytes: int
    """Uncompressed bytes to read."""
    files: int
    partitions: int
    skew_before: float
    """Rows of the largest file / mean rows of a file."""
    skew_after: float
    """The same of partitions."""
    batch_rows: int
    task_memory: int
    """Projected peak bytes of a worker that runs one task."""
    worker_memory: int
    """The same with a task on each of its threads."""
    output_bytes: int
    """Estimate, uncompressed, when no row is dropped."""
    plan: Plan
    limits: Limits

    def details(self) -> dict[str, Any]:
        """As JSON output shows it."""
        model, sink, score = self.plan.model, self.plan.spec.sink, self.plan.spec.score
        engine = look_out(score.engine, model, kind=score.output_spec.kind, rows=self.plan.rows_per_worker)
        return {
            "name": self.plan.spec.name,
            "plan": self.plan.digest,
            "rows": self.rows,
            "pruned_rows": self.pruned_rows,
            "bytes": self.bytes,
            "files": self.files,
            "rejected_files": [asdict(file) for file in self.plan.rejected_files],
            "partitions": self.partitions,
            "skew": {"before": round(self.skew_before, 3), "after": round(self.skew_after, 3)},
            "batch_rows": self.batch_rows,
            "memory": {"task": self.task_memory, "worker": self.worker_memory, "limit": self.limits.memory},
            "children": [
                {**child.details(), "output": child.planned.spec.sink.path, "model": child.planned.model.name}
                for child in self.plan.children
            ],
            "cluster": {"workers": self.limits.workers, "threads": self.limits.threads},
            "output": {
                "path": sink.path,
                "mode": sink.mode,
                "bytes": self.output_bytes,
                "columns": [*self.plan.keep, *self.plan.outputs],
            },
            "model": {
                "name": model.name,
                "version": model.version,
                "digest": model.digest,
                "flavor": model.flavor,
                "task": model.task,
                "trees": model.trees,
                "features": list(self.plan.features),
            },
            "engine": {
                "wanted": engine.wanted,
                "possible": list(engine.possible),
                "reasons": list(engine.reasons),
            },
        }


def plan_summary(plan: Plan, limits: Limits) -> PlanSummary:
    """The figures of ``plan`` beside those of the cluster; of a fan-out, of all children together."""
    parts = [child.planned for child in plan.children] or [plan]
    partitions = [partition for part in parts for partition in part.partitions]
    return PlanSummary(
        rows=plan.rows,
        pruned_rows=sum(part.pruned_rows for part in parts),
        bytes=sum(partition.bytes for partition in partitions),
        files=sum(len(part.files) for part in parts),
        partitions=len(partitions),
        skew_before=skew([file.rows for part in parts for file in part.files]),
        skew_after=skew([partition.rows for partition in partitions]),
        batch_rows=max(part.batch_rows for part in parts),
        task_memory=max(part.task_memory for part in parts),
        worker_memory=max(part.worker_memory(limits) for part in parts),
        output_bytes=sum(part.row_bytes_out * (part.rows - part.pruned_rows) for part in parts),
        plan=plan,
        limits=limits,
    )


def skew(rows: Sequence[int]) -> float:
    """Largest / mean; 1.0 is even, and also what nothing counts as."""
    return max(rows) * len(rows) / sum(rows) if sum(rows) else 1.0


def dispatch_order(partitions: Sequence[Partition], *, done: Collection[str] = ()) -> tuple[Partition, ...]:
    """Those of ``partitions`` that are not ``done``, largest first, so that none that takes long is left for the end.

    Half of what a partition costs is in proportion to its rows (scoring), half to its bytes (reading, writing).
    """
    rows = max(1, sum(partition.rows for partition in partitions))
    size = max(1, sum(partition.bytes for partition in partitions))
    waiting = [partition for partition in partitions if partition.id not in done]
    return tuple(sorted(waiting, key=lambda one: (-(one.rows / rows + one.bytes / size), one.id)))


def difference(one: Plan, other: Plan) -> list[str]:
    """In what two plans differ, in words: ``sink.mode: error -> append``. Empty when their digests are the same."""
    if one.digest == other.digest:
        return []
    found = spec_difference(one.spec.to_dict(exclude=NOT_THE_WORK), other.spec.to_dict(exclude=NOT_THE_WORK))
    if one.model.digest != other.model.digest:
        found.append(f"model {one.model.name}: sha256 {one.model.digest[:12]} -> {other.model.digest[:12]}")
    found += _file_difference({file.path: file for file in one.files}, {file.path: file for file in other.files})
    if one.source_schema != other.source_schema:
        found.append("columns that are read, or their types")
    if one.output_schema != other.output_schema:
        found.append("columns of the output, or their types")
    if not found:
        found.append(f"how rows are cut: {len(one.partitions):,} -> {len(other.partitions):,} partitions")
    return found


def spec_difference(one: Any, other: Any, *, place: str = "") -> list[str]:
    """In what two specs, as `JobSpec.to_dict` gives them, differ, in words."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(name for name in other if name not in one)]
        inside = (
            spec_difference(one.get(name), other.get(name), place=f"{place}.{name}".lstrip(".")) for name in names
        )
        return [text for texts in inside for text in texts]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        inside = (spec_difference(a, b, place=f"{place}[{n}]") for n, (a, b) in enumerate(zip(one, other, strict=True)))
        return [text for texts in inside for text in texts]
    return [] if one == other else [f"{place}: {_shown(one)} -> {_shown(other)}"]


def _shown(value: Any) -> str:
    return "default" if value is None else str(value)


def _file_difference(one: dict[str, InputFile], other: dict[str, InputFile]) -> list[str]:
    gone = [path for path in one if path not in other]
    new = [path for path in other if path not in one]
    changed = [path for path, file in one.items() if path in other and _identity(file) != _identity(other[path])]
    named = [("file changed", changed), ("file gone", gone), ("file new", new)]
    return [
        f"{words}: {paths[0]}" + (f" and {len(paths) - 1:,} more" if len(paths) > 1 else "")
        for words, paths in named
        if paths
    ]


def _identity(file: InputFile) -> tuple[Any, ...]:
    return file.size, file.version, [(group.rows, group.wanted) for group in file.row_groups]
