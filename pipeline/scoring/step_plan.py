"""Plan the frames of a job's steps on a sample, and check there that each step is row by row.

Batches are cut by time and by memory. A step whose result for a row depends on the rows beside it would give other
results on every run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.common.code_search import find_code
from pipeline.common.reasons import Reason, ReasonKind
from pipeline.common.step_code import FoundCode
from pipeline.common.step_modules import StepModules
from pipeline.errors import StepFailed
from pipeline.plan.recipe import MapRecipe
from pipeline.scoring.arrow import cast_exactly, first_difference, one_array, take_rows
from pipeline.scoring.frame_schemas import FrameSchemas, never_null_columns
from pipeline.scoring.rows import Failures, Rows
from pipeline.scoring.step_frames import check_source_columns, map_rows
from pipeline.scoring.steps import Step, import_steps
from pipeline.scoring.value_text import value_text
from pipeline.spec.parts import MapStep

_DROPPED, _RETURNED, _FAILED = range(3)
_SHOWN = 80
"""Largest number of characters of a value in a message."""
_OUTCOMES = ("dropped", "returned", "rejected")


@dataclass(frozen=True)
class PlannedFrames:
    """The frames of a job's steps, as a sample shows them."""

    schemas: tuple[pa.Schema, ...]
    """Schema after each step; columns that are never null are not nullable."""
    rows: pa.Table
    """The rows of the sample after the last step."""


def plan_frames(
    maps: Sequence[MapStep | MapRecipe],
    sample: pa.Table,
    *,
    never_null: Collection[str] = (),
    import_paths: Sequence[str] = (),
    code: FoundCode | None = None,
) -> PlannedFrames:
    """Find the columns after each map step by running the steps on a sample, and check that they are row-wise.

    Their modules are imported anew, and nothing of them stays in this process.

    :param sample: some rows of the source; may be empty.
    :param never_null: columns of the source without nulls.
    :param code: code of the steps. Default: found now.
    :raises StepFailed: when a step cannot be loaded, and see `plan_steps`.
    """
    if not maps:
        return PlannedFrames((), sample)
    recipes = [_map_recipe(step) for step in maps]
    code = code or find_code([step.entrypoint for step in recipes], import_paths=import_paths)
    modules = StepModules(code.steps, import_paths=import_paths, sources=code.sources)
    with modules.in_use():
        return plan_steps(import_steps(recipes, modules), sample, never_null=never_null)


def plan_steps(steps: Sequence[Step], sample: pa.Table, *, never_null: Collection[str] = ()) -> PlannedFrames:
    """Find the columns after each step by running the steps on a sample, and check that they are row-wise.

    Every step is called once to find its columns, and six times to check it.

    :raises SpecError: for a source column with the name of the frames' index.
    :raises StepFailed: when a step breaks its contract, is not row-wise, or works on no row.
    """
    check_source_columns(sample.schema)
    schemas, table, known = list[pa.Schema](), sample, frozenset(never_null)
    for step in steps:
        schema, table = plan_step(step, table, known)
        schemas.append(schema)
        known = never_null_columns(schema)
    return PlannedFrames(tuple(schemas), table)


def plan_step(step: Step, table: pa.Table, never_null: frozenset[str]) -> tuple[pa.Schema, pa.Table]:
    """Run a step on a sample, and check that it is row-wise. Return the schema of its result, and the rows.

    :raises StepFailed: see `plan_steps`.
    """
    schema, results, failures = _run_first(step, table, never_null)
    if step.row_wise == "checked":
        check_row_wise(step, table, results, failures, FrameSchemas(never_null, (schema,)))
    return schema, results.table


def _map_recipe(step: MapStep | MapRecipe) -> MapRecipe:
    return step if isinstance(step, MapRecipe) else MapRecipe.of(step)


def _run_first(step: Step, table: pa.Table, never_null: frozenset[str]) -> tuple[pa.Schema, Rows, Failures]:
    """Run a step without a planned schema. Return the schema that its result has, the rows, and those that fail."""
    mapped, failed = map_rows([step], Rows.from_table(table), schemas=FrameSchemas(never_null))
    if not mapped:
        is_frame = Reason.parse(failed.reasons[0]).kind is ReasonKind.FRAME
        raise StepFailed(
            "no row of a sample fits in the frame of a step" if is_frame else "the steps fail on every row of a sample",
            where=step.entrypoint,
            found=f"{failed.messages[0]}\non each of {len(failed)} rows that were tried",
            next_step="set dtype_backend: pyarrow at the step, or leave the column out of source.columns"
            if is_frame
            else "fix the step, then run it on a few rows of the source",
        )
    schema = pa.unify_schemas([rows.table.schema for rows in mapped], promote_options="permissive").remove_metadata()
    parts = [Rows(_cast_table(rows.table, schema), rows.position) for rows in mapped]
    return schema, Rows.concat(parts, schema), failed


def _cast_table(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [cast_exactly(one_array(table.column(field.name)), field.type) for field in schema]
    return pa.table(columns, names=schema.names)


@dataclass(frozen=True)
class _Variant:
    """Some rows of the sample, in some order."""

    name: str
    rows: np.ndarray
    """int64 [rows], positions in the sample."""


def _variants(count: int, failed: np.ndarray) -> Iterator[_Variant]:
    """Yield variants of the sample without its failed rows but one: each costs some ten calls of the step to find."""
    rows = np.delete(np.arange(count, dtype=np.int64), failed)
    count = len(rows)
    yield _Variant("the same rows again", rows)
    yield _Variant("the first half of the rows", rows[: count // 2])
    yield _Variant("the second half of the rows", rows[count // 2 :])
    yield _Variant("every second row", rows[1::2])
    yield _Variant("the rows in reverse order", np.sort(np.append(rows, failed[:1]))[::-1])
    yield _Variant("a single row", rows[count // 3 : count // 3 + 1])


def check_row_wise(step: Step, table: pa.Table, results: Rows, failures: Failures, schemas: FrameSchemas) -> None:
    """Check that the result of a step for a row does not depend on the other rows, bit by bit.

    :param table: the sample.
    :param results: result of the step for the whole sample.
    :param failures: rows of the sample on which the step raises.
    :param schemas: planned schemas of the step.
    :raises StepFailed: if it does depend on them.
    """
    count = table.num_rows
    outcomes = _outcomes(count, results.position, failures.rows)
    number = np.zeros(count, dtype=np.int64)
    number[results.position] = np.arange(len(results))
    for variant in _variants(count, failures.rows):
        if not len(variant.rows):
            continue
        sample = Rows.from_table(take_rows(table, variant.rows))
        try:
            mapped, failed = map_rows([step], sample, schemas=schemas, any_worked=True)
        except StepFailed as error:
            error.found = f"{error.found}, with {variant.name} of a sample".removeprefix(", ")
            raise
        returned = Rows.concat(mapped, results.table.schema)
        rows = variant.rows[returned.position]
        _check_outcomes(step, variant, outcomes, _outcomes(count, rows, variant.rows[failed.rows]))
        _check_values(step, variant, rows, take_rows(results.table, number[rows]), returned.table)


def _outcomes(count: int, returned: np.ndarray, failed: np.ndarray) -> np.ndarray:
    outcomes = np.full(count, _DROPPED)
    outcomes[returned], outcomes[failed] = _RETURNED, _FAILED
    return outcomes


def _check_outcomes(step: Step, variant: _Variant, expected: np.ndarray, outcomes: np.ndarray) -> None:
    differing = variant.rows[expected[variant.rows] != outcomes[variant.rows]]
    if len(differing):
        row = int(differing[0])
        with_all, with_some = _OUTCOMES[expected[row]], _OUTCOMES[outcomes[row]]
        raise _depends(step, f"row {row} of a sample is {with_all} with all rows, {with_some} with {variant.name}")


def _check_values(step: Step, variant: _Variant, rows: np.ndarray, expected: pa.Table, table: pa.Table) -> None:
    for name in expected.column_names:
        with_all, with_some = (one_array(part.column(name)) for part in (expected, table))
        index = first_difference(with_all, with_some)
        if index is not None:
            shown, changed = (value_text(array, index, limit=_SHOWN) for array in (with_all, with_some))
            values = f"{shown} with all rows, {changed} with {variant.name}"
            raise _depends(step, f"column {name!r}, row {rows[index]} of a sample: {values}")


def _depends(step: Step, found: str) -> StepFailed:
    return StepFailed(
        "the result of a step for a row depends on the other rows",
        where=step.entrypoint,
        found=found,
        expected="the same result for a row, bit by bit, whichever rows are in the frame with it",
        next_step="compute means, ranks, sums over rows and the like before the job, and join them by a key; "
        "or accept that results depend on the batches: row_wise: unchecked at this step",
    )
