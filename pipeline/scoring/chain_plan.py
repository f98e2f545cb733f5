"""Plan the frames of a job's ``map`` steps on a sample that passes through all steps before them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice

import pyarrow as pa

from pipeline.common.step_code import FoundCode
from pipeline.common.step_modules import StepModules
from pipeline.models.cache import get_predictor
from pipeline.models.model import ModelVersion
from pipeline.models.outputs import output_type
from pipeline.plan.chain import ChainFrames, PlanDask
from pipeline.plan.recipe import MapRecipe
from pipeline.scoring.frame_schemas import never_null_columns
from pipeline.scoring.outputs import prediction_schema, score_columns
from pipeline.scoring.step_frames import check_source_columns
from pipeline.scoring.step_plan import plan_step
from pipeline.scoring.steps import Step, import_steps
from pipeline.sources.filters.parse import parse_filter
from pipeline.sources.types import empty_table
from pipeline.spec.job_spec import AnyStep
from pipeline.spec.parts import CheckpointStep, DaskStep, FilterStep, MapStep, SelectStep
from pipeline.spec.score import Score, ScoreStep


def plan_chain_frames(
    steps: Sequence[AnyStep],
    sample: pa.Table,
    *,
    models: Sequence[ModelVersion],
    never_null: Collection[str],
    import_paths: Sequence[str],
    code: FoundCode,
    ends: Collection[int] = (),
    plan_dask: PlanDask | None = None,
) -> ChainFrames:
    """Find the columns after each ``map`` step by running all steps up to the last of them on a sample.

    Where a column is missing, the rest is not run: `pipeline.plan.chain.resolve_chain` explains it.

    :param sample: some rows of the source; may be empty.
    :param models: model version of each model reference, loaded in this process.
    :param never_null: columns of the source without nulls.
    :param ends: numbers of the first steps of later stages.
    :param plan_dask: plans ``dask`` steps; needed if there are any.
    :raises StepFailed: when a step cannot be loaded, breaks its contract, is not row-wise, or works on no row.
    """
    maps = [step for step in steps if isinstance(step, MapStep)]
    if not maps:
        return ChainFrames()
    check_source_columns(sample.schema)
    modules = StepModules(code.steps, import_paths=import_paths, sources=code.sources)
    with modules.in_use():
        loaded = import_steps(list(map(MapRecipe.of, maps)), modules)
        found = list(
            _map_schemas(
                steps,
                sample,
                maps=iter(loaded),
                models=iter(models),
                known=frozenset(never_null),
                ends=ends,
                plan_dask=plan_dask,
            )
        )
    return ChainFrames(
        tuple(one for one in found if isinstance(one, pa.Schema)),
        tuple(one for one in found if not isinstance(one, pa.Schema)),
    )


class _MissingColumnError(Exception):
    """A step needs a column that the sample does not have."""


def _map_schemas(
    steps: Sequence[AnyStep],
    table: pa.Table,
    *,
    maps: Iterator[Step],
    models: Iterator[ModelVersion],
    known: frozenset[str],
    ends: Collection[int],
    plan_dask: PlanDask | None,
) -> Iterator[pa.Schema | frozenset[str]]:
    """Yield the schema after each ``map`` step, and the columns without nulls at each checkpoint."""
    last = max(number for number, step in enumerate(steps) if isinstance(step, MapStep))
    for number, step in enumerate(steps[: last + 1]):
        if number in ends:
            yield known
        if isinstance(step, MapStep):
            schema, table = plan_step(next(maps), table, known)
            known = never_null_columns(schema)
            yield schema
            continue
        if isinstance(step, CheckpointStep):
            continue
        if isinstance(step, DaskStep):
            assert plan_dask is not None
            table, known = empty_table(plan_dask(step, table.schema).schema), frozenset()
            continue
        try:
            table, known = _apply(step, table, models, known)
        except _MissingColumnError:
            return


def _apply(
    step: FilterStep | SelectStep | ScoreStep, table: pa.Table, models: Iterator[ModelVersion], known: frozenset[str]
) -> tuple[pa.Table, frozenset[str]]:
    """Return the sample after a step, and its columns without nulls."""
    if isinstance(step, FilterStep):
        condition = parse_filter(step.filter)
        _expect(table, condition.columns)
        return table.filter(condition.mask(table)), known
    if isinstance(step, SelectStep):
        _expect(table, step.columns.values())
        selected = table.select(list(step.columns.values())).rename_columns(list(step.columns))
        return selected, frozenset(new for new, old in step.columns.items() if old in known)
    used = list(zip(islice(models, len(step.score.references)), step.score.by_reference, strict=True))
    scores = _stacked(used, table) if step.score.meta is not None else _scores(used[0][1], used[0][0], table)
    left = table.drop_columns([name for name in scores.column_names if name in table.column_names])
    for name in scores.column_names:
        left = left.append_column(name, scores.column(name))
    names = set(scores.column_names)
    is_whole = step.score.where is None and step.score.shadow is None and step.score.other is not None
    return left, known | names if is_whole else known - names


def _scores(score: Score, version: ModelVersion, table: pa.Table) -> pa.Table:
    """Return the columns of a score for the sample; null for all rows if the model cannot take one of them.

    Workers find the rows at fault and reject them; here only the frame of the next step matters.
    """
    features = list(score.features or version.feature_names)
    _expect(table, features)
    schema = prediction_schema(version, score.output_spec)
    try:
        predictor, _ = get_predictor(version)
        values = predictor.predict(predictor.encode(table.select(features)), kind=score.output_spec.kind)
    except (ValueError, TypeError, KeyError, pa.ArrowException):
        return pa.table([pa.nulls(table.num_rows, field.type) for field in schema], schema=schema)
    found = output_type(version, score.output_spec.kind)
    assert found is not None  # the schema is its own
    columns = score_columns(values.reshape(table.num_rows, found.width), found)
    return pa.table(columns, schema=schema)


def _stacked(used: Sequence[tuple[ModelVersion, Score]], table: pa.Table) -> pa.Table:
    """Return the columns of the last model, whose features are the results of the others."""
    *below, (meta, score) = used
    columns = [column for version, one in below for column in _scores(one, version, table).columns]
    names = list(meta.feature_names)
    if len(columns) != len(names):
        raise _MissingColumnError
    return _scores(score, meta, pa.Table.from_arrays(columns, names=names))


def _expect(table: pa.Table, names: Iterable[str]) -> None:
    if not set(names) <= set(table.column_names):
        raise _MissingColumnError
