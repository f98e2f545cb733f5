"""Fold a model's ``base_score`` into its first tree, so that a GPU computes the CPU's margins in every bit. Pure.

For one output, xgboost's GPU predictor adds the leaves of a row from 0 on, and the base last; its CPU predictor starts
from the base (``src/predictor/gpu_predictor.cu`` and ``cpu_predictor.cc``, 3.1 to 3.4). With the base in the leaves of
the first tree, and a base of 0, the GPU adds the same numbers in the same order. For several outputs both start from
the base, tree by tree, and nothing is folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ModelError
from pipeline.models.trees.xgboost import (
    OBJECTIVES,
    Model,
    base_margin,
    base_scores,
    booster_part,
    locate_ubj,
    read_ubj,
    tree_range,
    unreadable,
)

_NEUTRAL = {"identity": "0E0", "logit": "5E-1", "log": "1E0"}
"""Base score with a margin of 0, by the link of the objective."""
_TREES = ("learner", "gradient_booster", "model", "trees")


def fold_base(data: bytes, *, iteration_range: tuple[int, int] = (0, 0)) -> bytes:
    """Return the model with its base in the first tree of ``iteration_range``; unchanged if it has several outputs.

    On a CPU, the result has the margins of ``data`` for this range, in every bit.

    :param data: a model as ``booster.save_raw("ubj")`` returns it.
    :param iteration_range: boosting rounds [begin, end) that will be evaluated; an end of 0 means all.
    :raises ModelError: when `fold_blockers` returns a reason, or ``data`` is damaged.
    """
    model = read_ubj(data)
    reasons = fold_blockers(model, iteration_range=iteration_range)
    if reasons:
        raise ModelError(
            "the GPU cannot score this model with the bits of the CPU",
            found="; ".join(reasons),
            next_step="say device: auto or cpu",
        )
    parts = _read(model, iteration_range)
    if len(parts.base) > 1:
        return data
    folded = bytearray(data)
    place = locate_ubj(data, *_TREES, parts.first, "split_conditions")
    leaves = _leaf_mask(parts.trees[0])
    # The values end the array: its marker, type and length come before them.
    start = place.stop - 4 * len(leaves)
    values = np.frombuffer(data, ">f4", len(leaves), start).copy()
    values[leaves] = parts.folded
    folded[start : place.stop] = values.tobytes()
    folded[locate_ubj(data, "learner", "learner_model_param", "base_score")] = _text(_neutral_text(model))
    return bytes(folded)


def fold_blockers(model: Model, *, iteration_range: tuple[int, int] = (0, 0)) -> tuple[str, ...]:
    """Return the reasons, by name, why a GPU is not known to compute the CPU's margins; empty if it does.

    :param model: result of `read_ubj`.
    """
    reasons = unreadable(model)
    if reasons:
        return reasons
    _, weights = booster_part(model["learner"])
    if weights is not None:
        # xgboost 3.4 stores dart under the name gbtree: the weights of the trees tell.
        return ("the booster dart",)
    parts = _read(model, iteration_range)
    if not parts.trees:
        return ("a model without trees",)
    if any(int(tree["tree_param"]["size_leaf_vector"]) > 1 for tree in parts.trees):
        return ("vector leaves",)
    if not parts.is_finite:
        return ("leaves that are not finite, or whose sum may not be finite",)
    if len(parts.base) == 1 and parts.may_sum_to_negative_zero:
        return ("rows whose leaves are all -0.0, with a base of -0.0",)
    return ()


@dataclass(frozen=True)
class _Parts:
    """Parts of a model that decide how its base is folded."""

    base: npt.NDArray[np.float32]
    """[outputs] margins of the base."""
    first: int
    """Number of the first tree that is evaluated."""
    trees: Sequence[Model]
    """Trees that are evaluated."""

    @property
    def folded(self) -> npt.NDArray[np.float32]:
        """[leaves] base + leaf of the first tree, rounded once to float32, as both predictors do."""
        leaves: npt.NDArray[np.float32] = self.base[0] + _leaves(self.trees[0])
        return leaves

    @property
    def is_finite(self) -> bool:
        """True if no row can have a margin that is infinite or NaN, whichever leaves the row reaches."""
        largest = sum(float(np.abs(_leaves(tree).astype(np.float64)).max()) for tree in self.trees)
        total = float(np.abs(self.base.astype(np.float64)).max()) + largest
        return bool(total < np.finfo(np.float32).max / 2)

    @property
    def may_sum_to_negative_zero(self) -> bool:
        """True if a row may reach -0.0 in every tree, and the base is -0.0: a sum that starts from 0 would be 0.0."""
        return _has_negative_zero(self.folded) and all(_has_negative_zero(_leaves(tree)) for tree in self.trees)


def _read(model: Model, iteration_range: tuple[int, int]) -> _Parts:
    learner = model["learner"]
    booster, _ = booster_part(learner)
    base = base_margin(base_scores(learner), objective=str(learner["objective"]["name"]))
    first, last = tree_range(booster, outputs=len(base), iteration_range=iteration_range)
    return _Parts(base, first, booster["trees"][first:last])


def _leaf_mask(tree: Model) -> npt.NDArray[np.bool_]:
    return np.asarray(tree["left_children"]) < 0


def _leaves(tree: Model) -> npt.NDArray[np.float32]:
    return np.asarray(tree["split_conditions"], np.float32)[_leaf_mask(tree)]


def _has_negative_zero(values: npt.NDArray[Any]) -> bool:
    return bool((np.signbit(values) & (values == 0)).any())


def _neutral_text(model: Model) -> str:
    """Return the base score whose margin is 0, in the form of the model: newer files hold a list of one number."""
    learner = model["learner"]
    number = _NEUTRAL[OBJECTIVES[str(learner["objective"]["name"])][0]]
    is_list = str(learner["learner_model_param"]["base_score"]).lstrip().startswith("[")
    return f"[{number}]" if is_list else number


def _text(value: str) -> bytes:
    """Return a text as UBJSON, with a length of eight bytes as xgboost writes it."""
    data = value.encode()
    return b"SL" + len(data).to_bytes(8, "big") + data
