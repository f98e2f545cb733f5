"""Read tree tables and outputs from LightGBM's model text (``Booster.save_model``), without importing LightGBM.

The rules follow LightGBM 4.7: ``Tree::NumericalDecision`` and ``Tree::CategoricalDecision`` (``tree.h``),
``GBDT::Predict`` (``gbdt_prediction.cpp``) and ``ConvertOutput`` of each objective (``src/objective``).

Values. ``Booster.predict`` takes values up to ``kZeroThreshold`` (1e-35) for zeros before a tree sees them, so a
threshold that is as near to zero is moved to the end of that range. Where a missing value is tested as zero (missing
type None), it goes the way of zero; where zeros are missing (missing type Zero), the tables say so.

Sums. Leaves are added in double precision from 0, output by output, in the order of the trees. A random forest
(``boosting=rf``) divides its sum by the number of iterations; its raw scores are not divided, as in LightGBM.

Outputs. ``LightgbmOutput`` calls ``exp`` and ``log1p`` of the C library in double precision, as LightGBM does. The
sigmoid's parameter is the number in the text, which has 6 digits: a booster that was not saved and loaded uses all.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ModelError
from pipeline.models.trees import library
from pipeline.models.trees.tables import (
    AS_IT_IS,
    TRUNCATED,
    ZERO,
    ZERO_IS_MISSING,
    Floats,
    TreeTables,
    checked_range,
    unsupported,
)
from pipeline.models.trees.thresholds import next_above

VERSIONS = ("v3", "v4")
"""Versions of the text format that can be read."""

OBJECTIVES: dict[str, str] = {
    "regression": "identity",
    "regression_l1": "identity",
    "huber": "identity",
    "fair": "identity",
    "quantile": "identity",
    "mape": "identity",
    "poisson": "exp_double",
    "gamma": "exp_double",
    "tweedie": "exp_double",
    "binary": "logistic",
    "multiclass": "softmax_double",
    "multiclassova": "logistic",
    "cross_entropy": "logistic",
    "cross_entropy_lambda": "softplus",
    "lambdarank": "identity",
    "rank_xendcg": "identity",
    "custom": "identity",
}
"""Transformation from margin to output by the objective's name. A model without an objective has "custom"."""

_SQUARED = frozenset({"regression", "regression_l1", "fair", "quantile", "mape"})
"""Objectives whose parameter ``reg_sqrt`` squares the output."""

_CATEGORY, _DEFAULT_LEFT, _MISSING_SHIFT = 1, 2, 2
_MISSING_NONE, _MISSING_ZERO, _MISSING_NAN = range(3)
"""Bits of ``decision_type`` (``tree.h``)."""

Fields = Mapping[str, str]
"""Lines ``name=value`` of the text's head, or of a tree."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightgbmOutput:
    """Turns margins into the outputs of ``Booster.predict``. A transformation of ``TreeEngine``."""

    name: str
    """Function of ``native/transforms.c``, ``square`` or ``identity``."""

    slope: float = 1.0
    """The parameter ``sigmoid`` of the model."""

    divisor: int = 1
    """Iterations of a random forest, whose sum of leaves is divided."""

    def __call__(self, margins: Floats) -> Floats:
        """Return the outputs. The margins are overwritten."""
        if self.divisor != 1:
            margins /= self.divisor
        if self.name == "square":
            return np.sign(margins) * margins * margins
        if self.name != "identity":
            parameters = (self.slope,) if self.name == "logistic" else ()
            library.transform(self.name, margins.reshape(len(margins), -1), parameters=parameters)
        return margins


def read_lightgbm(
    text: str,
    *,
    iteration_range: tuple[int, int] = (0, 0),
    value_type: type[np.float32] | type[np.float64] = np.float64,
) -> TreeTables:
    """Build the tables of the iterations [begin, end); an end of 0 means all.

    :param value_type: type of the matrices to be scored. Scores of float32 rows have the same bits with either type;
        float32 is faster.
    :raises ModelError: when ``unsupported_lightgbm`` returns a reason.
    """
    head, parts = _parse(text)
    reasons = _unreadable(head, parts)
    if reasons:
        raise _refusal(reasons)
    begin, end = _bounds(head, len(parts), iteration_range)
    outputs = _whole_number(head, "num_tree_per_iteration")
    try:
        tables = _assemble(
            [_Tree(part) for part in parts[begin * outputs : end * outputs]],
            outputs=outputs,
            n_features=_whole_number(head, "max_feature_idx") + 1,
            value_type=value_type,
        )
    except (ValueError, IndexError, OverflowError) as error:
        raise _refusal([f"a damaged text: {error}"]) from error
    reasons = unsupported(tables)
    if reasons:
        raise _refusal(reasons)
    return tables


def lightgbm_output(text: str, *, iteration_range: tuple[int, int] = (0, 0)) -> LightgbmOutput:
    """Return the transformation from the margins of these iterations to the outputs of ``Booster.predict``.

    :raises ModelError: when ``unsupported_lightgbm`` returns a reason.
    """
    head, parts = _parse(text)
    reasons = _unreadable(head, parts)
    if reasons:
        raise _refusal(reasons)
    begin, end = _bounds(head, len(parts), iteration_range)
    objective, parameters = _objective(head)
    name = OBJECTIVES[objective]
    if objective in _SQUARED and "sqrt" in parameters:
        name = "square"
    slope = next((item.partition(":")[2] for item in parameters if item.startswith("sigmoid:")), "1")
    try:
        number = _read_number(slope) if objective in {"binary", "multiclassova"} else 1.0
    except ValueError as error:
        raise _refusal([f"a damaged text: {error}"]) from error
    return LightgbmOutput(
        name=name,
        slope=number,
        divisor=end - begin if "average_output" in head else 1,
    )


def unsupported_lightgbm(text: str, *, iteration_range: tuple[int, int] = (0, 0)) -> tuple[str, ...]:
    """Return the reasons why the tree engine cannot score this model; empty if ``read_lightgbm`` can read it."""
    try:
        output = lightgbm_output(text, iteration_range=iteration_range)
        read_lightgbm(text, iteration_range=iteration_range)
    except ModelError as error:
        return (error.found or error.message,)
    if output.name in {"exp_double", "logistic", "softplus", "softmax_double"} and not sys.platform.startswith("linux"):
        return (f"the output of this objective on {sys.platform}: checked with glibc's exp and log1p only",)
    return ()


def lightgbm_tree_problem(text: str) -> str:
    """Return the first fault of the trees for which a prediction would not end, or would leave its memory; or ""."""
    try:
        head, parts = _parse(text)
        features = _whole_number(head, "max_feature_idx") + 1
        for number, part in enumerate(parts):
            if problem := _one_tree_problem(_Tree(part), features=features):
                return f"tree {number}: {problem}"
    except ModelError as error:
        return error.found
    except (ValueError, IndexError, OverflowError) as error:
        return f"a damaged text: {error}"
    return ""


def _one_tree_problem(tree: _Tree, *, features: int) -> str:
    nodes, children = np.arange(tree.splits), np.stack([tree.left, tree.right])
    if ((tree.feature < 0) | (tree.feature >= features)).any():
        return f"a split on a feature outside 0 to {features - 1}"
    if (children >= 2 * tree.splits + 1).any():
        return "a child outside its nodes"
    # LightGBM numbers a split after the split above it; leaves come last here.
    if (children <= nodes).any() or len(np.unique(children)) != children.size:
        return "a node that is not below its split, or below two: the tree leads back to itself"
    return ""


def _refusal(reasons: Sequence[str]) -> ModelError:
    return ModelError(
        "the tree engine cannot score this model", found="; ".join(reasons), next_step="score it with LightGBM itself"
    )


def _parse(text: str) -> tuple[Fields, list[Fields]]:
    """Return the fields of the head, and those of each tree."""
    body, end, _ = text.partition("\nend of trees")
    head, *trees = body.split("\nTree=")
    if not end or not head.startswith("tree\n"):
        raise _refusal(["a text that is not LightGBM's, or is cut off"])
    # After "Tree=" comes the tree's number.
    return _fields(head), [_fields(tree) for tree in trees]


def _fields(text: str) -> Fields:
    lines = (line.partition("=") for line in text.split("\n"))
    return {name: value for name, _, value in lines}


def _objective(head: Fields) -> tuple[str, list[str]]:
    name, *parameters = head.get("objective", "custom").split(" ")
    return name, parameters


def _unreadable(head: Fields, parts: Sequence[Fields]) -> tuple[str, ...]:
    if head.get("version") not in VERSIONS:
        return (f"the format {head.get('version', 'without a version')}, none of {', '.join(VERSIONS)}",)
    objective, _ = _objective(head)
    if objective not in OBJECTIVES:
        return (f"the objective {objective}",)
    if any(part.get("is_linear", "0") != "0" for part in parts):
        return ("linear trees: a leaf that is a function of the row",)
    if len(head.get("tree_sizes", "").split()) != len(parts):
        return ("a text that is cut off",)
    return ()


def _bounds(head: Fields, trees: int, iteration_range: tuple[int, int]) -> tuple[int, int]:
    last = trees // max(1, _whole_number(head, "num_tree_per_iteration"))
    return checked_range(iteration_range, last=last, unit="iterations")


def _whole_number(fields: Fields, name: str) -> int:
    found = fields.get(name, "")
    if not found.isdecimal():
        raise _refusal([f"a damaged text: {name} is {found!r}"])
    return int(found)


def _read_number(text: str) -> float:
    """Return the number that LightGBM's ``Common::Atof`` reads: its last bit may be another one than ``float``'s."""
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, fraction = mantissa.partition(".")
    value = float(whole or 0)
    if fraction:
        value += float(fraction) / 10.0 ** len(fraction)
    left, scale = abs(int(exponent or 0)), 1.0
    for step in (50, 8, 1):
        while left >= step:
            scale *= 10.0**step
            left -= step
    return value / scale if exponent.startswith("-") else value * scale


class _Tree:
    """One tree: [nodes] arrays, splits first, then leaves."""

    def __init__(self, fields: Fields) -> None:
        leaves = _whole_number(fields, "num_leaves")
        self.splits = leaves - 1
        self.feature = _ints(fields, "split_feature", self.splits)
        self.threshold = _floats(fields, "threshold", self.splits)
        self.decision = _ints(fields, "decision_type", self.splits)
        self.leaf = _floats(fields, "leaf_value", leaves)
        children = np.stack([_ints(fields, name, self.splits) for name in ("left_child", "right_child")])
        # Children that are leaves are stored as ~number.
        self.left, self.right = np.where(children < 0, self.splits + ~children, children)
        self.sets: list[npt.NDArray[np.int64]] = []
        sets = _whole_number(fields, "num_cat")
        if sets:
            bounds = _ints(fields, "cat_boundaries", sets + 1)
            words = _ints(fields, "cat_threshold", int(bounds[-1])).astype("<u4")
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")
            self.sets = [np.flatnonzero(found) for found in np.split(bits, 32 * bounds[1:-1])]

    def set_of(self, node: int) -> npt.NDArray[np.int64]:
        """Return the category codes of a split."""
        return self.sets[int(self.threshold[node])]


def _ints(fields: Fields, name: str, count: int) -> npt.NDArray[np.int64]:
    return _numbers(fields, name, count, int, np.int64)


def _floats(fields: Fields, name: str, count: int) -> npt.NDArray[np.float64]:
    return _numbers(fields, name, count, float, np.float64)


def _numbers(fields: Fields, name: str, count: int, convert: Any, dtype: Any) -> npt.NDArray[Any]:
    found = np.array([convert(item) for item in fields.get(name, "").split()], dtype)
    if len(found) != count:
        raise _refusal([f"a tree with {len(found)} entries in {name}, expected {count}"])
    return found


def _assemble(trees: Sequence[_Tree], *, outputs: int, n_features: int, value_type: Any) -> TreeTables:
    sizes = [2 * tree.splits + 1 for tree in trees]
    split = _join([np.arange(size) < tree.splits for tree, size in zip(trees, sizes, strict=True)], bool)
    decision = _join([_pad(tree.decision, tree, 0) for tree in trees], np.int64)
    threshold = _join([_pad(tree.threshold, tree, 0.0) for tree in trees], np.float64)
    left = _join([_pad(tree.left, tree, -1) for tree in trees], np.int64)
    right = _join([_pad(tree.right, tree, -1) for tree in trees], np.int64)
    with_sets = np.repeat([bool(tree.sets) for tree in trees], sizes) if trees else np.zeros(0, bool)
    in_set = split & with_sets & (decision & _CATEGORY != 0)
    numeric = split & ~in_set
    tests = _numeric_tests(decision, threshold, value_type)
    # Nothing is above an infinite threshold: nothing is in an empty set.
    always = numeric & (threshold == np.inf)
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    sets = [
        tree.set_of(int(node))
        for tree, first in zip(trees, starts, strict=False)
        for node in np.flatnonzero(in_set[first : first + tree.splits])
    ]
    counts = np.zeros(len(split), np.int64)
    counts[in_set] = list(map(len, sets))
    return TreeTables(
        start=starts,
        output=np.arange(len(trees), dtype=np.int32) % np.int32(outputs),
        feature=_join([_pad(tree.feature, tree, 0) for tree in trees], np.int64),
        threshold=np.where(numeric & ~always, tests.threshold, 0),
        # LightGBM goes left with a category of the set, and right with a missing value.
        left=np.where(in_set, right, left),
        right=np.where(in_set, left, right),
        default_left=in_set | tests.default_left,
        is_category=in_set | always,
        category_start=np.cumsum([0, *counts]),
        categories=np.concatenate([np.zeros(0, np.int64), *sets]),
        leaf=_join([np.append(np.zeros(tree.splits), tree.leaf) for tree in trees], np.float64)[:, None],
        base=np.zeros(outputs),
        n_features=n_features,
        reading=np.where(in_set, TRUNCATED, tests.reading),
        value_type=value_type,
        sum_type=np.float64,
    )


def _pad(values: npt.NDArray[Any], tree: _Tree, fill: Any) -> npt.NDArray[Any]:
    return np.append(values, np.full(tree.splits + 1, fill))


def _join(parts: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Tests:
    threshold: Floats
    default_left: npt.NDArray[np.bool_]
    reading: npt.NDArray[np.int64]


def _numeric_tests(decision: npt.NDArray[np.int64], threshold: npt.NDArray[np.float64], value_type: Any) -> _Tests:
    """Return thresholds for ``value < threshold``, directions of missing values, and readings."""
    missing = decision >> _MISSING_SHIFT & 3
    zero_left = threshold >= 0
    stored = decision & _DEFAULT_LEFT != 0
    zero = float(ZERO)
    # Only where zeros do not go the way that their value says, they have to be missing values.
    apart = (missing == _MISSING_ZERO) & (stored != zero_left)
    above = next_above(np.where((threshold >= 0) & (threshold < zero), zero, threshold), value_type)
    return _Tests(
        threshold=np.where((threshold < 0) & (threshold >= -zero), value_type(-zero), above),
        default_left=np.where(missing == _MISSING_NONE, zero_left, stored),
        reading=np.where(apart, ZERO_IS_MISSING, AS_IT_IS),
    )
