"""Plan ``dask`` steps: their tables and columns with the job, their partitions once their input is there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline.common.step_code import FoundCode
from pipeline.common.step_modules import StepModules
from pipeline.common.travel import known, shown_name
from pipeline.errors import StepFailed
from pipeline.plan.dask_recipe import DaskRecipe, DaskTable, DaskWork
from pipeline.plan.outline import Stage
from pipeline.plan.plan import Limits, Plan
from pipeline.plan.planner import plan_dask_stage, source_files, stage_recipes
from pipeline.plan.recipe import ORIGIN
from pipeline.plan.stages import SealedInput
from pipeline.settings import Settings
from pipeline.sources import Discovery, discover
from pipeline.spec.parts import DaskStep


def plan_step(
    step: DaskStep,
    schema: pa.Schema,
    *,
    code: FoundCode,
    settings: Settings,
    tables: MutableMapping[str, DaskTable] | None = None,
) -> DaskRecipe:
    """Pin the tables of a step, and find the columns of its result: the function is called on frames without rows.

    :param schema: columns of the rows that go into the step.
    :param tables: tables that were pinned before, by their text in the spec; those that are new are added.
    :raises StepFailed: if the function raises, computes something, or returns no frame that can be kept.
    :raises InputError: if a table cannot be read.
    """
    from pipeline.execution.dask_config import override_config
    from pipeline.execution.dask_step import apply_step, empty_frame, frame_schema, step_config

    pinned = {} if tables is None else tables
    inputs: dict[str, DaskTable] = {}
    for name, table in sorted(step.inputs.items()):
        key = table.model_dump_json()
        if key not in pinned:
            pinned[key] = DaskTable.of(discover(table.source))
        inputs[name] = pinned[key]
    with _function(step.dask, code, settings) as function, override_config(step_config(step.shuffle)):
        frame = empty_frame(schema, origin=step.origin)
        named = {name: empty_frame(table.arrow) for name, table in inputs.items()}
        result = apply_step(function, frame, named, where=shown_name(step.dask))
        output = frame_schema(result._meta, where=shown_name(step.dask))
    is_kept = step.origin and set(ORIGIN.names) <= set(output.names)
    columns = pa.schema([field for field in output if not is_kept or field.name not in ORIGIN.names])
    reserved = [name for name in columns.names if name in ORIGIN.names]
    if reserved:
        raise StepFailed(
            "the result of a dask step has one of the two columns of the origin",
            where=shown_name(step.dask),
            found=", ".join(reserved),
            expected=f"both, {' and '.join(ORIGIN.names)}, or none",
            next_step="drop or rename it",
        )
    return DaskRecipe(
        step.dask,
        bytes(columns.serialize().to_pybytes()),
        inputs=tuple(inputs.items()),
        partition_bytes=step.target_bytes,
        origin=step.origin,
        shuffle=step.shuffle,
        keeps_origin=is_kept,
    )


@contextmanager
def _function(entrypoint: str, code: FoundCode, settings: Settings) -> Iterator[Callable[..., Any]]:
    modules = StepModules(code.steps, import_paths=settings.import_paths, sources=code.sources, stored=known)
    with modules.in_use(), redirect_stdout(sys.stderr):
        yield modules.function(entrypoint)


def plan_work(
    plan: Plan,
    stage: Stage,
    files: Discovery | None,
    *,
    inputs: Sequence[SealedInput],
    folder: str,
    limits: Limits,
    settings: Settings,
) -> Plan:
    """Return the plan of a stage with a ``dask`` step: the step is called on unread frames of what it reads.

    :param plan: plan of the job.
    :param files: files of the stage before; None for the first stage, which reads the source.
    :param inputs: manifests that name these files.
    :param folder: folder of these files.
    :raises StepFailed: if the step fails on them.
    """
    from pipeline.execution.dask_step import build_frame, fingerprint, frame_schema

    recipe = next(step for step in stage_recipes(plan, stage) if isinstance(step, DaskRecipe))
    shell = plan_dask_stage(plan, stage, _unplanned(plan, recipe, files, limits), inputs=inputs, folder=folder)
    output = pa.ipc.read_schema(pa.py_buffer(shell.output_schema))
    work = shell.dask
    assert work is not None
    work = replace(work, columns=tuple(output.names))
    if recipe.origin and shell.role is not None and shell.role.reads_origin:
        schema = pa.schema([*work.main.arrow, pa.field("_file", pa.string()), pa.field("_row", pa.int64())])
        work = replace(work, main=replace(work.main, schema=bytes(schema.serialize().to_pybytes())))
    code = FoundCode(plan.code, plan.sources)
    with _function(recipe.entrypoint, code, settings) as function:
        frame = build_frame(work, function, storage=plan.spec.storage)
        schema = frame_schema(frame._meta, where=recipe.name)
        digest, partitions = fingerprint(frame, schema, shuffle=recipe.shuffle)
    work = replace(work, fingerprint=digest, partitions=partitions)
    return plan_dask_stage(plan, stage, work, inputs=inputs, folder=folder)


def _unplanned(plan: Plan, recipe: DaskRecipe, files: Discovery | None, limits: Limits) -> DaskWork:
    main = DaskTable.of(source_files(plan) if files is None else files)
    return DaskWork(recipe, main, max(1, limits.workers * limits.threads), 1, "")
