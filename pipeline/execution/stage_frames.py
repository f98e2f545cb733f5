"""Return a plan with ``dask`` steps as a lazy Dask DataFrame, for notebooks. Nothing is kept between its stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pyarrow as pa

from pipeline.common.step_modules import StepModules
from pipeline.execution.dask_config import override_config
from pipeline.execution.dask_step import (
    DaskFrame,
    apply_step,
    arrow_frame,
    empty_arrow_frame,
    partition_table,
    table_frame,
)
from pipeline.execution.fragment_frames import read_fragments
from pipeline.execution.graph import fragments
from pipeline.execution.tasks import without_secrets
from pipeline.plan.dask_recipe import DaskRecipe, DaskTable
from pipeline.plan.outline import Stage, outline
from pipeline.plan.plan import Plan
from pipeline.plan.planner import source_files, stage_recipes
from pipeline.plan.recipe import StageRecipe
from pipeline.scoring.frames import default_rows, score_table, score_to_table

_CONFIG = {"dataframe.convert-string": False}


def staged(plan: Plan, recipe_of: Callable[[Stage], StageRecipe], modules: StepModules) -> DaskFrame:
    """Return the rows after the last step as a lazy Dask DataFrame.

    :param recipe_of: returns what a worker needs for a stage without ``dask`` step.
    :param modules: those of the ``dask`` steps.
    """
    frame: Any = None
    for stage in outline(plan.spec):
        steps = [step for step in stage_recipes(plan, stage) if isinstance(step, DaskRecipe)]
        if not steps:
            frame = _scored(plan, recipe_of(stage), frame)
            continue
        names = _schema(plan.stages[stage.number].output_schema).names
        frame = _stepped(plan, steps[0], frame, modules)[names]
    output = plan.stages[-1].output_schema
    with override_config(_CONFIG):
        meta = default_rows(_schema(output).empty_table())
        made: DaskFrame = frame.map_partitions(to_default, output, meta=meta, enforce_metadata=False)
    return made


def _schema(schema: bytes) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(schema))


def _stepped(plan: Plan, recipe: DaskRecipe, frame: Any, modules: StepModules) -> Any:
    """Apply a ``dask`` step to a frame; None: the rows of the source."""
    threads, target, storage = plan.workers, recipe.partition_bytes, plan.spec.storage
    with override_config(_CONFIG):
        if frame is None:
            main = DaskTable.of(source_files(plan))
            parts = main.packed(threads=threads, target_bytes=target)
            frame = table_frame(main, parts, origin=recipe.origin, storage=storage, label="source")
        named = {
            name: table_frame(table, table.packed(threads=threads, target_bytes=target), storage=storage, label=name)
            for name, table in recipe.inputs
        }
        with modules.in_use():
            function = modules.function(recipe.entrypoint)
            return apply_step(function, frame, named, where=recipe.name, is_lowered=False)


def _scored(plan: Plan, recipe: StageRecipe, frame: Any) -> Any:
    """Apply the steps of a stage to a frame; None: to the rows of the source."""
    meta = empty_arrow_frame(_schema(recipe.output_schema))
    with override_config(_CONFIG):
        if frame is None:
            read = fragments(plan.partitions, plan.versions)
            return read.map_partitions(score_fragments, recipe, meta=meta, enforce_metadata=False)
        return frame.map_partitions(score_rows, recipe, meta=meta, enforce_metadata=False)


def score_fragments(frame: pd.DataFrame, recipe: StageRecipe) -> pd.DataFrame:
    """Return the rows of the partition of these fragments after the steps of a stage, with Arrow's types."""
    partition, versions = read_fragments(frame)
    try:
        return arrow_frame(score_to_table(recipe, partition, versions)[0])
    except Exception as error:
        raise without_secrets(error) from None


def score_rows(frame: pd.DataFrame, recipe: StageRecipe) -> pd.DataFrame:
    """Return rows after the steps of a stage, with Arrow's types."""
    try:
        return arrow_frame(score_table(recipe, partition_table(frame, _schema(recipe.schema), where="to_dask")))
    except Exception as error:
        raise without_secrets(error) from None


def to_default(frame: pd.DataFrame, schema: bytes) -> pd.DataFrame:
    """Return rows with the types that frames of an output have."""
    return default_rows(partition_table(frame, _schema(schema), where="to_dask"))
