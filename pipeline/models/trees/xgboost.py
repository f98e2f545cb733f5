"""Reads tree tables from what ``json.loads(booster.save_raw("json"))`` gives; xgboost itself is not imported.

The rules are those of xgboost 3.2's CPU predictor (``src/predictor/cpu_predictor.cc``, ``src/gbm/gbtree.cc``) and the
model format is that of 3.1 and newer: ``base_score`` may be a vector. What is not claimed is named by
``unsupported_xgboost``, and the caller leaves it to xgboost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ModelError
from pipeline.models.trees.objectives import OBJECTIVES, base_margin
from pipeline.models.trees.tables import VECTOR_LEAVES, TreeTables, unsupported

Model = Mapping[str, Any]
"""The JSON object of a model, or a part of it."""


def read_xgboost(model: Model, *, iteration_range: tuple[int, int] = (0, 0)) -> TreeTables:
    """Build the tables of the boosting rounds [begin, end); an end of 0 means all, as in ``inplace_predict``.

    Raises ModelError where ``unsupported_xgboost`` names a reason.
    """
    reasons = _unreadable(model)
    if reasons:
        raise _refusal(reasons)
    learner = model["learner"]
    booster, weights = _booster(learner)
    base = base_margin(_base_score(learner), objective=str(learner["objective"]["name"]))
    first, last = _tree_range(booster, outputs=len(base), iteration_range=iteration_range)
    groups = np.asarray(booster["tree_info"], dtype=np.int32)[first:last]
    tables = _assemble(
        booster["trees"][first:last],
        groups=groups,
        weights=None if weights is None else weights[first:last],
        base=base,
        n_features=int(learner["learner_model_param"]["num_feature"]),
    )
    reasons = unsupported(tables)
    if reasons:
        raise _refusal(reasons)
    return tables


def unsupported_xgboost(model: Model, *, iteration_range: tuple[int, int] = (0, 0)) -> tuple[str, ...]:
    """Say by name what keeps the engine from scoring this model; empty where ``read_xgboost`` can read it."""
    reasons = _unreadable(model)
    if reasons:
        return reasons
    try:
        read_xgboost(model, iteration_range=iteration_range)
    except ModelError as error:
        return (error.found or error.message,)
    return ()


def _refusal(reasons: Sequence[str]) -> ModelError:
    return ModelError(
        "The tree engine cannot score this model.", found="; ".join(reasons), next_step="Score it with xgboost itself."
    )


def _unreadable(model: Model) -> tuple[str, ...]:
    learner = model.get("learner")
    if not isinstance(learner, Mapping) or "gradient_booster" not in learner:
        return ("a model that is not xgboost's JSON",)
    kind = learner["gradient_booster"].get("name")
    if kind not in {"gbtree", "dart"}:
        return (f"the booster {kind}",)
    objective = learner.get("objective", {}).get("name")
    if objective not in OBJECTIVES:
        return (f"the objective {objective}",)
    booster, _ = _booster(learner)
    if any(int(tree["tree_param"]["size_leaf_vector"]) > 1 and "leaf_weights" not in tree for tree in booster["trees"]):
        return ("vector leaves in the format of xgboost before 3.2",)
    return ()


def _booster(learner: Model) -> tuple[Model, npt.NDArray[np.float32] | None]:
    """Return the part that holds the trees and, for DART, each tree's weight."""
    found = learner["gradient_booster"]
    if found["name"] == "dart":
        return found["gbtree"]["model"], np.asarray(found["weight_drop"], dtype=np.float32)
    return found["model"], None


def _base_score(learner: Model) -> npt.NDArray[np.float32]:
    """Return base_score, one entry per output: a vector since 3.1, one number for all outputs before."""
    parameters = learner["learner_model_param"]
    outputs = max(int(parameters.get("num_target", 1)), int(parameters.get("num_class", 0)), 1)
    found = json.loads(str(parameters["base_score"]))
    values = np.asarray(found if isinstance(found, list) else [found], dtype=np.float32)
    return np.broadcast_to(values, outputs) if len(values) == 1 else values


def _tree_range(booster: Model, *, outputs: int, iteration_range: tuple[int, int]) -> tuple[int, int]:
    bounds = booster.get("iteration_indptr")
    if bounds is None:
        vector = any(int(tree["tree_param"]["size_leaf_vector"]) > 1 for tree in booster["trees"])
        layer = int(booster["gbtree_model_param"]["num_parallel_tree"]) * (1 if vector else outputs)
        bounds = range(0, len(booster["trees"]) + 1, layer)
    begin, end = iteration_range
    last = len(bounds) - 1
    end = end or last
    if not 0 <= begin <= end <= last:
        raise ModelError(
            "The iteration range is outside the model.",
            found=f"{begin} to {end}",
            expected=f"0 to {last}",
            next_step="Choose rounds that the model has.",
        )
    return int(bounds[begin]), int(bounds[end])


def _assemble(
    trees: Sequence[Model],
    *,
    groups: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32] | None,
    base: npt.NDArray[np.float32],
    n_features: int,
) -> TreeTables:
    vector = any(int(tree["tree_param"]["size_leaf_vector"]) > 1 for tree in trees)
    sizes = [len(tree["left_children"]) for tree in trees]
    left = _join(trees, "left_children", np.int32)
    right = _join(trees, "right_children", np.int32)
    split = left >= 0
    if (right[split] != left[split] + 1).any():
        # xgboost itself steps to `left + 1`, whatever the right child says (predict_fn.h, GetNextNode).
        raise _refusal(["a right child that is not next to the left one"])
    category_start, categories = _category_sets(trees)
    leaves = [
        _leaves(tree, base=base, group=int(groups[i]), weight=None if weights is None else weights[i])
        for i, tree in enumerate(trees)
    ]
    return TreeTables(
        start=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
        output=np.full(len(trees), VECTOR_LEAVES, np.int32) if vector else groups,
        feature=np.where(split, _join(trees, "split_indices", np.int32), 0),
        threshold=_join(trees, "split_conditions", np.float32),
        left=left,
        right=np.where(split, right, -1),
        default_left=_join(trees, "default_left", np.bool_),
        is_category=split & (_join(trees, "split_type", np.int8) == 1),
        category_start=category_start,
        categories=categories,
        leaf=np.concatenate(leaves) if trees else np.zeros((0, 1), np.float32),
        base=base,
        n_features=n_features,
    )


def _join(trees: Iterable[Model], name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(tree[name], dtype=dtype) for tree in trees)])


def _leaves(
    tree: Model, *, base: npt.NDArray[np.float32], group: int, weight: np.float32 | None
) -> npt.NDArray[np.float32]:
    """Return [nodes, 1 or outputs] what each leaf adds."""
    if int(tree["tree_param"]["size_leaf_vector"]) > 1:
        values = np.asarray(tree["leaf_weights"], dtype=np.float32).reshape(-1, len(base))
        is_leaf = np.asarray(tree["left_children"]) < 0
        found = np.zeros((len(is_leaf), len(base)), np.float32)
        # A leaf keeps the row of its values where a split keeps its right child (MultiTargetTree::LeafIdx).
        found[is_leaf] = values[np.asarray(tree["right_children"])[is_leaf]]
        return found
    leaf = np.asarray(tree["split_conditions"], dtype=np.float32)[:, None]
    if weight is None:
        return leaf
    # Dart::InplacePredict scores one tree with the base score, takes that off again and applies the weight, each step
    # rounded to float32; so these are its bits, which `leaf * weight` would miss.
    weighted: npt.NDArray[np.float32] = ((base[group] + leaf) - base[group]) * weight
    return weighted


def _category_sets(trees: Iterable[Model]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return where each node's set starts ([nodes + 1]) and all sets, in the order of the nodes."""
    counts: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
    sets: list[npt.NDArray[np.int32]] = [np.zeros(0, np.int32)]
    for tree in trees:
        count = np.zeros(len(tree["left_children"]), np.int64)
        codes = np.asarray(tree["categories"], dtype=np.int32)
        nodes, segments, sizes = (tree[f"categories_{name}"] for name in ("nodes", "segments", "sizes"))
        for node, first, size in sorted(zip(nodes, segments, sizes, strict=True)):
            count[node] = size
            sets.append(codes[first : first + size])
        counts.append(count)
    return np.cumsum(np.concatenate(counts)), np.concatenate(sets)
