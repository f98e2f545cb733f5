"""Small models for the demo, the tests and the benchmarks; not a training framework."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xgboost


def train(
    frame: pd.DataFrame, target: Any, *, path: Path, params: Mapping[str, Any], rounds: int, **options: Any
) -> Path:
    """Train on ``frame`` (one feature per column, pandas categories as categorical features) and save to ``path``.

    :param target: [rows] or [rows, targets].
    :param options: further arguments of `xgboost.DMatrix`, such as ``qid``.
    """
    matrix = xgboost.DMatrix(frame, target, enable_categorical=True, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    xgboost.train({"nthread": 1, **params}, matrix, rounds).save_model(path)
    return path


def predict(frame: pd.DataFrame, *, model: Path, **options: Any) -> np.ndarray:
    """Return the result of `xgboost.Booster.predict` for ``frame`` with the model saved at ``model``."""
    booster = xgboost.Booster(model_file=str(model))
    booster.set_param({"nthread": 1})
    result: np.ndarray = booster.predict(xgboost.DMatrix(frame, enable_categorical=True), **options)
    return result
