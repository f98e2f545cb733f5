"""Score pandas frames with the code that scores partitions: `to_dask` and `score`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.common.rows import RowCounts
from pipeline.errors import InputError, SchemaDrift
from pipeline.models.engines import get_evaluator
from pipeline.models.flavors import find_flavor
from pipeline.models.model import ModelVersion
from pipeline.models.outputs import output_type
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import ScoreRecipe, StageRecipe
from pipeline.scoring.arrow import CONVERSION_ERRORS
from pipeline.scoring.contract import check, check_matrix, feature_rules
from pipeline.scoring.outputs import check_scores, prediction_schema
from pipeline.scoring.pandas_frame import default_frame
from pipeline.scoring.partition import RowCounter, Versions, read_partition
from pipeline.scoring.predictors import open_predictors
from pipeline.scoring.scorer import Scorer
from pipeline.sources import SourceBatch, parse_filter, read_ahead
from pipeline.sources.types import empty_table
from pipeline.spec.score import Output
from pipeline.storage.urls import own_storage_options, use_storage_options

FRAME_BATCH_ROWS = 1 << 16
"""Rows of a pandas frame per batch."""
_NEXT_STEP = "leave the column out of score.keep, or run the job: its output holds every value"


def score_to_frame(recipe: StageRecipe, partition: Partition, versions: Versions | None = None) -> pd.DataFrame:
    """Score ``partition`` to a frame, without files. Rejected rows are left out.

    :returns: columns of the output schema; ``frame.attrs["rows"]`` holds the row counts, ``frame.attrs["reasons"]`` the
        rejects by reason.
    """
    table, counter = score_to_table(recipe, partition, versions)
    frame = default_frame(table, next_step=_NEXT_STEP)
    frame.attrs["rows"] = RowCounts.total(file.rows for file in counter.file_counts()).to_dict()
    frame.attrs["reasons"] = dict(counter.reasons)
    return frame


@own_storage_options()
def score_to_table(
    recipe: StageRecipe, partition: Partition, versions: Versions | None = None
) -> tuple[pa.Table, RowCounter]:
    """Score ``partition`` to a table, without files. Rejected rows are left out.

    :returns: the output, and the counts of its rows.
    """
    use_storage_options(recipe.storage)
    scorer = Scorer(recipe, open_predictors(recipe, get_evaluator).predictors)
    counter = RowCounter(partition)
    tables = [empty_table(pa.ipc.read_schema(pa.py_buffer(recipe.output_schema)))]
    for batch in read_ahead(read_partition(recipe, partition, versions=versions)):
        scored = scorer.score_batch(batch, paths=counter.paths)
        counter.add(scored)
        tables.append(scored.table)
    return pa.concat_tables(tables), counter


def score_table(recipe: StageRecipe, table: pa.Table) -> pa.Table:
    """Return the output for rows that are in memory. Rejected and filtered rows are left out.

    :param table: rows with the columns of the recipe's source.
    """
    if recipe.filter is not None:
        table = table.filter(parse_filter(recipe.filter).mask(table))
    scorer = Scorer(recipe, open_predictors(recipe, get_evaluator).predictors)
    tables = [empty_table(pa.ipc.read_schema(pa.py_buffer(recipe.output_schema)))]
    for start in range(0, table.num_rows, FRAME_BATCH_ROWS):
        rows = table.slice(start, FRAME_BATCH_ROWS)
        numbers = np.arange(start, start + rows.num_rows, dtype=np.int64)
        batch = SourceBatch(rows, np.zeros(rows.num_rows, np.int32), numbers, np.zeros(1, np.int64))
        tables.append(scorer.score_batch(batch, paths=("",)).table)
    return pa.concat_tables(tables)


def default_rows(table: pa.Table) -> pd.DataFrame:
    """Return a table of output as `score_to_frame` does."""
    return default_frame(table, next_step=_NEXT_STEP)


def scored_meta(recipe: StageRecipe) -> pd.DataFrame:
    """Return an empty frame with the columns and dtypes of `score_to_frame`."""
    schema = pa.ipc.read_schema(pa.py_buffer(recipe.output_schema))
    return default_frame(empty_table(schema), next_step=_NEXT_STEP)


def score_pandas(
    frame: pd.DataFrame, version: ModelVersion, *, features: Sequence[str] | None = None, output: Output
) -> pd.DataFrame:
    """Return ``frame`` with the columns of ``output`` added; index and other columns stay as they are.

    :param features: column for each feature of the model, in its order. Default: the model's own names.
    :raises SchemaDrift: when a column is missing or cannot be a feature.
    :raises InputError: when a row breaks the model's contract; a frame has no rejects.
    """
    names = list(features or version.feature_names)
    if missing := [name for name in names if name not in frame.columns]:
        raise SchemaDrift(
            "the frame lacks features of the model",
            found=", ".join(map(str, frame)),
            expected=", ".join(missing),
            next_step="name the columns in the order of the model's features",
        )
    rules = feature_rules(version, names)
    has_matrix = find_flavor(version.flavor).takes == "matrix"
    finite = frozenset(rule.column for rule in rules if rule.finite and has_matrix)
    schema = prediction_schema(version, output)
    evaluator, _ = get_evaluator(ScoreRecipe(version, tuple(names), output.kind, tuple(schema.names)))
    expected = output_type(version, output.kind)
    assert expected is not None  # prediction_schema has checked it
    parts = [np.empty((0, expected.width), dtype=expected.dtype)]
    for start in range(0, len(frame), FRAME_BATCH_ROWS):
        table = _from_pandas(frame[names].iloc[start : start + FRAME_BATCH_ROWS])
        failures = check(table, rules, skip_finite=finite)
        matrix = evaluator.encode(table)
        failures = failures if len(failures) else check_matrix(matrix, table, names, finite)
        if len(failures):
            raise InputError(
                "rows cannot be scored",
                where=f"row {start + int(failures.rows[0])} of a partition",
                found=failures.messages[0],
                next_step="drop such rows before, or run a job, which writes them to the rejects",
            )
        scores = evaluator.predict(matrix, kind=output.kind)
        check_scores(scores, rows=len(matrix), expected=expected)
        parts.append(scores.reshape(len(matrix), expected.width))
    scores = np.concatenate(parts)
    if expected.is_list:
        return frame.assign(**{schema.names[0]: pd.Series(list(scores), index=frame.index, dtype=object)})
    return frame.assign(**{name: scores[:, index] for index, name in enumerate(schema.names)})


def _from_pandas(frame: pd.DataFrame) -> pa.Table:
    try:
        return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    except CONVERSION_ERRORS as error:
        raise SchemaDrift("the model cannot take a column", found=str(error)[:300]) from error
