"""Columns that scoring adds: the results of the model, and the columns of rejects beside those of the source."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.errors import BadPrediction, SpecError
from pipeline.models.model import ModelVersion, OutputType
from pipeline.models.outputs import output_type, output_types
from pipeline.plan.recipe import REJECT_FILE, REJECT_MESSAGE, REJECT_REASON, REJECT_ROW
from pipeline.spec.score import Output

REJECT_FIELDS = (
    (REJECT_FILE, pa.string()),
    (REJECT_ROW, pa.int64()),
    (REJECT_REASON, pa.string()),
    (REJECT_MESSAGE, pa.string()),
)


def prediction_schema(version: ModelVersion, output: Output) -> pa.Schema:
    """Return the columns of a model's ``output``: ``column``, or ``column_0`` … for several values per row.

    Values that have names are ``column_<name>``; those of an embedding are one column of fixed-size lists.

    :raises SpecError: when the model has no such output.
    """
    found = output_type(version, output.kind)
    if found is None:
        raise SpecError(
            f"the model has no output of the kind {output.kind!r}",
            where="score.output.kind",
            found=f"{version.task} model, objective {version.objective or 'unknown'}",
            expected=", ".join(known.kind for known in output_types(version)),
        )
    return found.columns(output.column)


def reject_schema(source: pa.Schema) -> pa.Schema:
    """Return the columns of rejects: those of the source, then file, row number in it from 0, reason, message."""
    for name, kind in REJECT_FIELDS:
        source = source.append(pa.field(name, kind))
    return source.remove_metadata()


def score_columns(scores: np.ndarray, output: OutputType) -> list[pa.Array]:
    """Return one array a column of ``scores``, [rows] or [rows, width], of the type of the planned output."""
    kind = output.arrow
    if output.types:
        values = scores.reshape(len(scores), -1)
        return [pa.array(values[:, index], type=type_) for index, type_ in enumerate(output.arrow_types)]
    if output.is_list:
        return [pa.FixedSizeListArray.from_arrays(pa.array(scores.reshape(-1), type=kind), output.width)]
    return [pa.array(one, type=kind) for one in ([scores] if scores.ndim == 1 else np.ascontiguousarray(scores.T))]


def check_scores(scores: np.ndarray, *, rows: int, expected: OutputType) -> np.ndarray:
    """Return ``scores``, [rows] or [rows, width] if the width is more than 1.

    :raises BadPrediction: if ``scores`` are not one result per row.
    """
    width, dtype = expected.width, expected.dtype
    is_flat = width == 1 and not expected.is_list
    shapes = [(rows,), (rows, 1)] if is_flat else [(rows, width)]
    if isinstance(scores, np.ndarray) and scores.shape in shapes and scores.dtype == dtype:
        return scores.reshape(rows) if is_flat else scores
    found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, np.ndarray) else type(scores).__name__
    raise BadPrediction(
        "the model did not return one result a row",
        found=found,
        expected=f"{dtype} {list(shapes[0])}",
        next_step="fix the predictor: it must return one result for each row, in order",
    )
