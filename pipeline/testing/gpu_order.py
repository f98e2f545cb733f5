"""Compute margins in the order of xgboost's GPU predictor, on the CPU, from the leaves that rows reach."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xgboost

from pipeline.models.trees.xgboost import base_margin, base_scores, booster_part, read_ubj, tree_range


def gpu_order_margins(
    data: bytes, matrix: npt.NDArray[np.float32], *, iteration_range: tuple[int, int] = (0, 0)
) -> npt.NDArray[np.float32]:
    """Return the margins of a tree model as its GPU predictor adds them: [rows], or [rows, outputs].

    For one output a row's leaves are added from 0 on, and the base last. For several outputs each leaf is added to its
    output, from the base on.

    :param data: a model as ``booster.save_raw("ubj")`` returns it.
    :param matrix: float32 [rows, features].
    """
    model = read_ubj(data)
    learner = model["learner"]
    booster, _ = booster_part(learner)
    base = base_margin(base_scores(learner), objective=str(learner["objective"]["name"]))
    first, last = tree_range(booster, outputs=len(base), iteration_range=iteration_range)
    library = xgboost.Booster({"nthread": 1, "verbosity": 0}, model_file=bytearray(data))
    # xgboost finds the leaves of all rounds only.
    reached = library.predict(xgboost.DMatrix(matrix, nthread=1), pred_leaf=True, validate_features=False)
    nodes = reached.reshape(len(matrix), -1).astype(np.int64)
    out = np.zeros((len(matrix), len(base)), np.float32)
    if len(base) > 1:
        out += base
    for number in range(first, last):
        values = np.asarray(booster["trees"][number]["split_conditions"], np.float32)
        out[:, int(booster["tree_info"][number])] += values[nodes[:, number]]
    return out if len(base) > 1 else base[0] + out[:, 0]
