"""Compute outputs of an xgboost model from its margins or predictions, with xgboost's bits."""

from __future__ import annotations

import numpy as np

from pipeline.models.model import ModelVersion
from pipeline.models.trees import apply_transform
from pipeline.models.trees.xgboost import transform_name
from pipeline.spec.model_ref import OutputKind


def outputs_of_margins(version: ModelVersion, margins: np.ndarray, *, kind: OutputKind) -> np.ndarray:
    """Return the outputs for float32 margins, [rows] or [rows, outputs], as `Predictor.predict` returns them.

    :param margins: in C order; they may be changed.
    :param kind: prediction, label or margin.
    """
    if kind == "margin":
        return margins
    scores = apply_transform(transform_name(version.objective), margins)
    return labels(version, scores) if kind == "label" else scores


def outputs_of_predictions(version: ModelVersion, scores: np.ndarray, *, kind: OutputKind) -> np.ndarray:
    """Return the output ``kind`` for scores of the kind ``prediction``; margins as they are."""
    if kind == "label":
        return labels(version, scores)
    if kind == "probabilities" and scores.ndim == 1:
        # As predict_proba of xgboost's scikit-learn wrapper.
        return np.ascontiguousarray(np.vstack((1.0 - scores, scores)).T)
    return scores


def labels(version: ModelVersion, scores: np.ndarray) -> np.ndarray:
    """Return the class as in xgboost's scikit-learn wrapper: 1 above one half; multi-class: the first highest score.

    :param scores: scores of the kind ``prediction``. For ``binary:logitraw`` the limit is 0.
    """
    if version.task == "multiclass":
        return (scores.argmax(axis=1) if scores.ndim == 2 else scores).astype(np.int32)
    limit = 0.0 if version.objective == "binary:logitraw" else 0.5
    return (scores > limit).astype(np.int32)
