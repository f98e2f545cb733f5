"""Make the plan of a job before anything runs. A stored plan never changes. Pure functions only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.common.rows import InputFile, RowGroup
from pipeline.devices.memory import MAX_BATCH_ROWS
from pipeline.errors import InsufficientMemory
from pipeline.models.cache import limit_bytes
from pipeline.models.engines import engine_options
from pipeline.models.model import NO_MODEL, ModelVersion
from pipeline.plan.chain import ResolvedChain
from pipeline.plan.columns import Columns, resolve_columns
from pipeline.plan.dask_recipe import DaskRecipe, DaskWork
from pipeline.plan.incremental import FULL_INPUT, IncrementalState
from pipeline.plan.memory import (
    MODEL_FACTOR,
    USABLE,
    batch_bytes,
    projected_memory,
    row_memory,
    shared_memory,
    starting_batch_rows,
    task_memory,
    written_group_bytes,
    written_group_rows,
)
from pipeline.plan.outline import Stage, outline, stage_spec
from pipeline.plan.packing import pack
from pipeline.plan.plan import Limits, Partition, Plan
from pipeline.plan.pushdown import read_source
from pipeline.plan.recipe import ORIGIN, AnyScore, KeyedRecipe, StepRecipe, held_steps, scores_of
from pipeline.plan.stages import PlannedStage, SealedInput, StageRole
from pipeline.sources.discovery import Discovery, resize, total_bytes
from pipeline.sources.types import read_type
from pipeline.spec.job_spec import JobSpec

NO_LIMITS = Limits(workers=1, threads=1, memory=0)
DASK_FACTOR = 3
"""Memory of a task of a ``dask`` step, as a multiple of its largest input partition; a rule of thumb, no limit."""
_UNKNOWN_WIDTH = 32
"""Bytes assumed for a value whose type has no fixed width and that is in no file."""


def make_plan(
    spec: JobSpec,
    *,
    model: ModelVersion,
    discovery: Discovery,
    frame_schemas: Sequence[pa.Schema] = (),
    predictions: pa.Schema,
    limits: Limits,
    target_bytes: int | None = None,
    progress: IncrementalState = FULL_INPUT,
) -> Plan:
    """Make the plan of a job: columns, partitions, memory and batch sizes.

    :param frame_schemas: schema after each map step.
    :param predictions: columns that receive the scores.
    :param limits: limits of the cluster; they decide the number of partitions and the batch size.
    :param progress: published state that an incremental plan continues from.
    :param target_bytes: target for the largest number of uncompressed bytes of a partition. Default: 256 MiB.
    :raises SpecError: for unknown or clashing names in the spec.
    :raises SchemaDrift: for a feature that is missing or has a type that the model cannot use.
    """
    frame = last_schema(frame_schemas, discovery.schema)
    columns = resolve_columns(spec, model=model, discovery=discovery, frame=frame, outputs=tuple(predictions.names))
    output = _output_schema(frame, columns, predictions)
    engine = engine_options(spec.score.engine, model, kind=spec.score.output_spec.kind).has_trees
    used = _Used(
        columns.read, columns.source, columns.keep, len(columns.features), model.nbytes, engine, _has_limits(spec)
    )
    return Plan(
        spec=spec,
        model=model,
        source_columns=columns.read,
        source_schema=_ipc_bytes(columns.source),
        output_schema=_ipc_bytes(output),
        source_rules=columns.source_rules,
        score_rules=columns.score_rules,
        features=columns.features,
        keep=columns.keep,
        outputs=tuple(predictions.names),
        progress=progress,
        never_null=tuple(sorted(discovery.never_null)) if spec.maps else (),
        frame_schemas=tuple(map(_ipc_bytes, frame_schemas)),
        **_cut(spec, discovery, used, output=output, limits=limits, target_bytes=target_bytes),
    )


def make_chain_plan(
    spec: JobSpec,
    *,
    chain: ResolvedChain,
    discovery: Discovery,
    limits: Limits,
    target_bytes: int | None = None,
    progress: IncrementalState = FULL_INPUT,
) -> Plan:
    """Make the plan of a job whose spec is not plain; see `make_plan`.

    :param chain: the steps, resolved.
    """
    scores = scores_of(chain.recipes)
    keep = tuple(name for name in chain.output.names if name not in chain.scores)
    first = chain.stages[0] if chain.stages else None
    recipes, output = (first.recipes, first.output) if first else (chain.recipes, chain.output)
    used = _used(spec, recipes, read=chain.read, source=chain.source, output=output, limits=limits)
    return Plan(
        spec=spec,
        model=scores[0].model if scores else NO_MODEL,
        source_columns=chain.read,
        source_schema=_ipc_bytes(chain.source),
        output_schema=_ipc_bytes(chain.output),
        source_rules=chain.source_rules,
        score_rules=(),
        features=scores[0].features if scores else (),
        keep=keep,
        outputs=chain.scores,
        progress=progress,
        never_null=tuple(sorted(discovery.never_null)) if spec.maps else (),
        chain=chain.recipes,
        model_bytes=used.model_bytes if any(isinstance(step, KeyedRecipe) for step in recipes) else 0,
        **_cut(spec, discovery, used, output=output, limits=limits, target_bytes=target_bytes),
    )


def plan_stages(
    plan: Plan, chain: ResolvedChain, *, limits: Limits, never_null: Sequence[Collection[str]] = ()
) -> Plan:
    """Return the plan of a job with its stages; ``plan`` itself for a job without a step that ends one.

    :param never_null: columns without nulls behind the end of each stage but the last.
    :raises InsufficientMemory: when a worker cannot run a later stage, as far as that is known before the stage runs.
    """
    known = [(), *never_null, *[()] * len(chain.stages)]
    stages = tuple(
        PlannedStage(
            slug=part.stage.slug,
            kind=part.stage.kind,
            recipes=len(part.recipes),
            output_schema=_ipc_bytes(part.output),
            scores=part.scores,
            never_null=tuple(sorted(set(known[part.stage.number]) & set(part.source.names))),
            partition_bytes=part.stage.partition_bytes,
            partitions=len(plan.partitions),
            task_memory=plan.task_memory,
        )
        for part in chain.stages
    )
    plan = replace(plan, stages=stages)
    estimated = [*stages[:1]]
    for stage in outline(plan.spec)[1:]:
        source = chain.stages[stage.number].source
        if stage.kind == "dask":
            estimated.append(stages[stage.number])
            continue
        rows = plan.rows - plan.pruned_rows
        size = rows * sum(map(_width, source))
        file = InputFile("", size, "", (RowGroup(rows, size, size),))
        later = plan_stage(
            plan, stage, discovery=Discovery((file,), source, available=tuple(source.names)), limits=limits
        )
        try:
            later.validate(limits)
        except InsufficientMemory as error:
            error.where = f"{stages[stage.number].title}: {error.where}"
            raise
        estimated.append(replace(stages[stage.number], partitions=len(later.partitions), task_memory=later.task_memory))
    return replace(plan, stages=tuple(estimated))


def plan_stage(
    plan: Plan,
    stage: Stage,
    *,
    discovery: Discovery | None = None,
    inputs: Sequence[SealedInput] = (),
    folder: str = "steps",
    limits: Limits,
) -> Plan:
    """Return the plan of one stage of a job.

    :param plan: plan of the job.
    :param discovery: files of the stage before; None for the first stage, whose files the plan of the job has.
    :param inputs: manifests that name these files.
    :param folder: folder of these files.
    """
    planned = plan.stages[stage.number]
    start = sum(other.recipes for other in plan.stages[: stage.number])
    recipes = stage_recipes(plan, stage)
    scores = scores_of(recipes)
    output = pa.ipc.read_schema(pa.py_buffer(planned.output_schema))
    role = StageRole(
        stage.number,
        stage.slug,
        stage.kind,
        tuple(inputs),
        keeps_origin=not stage.is_last and keeps_origin(recipes),
        reads_origin=bool(inputs) and keeps_origin(plan.chain[start - 1 : start]),
    )
    spec = stage_spec(plan.spec, stage, folder=folder)
    common = replace(
        plan,
        spec=spec,
        model=scores[0].model if scores else NO_MODEL,
        output_schema=_ipc_bytes(pa.schema([*output, *ORIGIN]) if role.keeps_origin else output),
        features=scores[0].features if scores else (),
        keep=tuple(name for name in output.names if name not in planned.scores),
        outputs=planned.scores,
        chain=recipes,
        stages=(),
        role=role,
    )
    if discovery is None:
        return common
    used = _used(spec, recipes, read=discovery.physical, source=discovery.schema, output=output, limits=limits)
    return replace(
        common,
        source_columns=discovery.physical,
        source_schema=_ipc_bytes(discovery.schema),
        source_rules=(),
        progress=FULL_INPUT,
        never_null=planned.never_null,
        model_bytes=used.model_bytes if any(isinstance(step, KeyedRecipe) for step in recipes) else 0,
        **_cut(spec, discovery, used, output=output, limits=limits, target_bytes=planned.partition_bytes),
    )


def plan_lazy_stage(plan: Plan, stage: Stage) -> Plan:
    """Return the plan of a stage whose rows are not kept, and that reads those of the stage before from memory."""
    if stage.number:
        schema = pa.ipc.read_schema(pa.py_buffer(plan.stages[stage.number - 1].output_schema))
        planned = plan_stage(plan, stage, discovery=Discovery((), schema), limits=NO_LIMITS)
    else:
        planned = plan_stage(plan, stage, limits=NO_LIMITS)
    assert planned.role is not None
    role = replace(planned.role, keeps_origin=False, reads_origin=False)
    return replace(planned, role=role, output_schema=plan.stages[stage.number].output_schema)


def source_files(plan: Plan) -> Discovery:
    """Return the files of the source, as they were discovered for the plan of a job."""
    schema = pa.ipc.read_schema(pa.py_buffer(plan.source_schema))
    keys = tuple(name for name in schema.names if name not in plan.source_columns)
    source = read_source(plan.spec)
    return Discovery(plan.files, schema, key_names=keys, filter=source.filter, format=source.reader)


def stage_recipes(plan: Plan, stage: Stage) -> tuple[StepRecipe, ...]:
    """Return the recipes of a stage, of those of its job."""
    start = sum(other.recipes for other in plan.stages[: stage.number])
    return plan.chain[start : start + plan.stages[stage.number].recipes]


def keeps_origin(recipes: Sequence[StepRecipe]) -> bool:
    """Return True if a stage can keep the origin of each row: a ``dask`` step may lose it."""
    return all(step.keeps_origin for step in recipes if isinstance(step, DaskRecipe))


def plan_dask_stage(plan: Plan, stage: Stage, work: DaskWork, *, inputs: Sequence[SealedInput], folder: str) -> Plan:
    """Return the plan of a stage with a ``dask`` step.

    :param plan: plan of the job.
    :param folder: folder of the files of the stage before; unused for the first stage.
    """
    common = plan_stage(plan, stage, inputs=inputs, folder=folder, limits=NO_LIMITS)
    return replace(
        common,
        files=work.main.files,
        partitions=tuple(Partition(name, ()) for name in work.partition_ids),
        source_columns=work.main.columns,
        source_schema=work.main.schema,
        source_rules=(),
        progress=FULL_INPUT,
        never_null=(),
        pruned_rows=0,
        task_memory=DASK_FACTOR * work.largest_bytes,
        can_use_tree_engine=False,
        dask=work,
    )


def _used(
    spec: JobSpec,
    recipes: Sequence[StepRecipe],
    *,
    read: tuple[str, ...],
    source: pa.Schema,
    output: pa.Schema,
    limits: Limits,
) -> _Used:
    """Return the columns and models of some steps of a chain."""
    made = {name for step in recipes if isinstance(step, AnyScore) for name in step.outputs}
    return _Used(
        read,
        source,
        tuple(name for name in output.names if name not in made),
        _matrix_features(recipes),
        held_bytes(recipes, memory=limits.memory),
        any(engine_options(score.engine, score.model, kind=score.kind).has_trees for score in scores_of(recipes)),
        _has_limits(spec),
    )


def _matrix_features(chain: Sequence[StepRecipe]) -> int:
    """Return the features of all matrices that a batch holds at a time: one, and those that models share."""
    lists = Counter(score.features for score in scores_of(held_steps(chain)))
    shared = sum(len(features) for features, models in lists.items() if models > 1) if len(lists) > 1 else 0
    return shared + max((len(score.features) for score in scores_of(chain)), default=0)


def _has_limits(spec: JobSpec) -> bool:
    return any(step.timeout is not None or step.row_timeout is not None for step in spec.maps)


def held_bytes(chain: Sequence[StepRecipe], *, memory: int) -> int:
    """Return the bytes of the model files that a worker holds at a time.

    Models by key share the part of the worker's memory that `pipeline.models.cache` gives them, if they do not fit.

    :param memory: memory limit of a worker in bytes; 0 means no limit.
    """
    held = {score.model.key: score.model.nbytes for score in scores_of(held_steps(chain))}
    keyed = {score.model.key: score.model.nbytes for score in scores_of(chain) if score.model.key not in held}
    room = max(limit_bytes(memory) // MODEL_FACTOR, *keyed.values(), 0)
    return sum(held.values()) + min(sum(keyed.values()), room)


@dataclass(frozen=True)
class _Used:
    """Columns and models that decide how much memory a row and a worker need."""

    read: tuple[str, ...]
    source: pa.Schema
    keep: tuple[str, ...]
    features: int
    """Features of all matrices that a batch holds at a time."""
    model_bytes: int
    """Bytes of the model files that a worker holds at a time."""
    engine: bool
    """True if the tree engine may score."""
    child_processes: bool = False
    """True if each task scores in a process of its own, because steps have time limits."""


def _cut(
    spec: JobSpec, discovery: Discovery, used: _Used, *, output: pa.Schema, limits: Limits, target_bytes: int | None
) -> dict[str, Any]:
    """Return the fields of a plan that say how rows are cut, and how much memory they need."""
    files = resize(discovery, columns=used.read)
    partitions = _partitions(files, limits=limits, target_bytes=target_bytes)
    sizes = _sizes(discovery, used, files=files, output=output, limits=limits, maps=bool(spec.maps))
    task = _projected(sizes, used, files, partitions)
    return {
        "files": files,
        "partitions": partitions,
        "batch_rows": sizes.batch_rows,
        "batch_bytes": sizes.batch_bytes,
        "device_batch_rows": _device_batch_rows(sizes, used, limits, projected=task),
        "pruned_rows": sum(group.rows for file in files for group in file.input_groups if not group.selected),
        "task_memory": task,
        "row_bytes_out": sizes.row_bytes_out,
        "row_group_rows": sizes.row_group_rows,
        "row_group_bytes": sizes.row_group_bytes,
        "workers": limits.workers,
        "can_use_tree_engine": used.engine,
        "quarantined_files": discovery.rejected,
    }


def last_schema(frame_schemas: Sequence[pa.Schema], source: pa.Schema) -> pa.Schema:
    """Return the schema after the last map step, all columns nullable; without map steps, ``source``."""
    if not frame_schemas:
        return source
    return pa.schema([field.with_nullable(True) for field in frame_schemas[-1]])


def _output_schema(frame: pa.Schema, columns: Columns, predictions: pa.Schema) -> pa.Schema:
    fields = [*(frame.field(name) for name in columns.keep), *predictions]
    return pa.schema([field.with_type(read_type(field.type)).remove_metadata() for field in fields])


def _ipc_bytes(schema: pa.Schema) -> bytes:
    return bytes(schema.serialize().to_pybytes())


def _partitions(files: tuple[InputFile, ...], *, limits: Limits, target_bytes: int | None) -> tuple[Partition, ...]:
    packed = pack(files, threads=max(1, limits.workers * limits.threads), target_bytes=target_bytes)
    width = max(5, len(str(len(packed) - 1)))
    return tuple(Partition(f"{number:0{width}d}", fragments) for number, fragments in enumerate(packed))


def _projected(sizes: _Sizes, used: _Used, files: tuple[InputFile, ...], partitions: tuple[Partition, ...]) -> int:
    most_rows = max((partition.rows for partition in partitions), default=0)
    task = task_memory(
        batch_rows=sizes.batch_rows,
        row_memory=sizes.row_memory,
        columns=len(used.read),
        largest_group=max((group.bytes for file in files for group in file.row_groups if group.selected), default=0),
        row_bytes_out=sizes.row_bytes_out,
        row_group_rows=min(sizes.row_group_rows, most_rows),
    )
    if used.child_processes:  # each task has one, with the models
        task += shared_memory(used.model_bytes)
    return projected_memory(task=task, model_bytes=used.model_bytes, engine=used.engine)


def _device_batch_rows(sizes: _Sizes, used: _Used, limits: Limits, *, projected: int) -> int:
    """Return the rows of a batch that a GPU scores: more than on a CPU, if a worker's host memory holds them.

    :param projected: bytes of a worker that runs one task, with batches for CPUs.
    """
    rows = starting_batch_rows(
        row_memory=sizes.row_memory, memory=limits.memory, threads=limits.threads, ceiling=MAX_BATCH_ROWS
    )
    shared = shared_memory(used.model_bytes, engine=used.engine)
    usable = int(USABLE * limits.memory)
    while rows > sizes.batch_rows and usable:
        task = projected - shared + (rows - sizes.batch_rows) * sizes.row_memory
        if shared + limits.threads * task <= usable:
            break
        rows //= 2
    return max(rows, sizes.batch_rows)


@dataclass(frozen=True)
class _Sizes:
    """Figures derived from the widths of rows."""

    row_memory: int
    row_bytes_out: int
    batch_rows: int
    batch_bytes: int
    row_group_rows: int
    row_group_bytes: int


def _sizes(
    discovery: Discovery,
    used: _Used,
    *,
    files: tuple[InputFile, ...],
    output: pa.Schema,
    limits: Limits,
    maps: bool,
) -> _Sizes:
    kept = [name for name in used.keep if name in used.read]
    rows = max(1, sum(file.rows for file in files))
    row_in = sum(group.bytes for file in files for group in file.input_groups) // rows
    row_in += sum(_width(field) for field in used.source if field.name not in used.read)
    row_out = total_bytes(discovery, columns=kept) // rows if kept else 0
    row_out += sum(_width(field) for field in output if field.name not in kept)
    memory = row_memory(row_bytes_in=row_in, row_bytes_out=row_out, features=used.features, maps=maps)
    batch = starting_batch_rows(row_memory=memory, memory=limits.memory, threads=limits.threads)
    group_bytes = written_group_bytes(columns=len(output), memory=limits.memory, threads=limits.threads)
    group = written_group_rows(row_bytes_out=row_out, batch_rows=batch, group_bytes=group_bytes)
    most_bytes = batch_bytes(
        batch_rows=batch, row_bytes_in=row_in, row_memory=memory, memory=limits.memory, threads=limits.threads
    )
    return _Sizes(memory, row_out, batch, most_bytes, group, group_bytes)


def _width(field: pa.Field) -> int:
    """Return the approximate bytes per value of a column that is in no file."""
    try:
        return -(-int(field.type.bit_width) // 8)
    except ValueError:
        return _UNKNOWN_WIDTH


def dispatch_order(partitions: Sequence[Partition], *, done: Collection[str] = ()) -> tuple[Partition, ...]:
    """Return the partitions that are not in ``done``, most expensive first, so that no long one runs last.

    The cost of a partition is half its share of the rows (scoring), half its share of the bytes (reading, writing).
    """
    rows = max(1, sum(partition.rows for partition in partitions))
    size = max(1, sum(partition.bytes for partition in partitions))
    waiting = [partition for partition in partitions if partition.id not in done]
    return tuple(
        sorted(waiting, key=lambda partition: (-(partition.rows / rows + partition.bytes / size), partition.id))
    )
