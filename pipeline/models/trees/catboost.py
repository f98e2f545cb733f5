"""Read tree tables and outputs from CatBoost's JSON (``save_model(format="json")``), without importing CatBoost.

The rules follow CatBoost 1.2: ``libs/model/cpu/evaluator_impl.cpp`` and ``quantization.h``. Trees are symmetric: all
nodes of one depth test the same, so a tree has as many tests as levels, and the kernels need no operation to combine
them. Leaves are added in double precision from 0, in the order of the trees; then the sum is scaled and the bias added.

Outputs. Raw values, and the sigmoid of classifiers with two classes, have CatBoost's bits. Softmax and ``exp`` are
CatBoost's own approximations, which the C library's differ from by up to two units in the last place (4.4e-16 of the
value); they are refused.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import ModelError
from pipeline.models.trees import library
from pipeline.models.trees.tables import VECTOR_LEAVES, Floats, TreeTables, unsupported
from pipeline.models.trees.thresholds import next_above

Model = Mapping[str, Any]
"""The JSON object of a model, or a part of it."""

LOSSES: dict[str, str] = {
    "RMSE": "identity",
    "MAE": "identity",
    "Quantile": "identity",
    "MAPE": "identity",
    "Huber": "identity",
    "LogCosh": "identity",
    "Expectile": "identity",
    "MultiRMSE": "identity",
    "QueryRMSE": "identity",
    "YetiRank": "identity",
    "PairLogit": "identity",
    "Logloss": "logistic",
    "CrossEntropy": "logistic",
    "MultiClassOneVsAll": "logistic",
}
"""Transformation from raw value to output (of class 1, or of each class) by the name of the loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CatboostOutput:
    """Turns sums of leaves into raw values, or into outputs. A transformation of ``TreeEngine``."""

    scale: float
    bias: tuple[float, ...]
    """One number for each output."""
    name: str
    """``logistic`` or ``identity``."""

    def __call__(self, margins: Floats) -> Floats:
        """Return the outputs. The margins are overwritten."""
        margins *= self.scale
        margins += np.array(self.bias)
        if self.name != "identity":
            library.transform(self.name, margins.reshape(len(margins), -1), parameters=(1.0,))
        return margins


def read_catboost(model: Model) -> TreeTables:
    """Build the tables of a model, which score float32 rows.

    :raises ModelError: when ``unsupported_catboost`` returns a reason.
    """
    reasons = _unreadable(model)
    if reasons:
        raise _refusal(reasons)
    outputs = len(_bias(model))
    features = model["features_info"]["float_features"]
    numbers = np.array([feature["flat_feature_index"] for feature in features])
    # A missing value is above every border, or above none.
    missing_right = np.array([feature["nan_value_treatment"] == "AsTrue" for feature in features])
    trees = [_read_tree(tree, outputs) for tree in model["oblivious_trees"]]
    feature = _join([tree.feature for tree in trees], np.int64)
    above = next_above(_join([tree.border for tree in trees], np.float64), np.float32)
    left = _join([tree.left for tree in trees], np.int32)
    tables = TreeTables(
        start=np.cumsum([0, *(len(tree.left) for tree in trees)], dtype=np.int64),
        output=np.full(len(trees), VECTOR_LEAVES if outputs > 1 else 0, np.int32),
        feature=numbers[feature],
        threshold=above,
        left=left,
        right=np.where(left < 0, -1, left + 1),
        default_left=~missing_right[feature],
        is_category=np.zeros(len(left), bool),
        category_start=np.zeros(len(left) + 1, np.int64),
        categories=np.zeros(0, np.int32),
        leaf=np.concatenate([np.zeros((0, outputs)), *(tree.leaf for tree in trees)]),
        base=np.zeros(outputs),
        n_features=len(features),
        sum_type=np.float64,
    )
    reasons = list(unsupported(tables))
    if reasons:
        raise _refusal(reasons)
    return tables


def catboost_output(model: Model, *, raw: bool = False) -> CatboostOutput:
    """Return the transformation from margins to ``predict`` of regressors and rankers, or probabilities.

    :param raw: return ``prediction_type="RawFormulaVal"`` instead: of any model.
    :raises ModelError: when ``unsupported_catboost`` returns a reason.
    """
    reasons = _unreadable(model) or ([] if raw else _other_outputs(model))
    if reasons:
        raise _refusal(reasons)
    scale, _ = model["scale_and_bias"]
    return CatboostOutput(scale=scale, bias=_bias(model), name="identity" if raw else LOSSES[_loss(model)])


def unsupported_catboost(model: Model, *, raw: bool = False) -> tuple[str, ...]:
    """Return the reasons why the tree engine cannot score this model; empty if ``read_catboost`` can read it."""
    reasons = _unreadable(model) or ([] if raw else _other_outputs(model))
    if reasons:
        return tuple(reasons)
    try:
        read_catboost(model)
    except ModelError as error:
        return (error.found or error.message,)
    return ()


def _refusal(reasons: Sequence[str]) -> ModelError:
    return ModelError(
        "the tree engine cannot score this model", found="; ".join(reasons), next_step="score it with CatBoost itself"
    )


def _unreadable(model: Model) -> list[str]:
    if "features_info" not in model or "scale_and_bias" not in model:
        return ["a model that is not CatBoost's JSON"]
    if "oblivious_trees" not in model:
        return ["trees that are not symmetric (grow_policy)"]
    other = sorted(set(model["features_info"]) - {"float_features"})
    if other:
        return [f"features of other kinds than numbers: {', '.join(other)}"]
    kinds = {split["split_type"] for tree in model["oblivious_trees"] for split in tree["splits"]} - {"FloatFeature"}
    if kinds:
        return [f"splits of the kind {kind}" for kind in sorted(kinds)]
    borders = [split["border"] for tree in model["oblivious_trees"] for split in tree["splits"]]
    return [] if np.isfinite(borders).all() else ["a border that is not finite"]


def _other_outputs(model: Model) -> list[str]:
    loss = _loss(model)
    if loss not in LOSSES:
        return [f"the output of {loss}: CatBoost's own exp, or unknown"]
    if LOSSES[loss] != "identity" and not sys.platform.startswith("linux"):
        return [f"the output of {loss} on {sys.platform}: checked with glibc's exp only"]
    return []


def _loss(model: Model) -> str:
    parameters = model.get("model_info", {}).get("params", {})
    return str(parameters.get("loss_function", {}).get("type", "a loss without a name"))


def _bias(model: Model) -> tuple[float, ...]:
    _, bias = model["scale_and_bias"]
    return tuple(bias) if isinstance(bias, list) else (float(bias),)


class _Tree(NamedTuple):
    """[nodes] arrays of one tree, level by level; [nodes, outputs] leaves."""

    left: npt.NDArray[np.int32]
    feature: npt.NDArray[np.int64]
    border: npt.NDArray[np.float64]
    leaf: npt.NDArray[np.float64]


def _read_tree(tree: Model, outputs: int) -> _Tree:
    """Return a complete tree. Bit k of a leaf's number is split k: the root has the last split."""
    splits = list(reversed(tree["splits"]))
    inner = (1 << len(splits)) - 1
    levels = np.repeat(np.arange(len(splits)), 1 << np.arange(len(splits)))
    values = np.array(tree["leaf_values"], dtype=np.float64).reshape(-1, outputs)
    if len(values) != inner + 1:
        raise _refusal([f"a tree of {len(splits)} splits with {len(values)} leaves"])
    ends = np.zeros(inner + 1, np.int64)
    return _Tree(
        left=np.append(2 * np.arange(inner) + 1, ends - 1).astype(np.int32),
        feature=np.append(np.array([split["float_feature_index"] for split in splits], np.int64)[levels], ends),
        border=np.append(np.array([split["border"] for split in splits], np.float64)[levels], ends),
        leaf=np.concatenate([np.zeros((inner, outputs)), values]),
    )


def _join(parts: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)
