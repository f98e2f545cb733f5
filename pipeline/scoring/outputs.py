"""Columns that scoring adds: the results of the model, and the columns of rejects beside those of the source."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.errors import BadPrediction, SpecError
from pipeline.models.model import ModelVersion
from pipeline.plan.recipe import REJECT_FILE, REJECT_MESSAGE, REJECT_REASON, REJECT_ROW
from pipeline.spec.model_ref import OutputKind
from pipeline.spec.parts import Output

REJECT_FIELDS = (
    (REJECT_FILE, pa.string()),
    (REJECT_ROW, pa.int64()),
    (REJECT_REASON, pa.string()),
    (REJECT_MESSAGE, pa.string()),
)


def prediction_schema(version: ModelVersion, output: Output) -> pa.Schema:
    """Return the columns of a model's ``output``: ``column``, or ``column_0`` … for several values per row.

    :raises SpecError: when the model has no such output.
    """
    widths = {
        "prediction": version.outputs,
        "margin": version.margins,
        "leaf": version.trees,
        "contributions": (len(version.features) + 1) * version.margins,
        "label": {"binary": version.outputs, "multiclass": 1}.get(version.task, 0),
    }
    width = widths[output.kind]
    if width == 0:
        raise SpecError(
            f"the model has no output of the kind {output.kind!r}",
            where="score.output.kind",
            found=f"{version.task} model, objective {version.objective or 'unknown'}",
            expected=", ".join(kind for kind, values in widths.items() if values),
        )
    names = [output.column] if width == 1 else [f"{output.column}_{index}" for index in range(width)]
    return pa.schema([(name, pa.from_numpy_dtype(score_dtype(output.kind))) for name in names])


def reject_schema(source: pa.Schema) -> pa.Schema:
    """Return the columns of rejects: those of the source, then file, row number in it from 0, reason, message."""
    for name, kind in REJECT_FIELDS:
        source = source.append(pa.field(name, kind))
    return source.remove_metadata()


def score_dtype(kind: OutputKind) -> np.dtype[np.float32] | np.dtype[np.int32]:
    """Return the dtype of the values of ``kind``."""
    return np.dtype(np.int32) if kind in ("label", "leaf") else np.dtype(np.float32)


def check_scores(scores: np.ndarray, *, rows: int, width: int, kind: OutputKind) -> np.ndarray:
    """Return ``scores``, [rows] or [rows, width] if ``width`` is more than 1.

    :raises BadPrediction: if ``scores`` are not one result per row.
    """
    shapes = [(rows,), (rows, 1)] if width == 1 else [(rows, width)]
    if isinstance(scores, np.ndarray) and scores.shape in shapes and scores.dtype == score_dtype(kind):
        return scores.reshape(rows) if width == 1 else scores
    found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, np.ndarray) else type(scores).__name__
    raise BadPrediction(
        "the model did not return one result a row",
        found=found,
        expected=f"{score_dtype(kind)} {list(shapes[0])}",
        next_step="fix the predictor: it must return one result for each row, in order",
    )
