"""Read tree tables and outputs from fitted ensembles of scikit-learn, without importing scikit-learn.

The rules follow scikit-learn 1.9: ``tree/_tree.pyx``, ``ensemble/_forest.py``, ``ensemble/_gradient_boosting.pyx`` and
``ensemble/_hist_gradient_boosting``.

Rows. ``sklearn_rows`` returns the matrix that the tables score, as the model's own ``predict`` prepares it: float32 for
forests and gradient boosting, whose thresholds are in double precision; float64 for histogram gradient boosting, with
the categories numbered, and first.

Sums. All are in double precision, in the order of the estimators, which is scikit-learn's own with ``n_jobs=1``. A
forest with more jobs adds the trees in the order in which its threads end: the last bits of its outputs change from
call to call, and those of the tables are one of the possible results.

Outputs. ``predict_proba`` of classifiers and ``predict`` of regressors. Boosted margins become outputs by the model's
own loss object, hence by the same ``exp`` of the same NumPy, in the same layout.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import ModelError
from pipeline.models.trees.tables import VECTOR_LEAVES, Floats, TreeTables, unsupported
from pipeline.models.trees.thresholds import next_above

FORESTS = ("RandomForestClassifier", "RandomForestRegressor", "ExtraTreesClassifier", "ExtraTreesRegressor")
BOOSTINGS = ("GradientBoostingClassifier", "GradientBoostingRegressor")
HISTOGRAM_BOOSTINGS = ("HistGradientBoostingClassifier", "HistGradientBoostingRegressor")
"""Names of the classes that can be read. A subclass may predict otherwise and is refused."""

_FUSED = "gradient boosting on {}: compilers may fuse the learning rate's multiplication with the addition there"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SklearnOutput:
    """Turns margins into ``predict_proba`` or ``predict``. A transformation of ``TreeEngine``."""

    columns: int = 0
    """Columns of the output of classifiers; 0: the margins' own shape."""

    divisor: int = 1
    """Trees of a forest, whose sum is divided."""

    loss: Any = None
    """The loss of a boosted model; None for forests."""

    is_fortran: bool = False
    """True if the library keeps margins column by column: sums over the classes then have another order."""

    has_link: bool = False
    """True if the loss's link is applied to the margins of a regressor."""

    def __call__(self, margins: Floats) -> Floats:
        """Return the outputs. The margins are overwritten."""
        if self.loss is None:
            margins /= self.divisor
            return margins.reshape(len(margins), self.columns) if self.columns else margins
        if self.columns:
            arranged: npt.NDArray[Any] = np.asfortranarray(margins) if self.is_fortran else margins
            probabilities: Floats = self.loss.predict_proba(arranged)
            return probabilities
        outputs: Floats = self.loss.link.inverse(margins) if self.has_link else margins
        return outputs


def read_sklearn(model: Any, *, value_type: type[np.float32] | type[np.float64] | None = None) -> TreeTables:
    """Build the tables of a fitted model.

    :param value_type: type of the matrices to be scored. Default: the type of ``sklearn_rows``. Scores of float32 rows
        have the same bits with either type.
    :raises ModelError: when ``unsupported_sklearn`` returns a reason.
    """
    reasons = _unreadable(model)
    if reasons:
        raise _refusal(reasons)
    name = type(model).__name__
    if name in HISTOGRAM_BOOSTINGS:
        trees, output, base = _read_histogram_boosting(model)
    else:
        trees, output, base = (_read_forest if name in FORESTS else _read_boosting)(model)
    usual = np.float64 if name in HISTOGRAM_BOOSTINGS else np.float32
    tables = _assemble(
        trees, output=output, base=base, n_features=int(model.n_features_in_), value_type=value_type or usual
    )
    reasons = unsupported(tables)
    if reasons:
        raise _refusal(reasons)
    return tables


def sklearn_output(model: Any) -> SklearnOutput:
    """Return the transformation from margins to ``predict_proba`` of classifiers or ``predict`` of regressors.

    :raises ModelError: when ``unsupported_sklearn`` returns a reason.
    """
    reasons = _unreadable(model)
    if reasons:
        raise _refusal(reasons)
    name = type(model).__name__
    columns = len(model.classes_) if name.endswith("Classifier") else 0
    if name in FORESTS:
        return SklearnOutput(columns=columns, divisor=len(model.estimators_))
    is_histogram = name in HISTOGRAM_BOOSTINGS
    return SklearnOutput(columns=columns, loss=model._loss, is_fortran=is_histogram, has_link=is_histogram)


def sklearn_rows(model: Any, rows: Any) -> Floats:
    """Return the matrix that ``read_sklearn``'s tables score. Checks nothing else that ``predict`` checks."""
    if type(model).__name__ not in HISTOGRAM_BOOSTINGS:
        return np.asarray(rows, dtype=np.float32)
    matrix: Floats = model._preprocess_X(rows, reset=False)
    return matrix


def unsupported_sklearn(model: Any) -> tuple[str, ...]:
    """Return the reasons why the tree engine cannot score this model; empty if ``read_sklearn`` can read it."""
    reasons = _unreadable(model)
    if reasons:
        return reasons
    try:
        read_sklearn(model)
    except ModelError as error:
        return (error.found or error.message,)
    return ()


def _refusal(reasons: Sequence[str]) -> ModelError:
    return ModelError(
        "the tree engine cannot score this model",
        found="; ".join(reasons),
        next_step="score it with scikit-learn itself",
    )


def _unreadable(model: Any) -> tuple[str, ...]:
    kind = type(model)
    name = kind.__name__
    if not kind.__module__.startswith("sklearn.") or name not in (*FORESTS, *BOOSTINGS, *HISTOGRAM_BOOSTINGS):
        return (f"the model {kind.__module__}.{name}",)
    if not hasattr(model, "n_features_in_"):
        return ("a model that is not fitted",)
    if name in FORESTS and name.endswith("Classifier") and model.n_outputs_ > 1:
        return ("a classifier with several outputs",)
    if name in FORESTS and not hasattr(model.estimators_[0].tree_, "missing_go_to_left"):
        return ("a model of scikit-learn before 1.3",)
    if name in BOOSTINGS:
        return _unreadable_boosting(model)
    if name in HISTOGRAM_BOOSTINGS and model._baseline_prediction.dtype != np.float64:
        return (f"margins in {model._baseline_prediction.dtype}",)
    return ()


def _unreadable_boosting(model: Any) -> tuple[str, ...]:
    if platform.machine() not in {"x86_64", "AMD64"}:
        return (_FUSED.format(platform.machine()),)
    first = model.init_
    kind = type(first).__name__
    if first == "zero" or kind == "DummyRegressor":
        return ()
    if kind == "DummyClassifier" and first.strategy in {"prior", "most_frequent", "constant"}:
        return ()
    return (f"an initial prediction of {kind}, which is not the same for all rows",)


class _Tree(NamedTuple):
    """One tree: [nodes] arrays. Rows go left where ``value <= threshold``, or where the code is not in the set."""

    left: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    feature: npt.NDArray[np.int64]
    threshold: npt.NDArray[np.float64]
    missing_left: npt.NDArray[np.bool_]
    leaf: npt.NDArray[np.float64]
    sets: dict[int, npt.NDArray[np.int64]]
    """Category codes by node."""


Read = tuple[list[_Tree], npt.NDArray[np.int32], npt.NDArray[np.float64]]
"""Trees, the output of each, and the margin before the first tree."""


def _read_forest(model: Any) -> Read:
    columns = len(model.classes_) if hasattr(model, "classes_") else int(model.n_outputs_)
    # [nodes, outputs, classes]: probabilities of one output, or one value of each output.
    trees = [_classic(found.tree_, found.tree_.value.reshape(-1, columns)) for found in model.estimators_]
    if hasattr(model, "classes_") and any(abs(tree.leaf.sum(axis=1) - 1).max() > 1e-6 for tree in trees):
        raise _refusal(["leaves with counts instead of probabilities: a model of scikit-learn before 1.3"])
    output = np.zeros(len(trees), np.int32) if columns == 1 else np.full(len(trees), VECTOR_LEAVES, np.int32)
    return trees, output, np.zeros(columns)


def _read_boosting(model: Any) -> Read:
    stages, columns = model.estimators_.shape
    # The library multiplies in each row; the product is the same.
    trees = [
        _classic(found.tree_, model.learning_rate * found.tree_.value.reshape(-1, 1))
        for found in model.estimators_.ravel()
    ]
    # It does not look for missing values: they are not below any threshold.
    trees = [tree._replace(missing_left=np.zeros_like(tree.missing_left)) for tree in trees]
    base = model._raw_predict_init(np.zeros((1, model.n_features_in_), np.float32))[0]
    return trees, np.tile(np.arange(columns, dtype=np.int32), stages), base


def _classic(tree: Any, leaf: npt.NDArray[np.float64]) -> _Tree:
    split = tree.children_left >= 0
    return _Tree(
        left=tree.children_left,
        right=tree.children_right,
        feature=np.where(split, tree.feature, 0),
        threshold=np.where(split, tree.threshold, 0),
        missing_left=tree.missing_go_to_left != 0,
        leaf=leaf,
        sets={},
    )


def _read_histogram_boosting(model: Any) -> Read:
    known, numbers = model._bin_mapper.make_known_categories_bitsets()
    stages = model._predictors
    trees = [_histogram(tree, lambda feature: known[numbers[feature]]) for stage in stages for tree in stage]
    columns = model.n_trees_per_iteration_
    return trees, np.tile(np.arange(columns, dtype=np.int32), len(stages)), model._baseline_prediction[0]


def _histogram(predictor: Any, known: Callable[[int], npt.NDArray[np.uint32]]) -> _Tree:
    nodes = predictor.nodes
    split = nodes["is_leaf"] == 0
    left = np.where(split, nodes["left"].astype(np.int64), -1)
    right = np.where(split, nodes["right"].astype(np.int64), -1)
    missing_left = nodes["missing_go_to_left"] != 0
    sets = {}
    for node in np.flatnonzero(split & (nodes["is_categorical"] != 0)).tolist():
        codes = predictor.raw_left_cat_bitsets[nodes["bitset_idx"][node]]
        # Unknown categories go with the missing values: they must be on the side that has no set.
        if missing_left[node]:
            sets[node] = _members(known(int(nodes["feature_idx"][node])) & ~codes)
        else:
            sets[node] = _members(codes)
            left[node], right[node] = right[node], left[node]
            missing_left[node] = True
    return _Tree(
        left=left,
        right=right,
        feature=np.where(split, nodes["feature_idx"], 0),
        threshold=np.where(split, nodes["num_threshold"], 0.0),
        missing_left=missing_left,
        leaf=nodes["value"].astype(np.float64)[:, None],
        sets=sets,
    )


def _members(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    return np.flatnonzero(np.unpackbits(bits.astype("<u4").view(np.uint8), bitorder="little"))


def _assemble(
    trees: Sequence[_Tree], *, output: npt.NDArray[np.int32], base: npt.NDArray[Any], n_features: int, value_type: Any
) -> TreeTables:
    start = np.cumsum([0, *(len(tree.left) for tree in trees)], dtype=np.int64)
    sets = {
        int(first) + node: codes for tree, first in zip(trees, start, strict=False) for node, codes in tree.sets.items()
    }
    left = np.concatenate([tree.left for tree in trees])
    threshold = np.concatenate([tree.threshold for tree in trees])
    # Nothing is above an infinite threshold: nothing is in an empty set.
    is_category = (left >= 0) & (threshold == np.inf)
    is_category[list(sets)] = True
    counts = np.zeros(len(left), np.int64)
    counts[list(sets)] = [len(codes) for codes in sets.values()]
    return TreeTables(
        start=start,
        output=output,
        feature=np.concatenate([tree.feature for tree in trees]),
        threshold=np.where(is_category, 0, next_above(threshold, value_type)),
        left=left,
        right=np.concatenate([tree.right for tree in trees]),
        default_left=np.concatenate([tree.missing_left for tree in trees]),
        is_category=is_category,
        category_start=np.cumsum([0, *counts]),
        categories=np.concatenate([np.zeros(0, np.int64), *(sets[node] for node in sorted(sets))]),
        leaf=np.concatenate([tree.leaf for tree in trees]),
        base=base,
        n_features=n_features,
        value_type=value_type,
        sum_type=np.float64,
    )
