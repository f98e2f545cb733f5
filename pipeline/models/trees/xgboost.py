"""Read tree tables from the dict ``json.loads(booster.save_raw("json"))``, without importing xgboost.

Trees. The rules follow xgboost 3.2's CPU predictor (``src/predictor/cpu_predictor.cc``, ``src/gbm/gbtree.cc``).
The model format is the format of 3.1 and newer: ``base_score`` may be a vector. ``unsupported_xgboost`` returns the
reasons why the tables cannot hold a model; the caller then uses xgboost.

Objectives. An objective has a link for ``base_score`` and a transformation of the output. The sources are
``src/objective/*`` and ``src/common/math.h`` of xgboost 3.2: float32 arithmetic with the C library's ``expf`` and
``logf``. numpy's vectorised versions differ in the last bit, so the C library's functions are called: ``logf`` through
ctypes for the few base scores, ``expf`` by the compiled kernels. One objective, survival:aft, calls the
double-precision ``exp`` and rounds: ``exp64``.

UBJSON. ``read_ubj`` reads this binary form of xgboost's models directly to numpy arrays. From JSON, every number of
every node would temporarily be a Python object in the memory of each worker.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ModelError
from pipeline.models.trees.tables import VECTOR_LEAVES, TreeTables, checked_range, unsupported

Model = Mapping[str, Any]
"""The JSON object of a model, or a part of it."""


def read_xgboost(model: Model, *, iteration_range: tuple[int, int] = (0, 0)) -> TreeTables:
    """Build the tables of the boosting rounds [begin, end); an end of 0 means all, as in ``inplace_predict``.

    :raises ModelError: when ``unsupported_xgboost`` returns a reason.
    """
    reasons = unreadable(model)
    if reasons:
        raise _refusal(reasons)
    learner = model["learner"]
    booster, weights = booster_part(learner)
    base = base_margin(base_scores(learner), objective=str(learner["objective"]["name"]))
    first, last = tree_range(booster, outputs=len(base), iteration_range=iteration_range)
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
    """Return the reasons why the tree engine cannot score this model; empty if ``read_xgboost`` can read it."""
    reasons = unreadable(model)
    if reasons:
        return reasons
    try:
        read_xgboost(model, iteration_range=iteration_range)
    except ModelError as error:
        return (error.found or error.message,)
    return ()


def _refusal(reasons: Sequence[str]) -> ModelError:
    return ModelError(
        "the tree engine cannot score this model", found="; ".join(reasons), next_step="score it with xgboost itself"
    )


def unreadable(model: Model) -> tuple[str, ...]:
    """Return the reasons why the form, booster or objective of a model is not supported; empty if all are."""
    learner = model.get("learner")
    if not isinstance(learner, Mapping) or "gradient_booster" not in learner:
        return ("a model that is not xgboost's JSON",)
    kind = learner["gradient_booster"].get("name")
    if kind not in {"gbtree", "dart"}:
        return (f"the booster {kind}",)
    objective = learner.get("objective", {}).get("name")
    if objective not in OBJECTIVES:
        return (f"the objective {objective}",)
    booster, _ = booster_part(learner)
    if any(int(tree["tree_param"]["size_leaf_vector"]) > 1 and "leaf_weights" not in tree for tree in booster["trees"]):
        return ("vector leaves in the format of xgboost before 3.2",)
    return ()


def booster_part(learner: Model) -> tuple[Model, npt.NDArray[np.float32] | None]:
    """Return the part that holds the trees and, for DART, each tree's weight.

    xgboost up to 3.3 stores the weights beside the part with the trees, newer ones in it (``GBTree::LoadModel``).
    """
    found = learner["gradient_booster"]
    trees = found["gbtree"]["model"] if found["name"] == "dart" else found["model"]
    weights = found.get("weight_drop", trees.get("weight_drop"))
    return trees, None if weights is None else np.asarray(weights, dtype=np.float32)


def base_scores(learner: Model) -> npt.NDArray[np.float32]:
    """Return base_score with one entry per output. Before 3.1, base_score was one number for all outputs."""
    parameters = learner["learner_model_param"]
    outputs = max(int(parameters.get("num_target", 1)), int(parameters.get("num_class", 0)), 1)
    found = json.loads(str(parameters["base_score"]))
    values = np.asarray(found if isinstance(found, list) else [found], dtype=np.float32)
    return np.broadcast_to(values, outputs) if len(values) == 1 else values


def tree_range(booster: Model, *, outputs: int, iteration_range: tuple[int, int]) -> tuple[int, int]:
    """Return first and last + 1 of the trees of the boosting rounds [begin, end); an end of 0 means all.

    :param booster: the part of `booster_part`.
    :raises ModelError: when the range is outside the model.
    """
    bounds = booster.get("iteration_indptr")
    if bounds is None:
        vector = any(int(tree["tree_param"]["size_leaf_vector"]) > 1 for tree in booster["trees"])
        layer = int(booster["gbtree_model_param"]["num_parallel_tree"]) * (1 if vector else outputs)
        bounds = range(0, len(booster["trees"]) + 1, layer)
    begin, end = checked_range(iteration_range, last=len(bounds) - 1, unit="rounds")
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
        # xgboost always goes to `left + 1`, and ignores the right child's number (predict_fn.h, GetNextNode).
        raise _refusal(["a right child that is not next to the left one"])
    category_start, categories = _category_sets(trees)
    leaves = [
        _leaves(tree, outputs=len(base), weight=None if weights is None else weights[i]) for i, tree in enumerate(trees)
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


def _leaves(tree: Model, *, outputs: int, weight: np.float32 | None) -> npt.NDArray[np.float32]:
    """Return the leaf values: [nodes, 1 or outputs]."""
    if int(tree["tree_param"]["size_leaf_vector"]) > 1:
        values = np.asarray(tree["leaf_weights"], dtype=np.float32).reshape(-1, outputs)
        is_leaf = np.asarray(tree["left_children"]) < 0
        leaves = np.zeros((len(is_leaf), outputs), np.float32)
        # For leaves, `right_children` holds the row of the leaf's values (MultiTargetTree::LeafIdx).
        leaves[is_leaf] = values[np.asarray(tree["right_children"])[is_leaf]]
    else:
        leaves = np.asarray(tree["split_conditions"], dtype=np.float32)[:, None]
    if weight is None:
        return leaves
    # Booster.predict adds `leaf * weight`, rounded to float32, in every version. inplace_predict did so only from 3.3
    # on; before, it also added and subtracted the base score.
    with np.errstate(over="ignore", invalid="ignore"):
        weighted: npt.NDArray[np.float32] = leaves * weight
    return weighted


def _category_sets(trees: Iterable[Model]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return the start of each node's set ([nodes + 1]), and all sets in the order of the nodes."""
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


_RT_EPS = np.float32(1e-6)

OBJECTIVES: dict[str, tuple[str, str]] = {
    "reg:squarederror": ("identity", "identity"),
    "reg:linear": ("identity", "identity"),
    "reg:squaredlogerror": ("identity", "identity"),
    "reg:pseudohubererror": ("identity", "identity"),
    "reg:absoluteerror": ("identity", "identity"),
    "reg:quantileerror": ("identity", "identity"),
    "reg:logistic": ("logit", "sigmoid"),
    "reg:gamma": ("log", "exp"),
    "reg:tweedie": ("log", "exp"),
    "binary:logistic": ("logit", "sigmoid"),
    "binary:logitraw": ("identity", "identity"),
    "binary:hinge": ("identity", "hinge"),
    "multi:softmax": ("identity", "argmax"),
    "multi:softprob": ("identity", "softmax"),
    "count:poisson": ("log", "exp"),
    "survival:cox": ("log", "exp"),
    "survival:aft": ("log", "exp64"),
    "rank:pairwise": ("identity", "identity"),
    "rank:ndcg": ("identity", "identity"),
    "rank:map": ("identity", "identity"),
}
"""Link from ``base_score`` to margin and transformation from margin to output, by the objective's name."""

LIBM_TRANSFORMS = frozenset({"sigmoid", "exp", "exp64", "softmax"})
"""Transformations that require the C library's ``expf`` or ``exp``."""


def transform_name(objective: str) -> str:
    """Return the transformation of an objective's output: identity, sigmoid, exp, exp64, softmax, argmax or hinge."""
    return OBJECTIVES[objective][1]


def unsupported_transform(objective: str) -> tuple[str, ...]:
    """Return the reasons why an objective's output cannot be computed with xgboost's bits; empty if it can."""
    if objective not in OBJECTIVES:
        return (f"the objective {objective}",)
    if transform_name(objective) in LIBM_TRANSFORMS and not sys.platform.startswith("linux"):
        return (f"the output of {objective} on {sys.platform}: checked with glibc's expf and exp only",)
    return ()


def base_margin(base_score: npt.NDArray[np.float32], *, objective: str) -> npt.NDArray[np.float32]:
    """Apply the objective's link to [outputs] base scores, rounded like xgboost's ``ProbToMargin``."""
    link = OBJECTIVES[objective][0]
    one = np.float32(1)
    if link == "logit":
        bounded: npt.NDArray[np.float32] = np.minimum(np.maximum(base_score, _RT_EPS), one - _RT_EPS)
        return -_logf(one / bounded - one)
    return _logf(base_score) if link == "log" else np.array(base_score, dtype=np.float32)


@functools.cache
def _c_logf() -> Any:
    name = {"linux": "libm.so.6", "darwin": "libSystem.dylib"}.get(sys.platform)
    if name is None:
        raise ModelError(
            "the tree engine cannot score this model",
            found=f"an objective with a logarithm in its link, on {sys.platform}",
            expected="Linux or macOS, whose C library's logf is known to be xgboost's",
            next_step="score it with xgboost itself",
        )
    function = ctypes.CDLL(name).logf
    function.argtypes = [ctypes.c_float]
    function.restype = ctypes.c_float
    return function


def _logf(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    logf = _c_logf()
    return np.array([logf(float(value)) for value in values], dtype=np.float32)


_KINDS = {"i": "i1", "U": "u1", "I": "i2", "l": "i4", "L": "i8", "d": "f4", "D": "f8"}
_STORED = {marker: np.dtype(kind).newbyteorder(">") for marker, kind in _KINDS.items()}
_NATIVE = {marker: np.dtype(kind) for marker, kind in _KINDS.items()}
_CONSTANTS = {"Z": None, "T": True, "F": False}


def read_ubj(data: bytes | bytearray) -> dict[str, Any]:
    """Return the object in ``data`` like ``json.loads``, but with numpy arrays for arrays of one number type.

    :raises ModelError: when ``data`` is not an object, or is truncated.
    """
    try:
        found = _UbjReader(data).value()
    except (ValueError, IndexError, KeyError) as error:
        raise _damaged(f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise _damaged(type(found).__name__)
    return found


def locate_ubj(data: bytes | bytearray, *path: str | int) -> slice:
    """Return the place of the bytes of one value in ``data``, with its marker.

    :param path: keys of objects and numbers of elements, from the outermost value inwards.
    :raises ModelError: when ``data`` has no such value, or is truncated.
    """
    reader = _UbjReader(data)
    try:
        for step in path:
            reader.enter(step)
        start = reader.position
        reader.value()
    except (ValueError, IndexError, KeyError) as error:
        raise _damaged(f"{type(error).__name__}: {error}") from error
    return slice(start, reader.position)


def _damaged(found: str) -> ModelError:
    return ModelError("the model is not complete UBJSON", found=found, next_step="score it with xgboost itself")


class _UbjReader:
    def __init__(self, data: bytes | bytearray) -> None:
        self._data = memoryview(data)
        self._at = 0

    @property
    def position(self) -> int:
        """Offset of the next byte."""
        return self._at

    def enter(self, step: str | int) -> None:
        """Go to the value of a key of the object that comes next, or to an element of the array.

        :raises KeyError: when there is none.
        """
        if not self._peek("{" if isinstance(step, str) else "["):
            raise KeyError(step)
        if isinstance(step, str):
            while not self._peek("}"):
                if self._text() == step:
                    return
                self.value()
            raise KeyError(step)
        count = self._count() if self._peek("#") else step + 1
        for _ in range(min(step, count)):
            self.value()
        if step >= count:
            raise KeyError(step)

    def value(self) -> Any:
        """Read the next value, with its marker."""
        marker = self._marker()
        if marker == "{":
            return self._object()
        if marker == "[":
            return self._array()
        if marker == "S":
            return self._text()
        if marker in _CONSTANTS:
            return _CONSTANTS[marker]
        return self._numbers(marker, 1)[0].item()

    def _marker(self) -> str:
        found = chr(self._data[self._at])
        self._at += 1
        return found

    def _peek(self, marker: str) -> bool:
        """Return True and skip ``marker`` if ``marker`` comes next."""
        if chr(self._data[self._at]) != marker:
            return False
        self._at += 1
        return True

    def _count(self) -> int:
        marker = self._marker()
        size = _STORED[marker].itemsize
        count = int.from_bytes(self._data[self._at : self._at + size], "big", signed=marker != "U")
        self._at += size
        if marker in "dD" or count < 0:
            raise ValueError("a length that is none")
        return count

    def _text(self) -> str:
        length = self._count()
        begin, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise ValueError("a text is cut off")
        return str(self._data[begin : self._at], "utf-8")

    def _numbers(self, marker: str, count: int) -> np.ndarray:
        found = np.frombuffer(self._data, _STORED[marker], count, self._at)
        self._at += found.nbytes
        return found.astype(_NATIVE[marker])

    def _object(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._peek("}"):
            name = self._text()
            found[name] = self.value()
        return found

    def _array(self) -> Any:
        if self._peek("$"):
            marker = self._marker()
            if not self._peek("#"):
                raise ValueError("an array of one type without a length")
            return self._numbers(marker, self._count())
        if self._peek("#"):
            return [self.value() for _ in range(self._count())]
        found: list[Any] = []
        while not self._peek("]"):
            found.append(self.value())
        return found
