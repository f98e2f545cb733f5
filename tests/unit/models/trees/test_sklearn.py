"""The engine's margins and outputs are scikit-learn's, bit for bit.

``PIPELINE_TREES_EXAMPLES`` sets how many models of each kind are tried.
"""

from __future__ import annotations

import os
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ModelError
from pipeline.models.trees import TreeEngine
from pipeline.models.trees.sklearn import read_sklearn, sklearn_output, sklearn_rows, unsupported_sklearn
from pipeline.testing.examples import choose

sklearn = pytest.importorskip("sklearn", minversion="1.3", reason="scikit-learn is not installed")

from sklearn import dummy, ensemble, linear_model  # noqa: E402

EXAMPLES = int(os.environ.get("PIPELINE_TREES_EXAMPLES") or choose(20, of=300))
CHOSEN = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

SPECIAL = np.array([0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3e38, -3e38, 1.0, 16777216.0])


def make_data(rng: np.random.Generator, *, rows: int, features: int, missing: float) -> np.ndarray:
    matrix = rng.standard_normal((rows, features))
    matrix[:, ::3] = matrix[:, ::3].round(1)
    matrix[rng.random(matrix.shape) < missing] = np.nan
    return matrix


def make_label(rng: np.random.Generator, matrix: np.ndarray, *, classes: int) -> np.ndarray:
    """Return numbers above 0, or class numbers."""
    signal = np.nan_to_num(np.sin(3 * matrix)).sum(axis=1) + rng.standard_normal(len(matrix))
    if not classes:
        return np.abs(signal) + 0.1
    order = np.argsort(np.argsort(signal))
    return order * classes // len(order)


def make_rows(rng: np.random.Generator, *, pool: np.ndarray, shape: tuple[int, int], missing: float) -> np.ndarray:
    """Rows of values at, just below and just above thresholds, and of special values."""
    near = rng.choice(np.append(pool, SPECIAL), shape)
    nudged = np.nextafter(near, rng.choice([-np.inf, np.inf], shape))
    with np.errstate(over="ignore"):
        single = np.nextafter(near.astype(np.float32), rng.choice(np.array([-np.inf, np.inf], np.float32), shape))
    choice = rng.integers(0, 5, shape)
    matrix = np.choose(choice, [near, nudged, single, rng.choice(SPECIAL, shape), rng.standard_normal(shape)])
    matrix[rng.random(shape) < missing] = np.nan
    return matrix


def thresholds(model: Any) -> np.ndarray:
    if hasattr(model, "_predictors"):
        found = [tree.nodes["num_threshold"] for stage in model._predictors for tree in stage]
    else:
        found = [tree.tree_.threshold for tree in np.ravel(model.estimators_)]
    values = np.concatenate(found)
    return values[np.isfinite(values)]


def assert_same(model: Any, matrix: np.ndarray) -> None:
    assert unsupported_sklearn(model) == ()
    engine = TreeEngine(read_sklearn(model), transform=sklearn_output(model))
    rows = sklearn_rows(model, matrix)
    # scikit-learn adds all values up to see whether any is infinite.
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = model.predict_proba(matrix) if hasattr(model, "classes_") else model.predict(matrix)
        margin = model.decision_function(matrix) if hasattr(model, "decision_function") else None
    assert wanted.dtype == np.float64
    found = engine.predict(rows)
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()
    if margin is not None:
        assert engine.margin(rows, threads=2).tobytes() == margin.tobytes("C")
    copy = pickle.loads(pickle.dumps(engine))
    assert copy.predict(np.asfortranarray(rows)).tobytes() == wanted.tobytes()


@CHOSEN
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(
        ["RandomForestClassifier", "RandomForestRegressor", "ExtraTreesClassifier", "ExtraTreesRegressor"]
    ),
    features=st.integers(1, 12),
    classes=st.sampled_from([1, 2, 2, 3, 11]),
    trees=st.integers(1, 20),
    depth=st.sampled_from([1, 3, 6, None]),
    leaf=st.sampled_from([1, 5, 30]),
    missing=st.sampled_from([0.0, 0.05, 0.5]),
    rows=st.sampled_from([1, 63, 512, 1100]),
)
def test_forests(
    seed: int,
    name: str,
    features: int,
    classes: int,
    trees: int,
    depth: int | None,
    leaf: int,
    missing: float,
    rows: int,
) -> None:
    rng = np.random.default_rng(seed)
    matrix = make_data(rng, rows=700, features=features, missing=missing)
    label = make_label(rng, matrix, classes=classes if name.endswith("Classifier") else 0)
    model = getattr(ensemble, name)(
        trees,
        max_depth=depth,
        min_samples_leaf=leaf,
        max_features=float(rng.uniform(0.2, 1)),
        random_state=seed % 2**31,
    ).fit(matrix, label)
    assert_same(model, make_rows(rng, pool=thresholds(model), shape=(rows, features), missing=missing))


@CHOSEN
@given(
    seed=st.integers(0, 2**32 - 1),
    loss=st.sampled_from(["log_loss", "exponential", "squared_error", "absolute_error", "huber", "quantile"]),
    init=st.sampled_from([None, "zero"]),
    features=st.integers(1, 12),
    classes=st.sampled_from([2, 3, 11]),
    rounds=st.integers(1, 12),
    depth=st.sampled_from([1, 3, 7]),
    rate=st.floats(0.01, 1),
    rows=st.sampled_from([1, 63, 512, 1100]),
)
def test_gradient_boosting(
    seed: int, loss: str, init: str | None, features: int, classes: int, rounds: int, depth: int, rate: float, rows: int
) -> None:
    rng = np.random.default_rng(seed)
    matrix = make_data(rng, rows=400, features=features, missing=0)
    is_classifier = loss in {"log_loss", "exponential"}
    classes = 2 if loss == "exponential" else classes
    label = make_label(rng, matrix, classes=classes if is_classifier else 0)
    kind = ensemble.GradientBoostingClassifier if is_classifier else ensemble.GradientBoostingRegressor
    model = kind(
        loss=loss, init=init, n_estimators=rounds, max_depth=depth, learning_rate=rate, subsample=0.8, random_state=1
    ).fit(matrix, label)
    assert_same(model, make_rows(rng, pool=thresholds(model), shape=(rows, features), missing=0))


@CHOSEN
@given(
    seed=st.integers(0, 2**32 - 1),
    loss=st.sampled_from(["log_loss", "squared_error", "absolute_error", "gamma", "poisson", "quantile"]),
    features=st.integers(1, 12),
    categories=st.sampled_from([0, 0, 1, 3]),
    classes=st.sampled_from([2, 3, 11]),
    rounds=st.integers(1, 12),
    leaves=st.sampled_from([2, 31, 200]),
    bins=st.sampled_from([3, 255]),
    missing=st.sampled_from([0.0, 0.05, 0.5]),
    rows=st.sampled_from([1, 63, 512, 1100]),
)
def test_histogram_gradient_boosting(
    seed: int,
    loss: str,
    features: int,
    categories: int,
    classes: int,
    rounds: int,
    leaves: int,
    bins: int,
    missing: float,
    rows: int,
) -> None:
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(features)[:categories].tolist()
    matrix = make_data(rng, rows=600, features=features, missing=0)
    matrix[:, chosen] = rng.integers(0, min(bins, int(rng.integers(2, 60))), (600, len(chosen))) * 3
    label = make_label(rng, matrix, classes=classes if loss == "log_loss" else 0)
    matrix[rng.random(matrix.shape) < missing] = np.nan
    settings: dict[str, Any] = {
        "max_iter": rounds,
        "max_leaf_nodes": leaves,
        "max_bins": bins,
        "min_samples_leaf": 2,
        "categorical_features": chosen or None,
        "early_stopping": False,
        "random_state": 1,
    }
    if loss == "log_loss":
        model = ensemble.HistGradientBoostingClassifier(**settings)
    else:
        model = ensemble.HistGradientBoostingRegressor(loss=loss, quantile=0.7, **settings)
    model.fit(matrix, label)
    found = make_rows(rng, pool=thresholds(model), shape=(rows, features), missing=missing)
    found[rng.random(found.shape) < 0.02] = np.inf
    found[rng.random(found.shape) < 0.02] = -np.inf
    # Known and unknown categories.
    found[:, chosen] = np.where(np.isnan(found[:, chosen]), np.nan, rng.integers(-2, 190, (rows, len(chosen))))
    assert_same(model, found)


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    matrix = make_data(rng, rows=400, features=5, missing=0)
    return matrix, make_label(rng, matrix, classes=3)


def test_splits_between_missing_values_and_all_others() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((400, 2))
    matrix[rng.random(matrix.shape) < 0.4] = np.nan
    label = np.isnan(matrix).sum(axis=1).astype(float)
    for model in (
        ensemble.RandomForestRegressor(9, max_depth=3, random_state=0),
        ensemble.HistGradientBoostingRegressor(max_iter=9),
    ):
        model.fit(matrix, label)
        assert np.isinf(read_sklearn(model).threshold).sum() == 0
        assert_same(model, matrix)


@pytest.mark.parametrize("name", ["RandomForest", "GradientBoosting", "HistGradientBoosting"])
def test_sums_over_many_classes_have_the_order_of_the_layout(name: str) -> None:
    rng = np.random.default_rng(0)
    matrix = make_data(rng, rows=900, features=5, missing=0)
    model = getattr(ensemble, f"{name}Classifier")(**{"max_iter" if name.startswith("Hist") else "n_estimators": 3})
    assert_same(model.fit(matrix, make_label(rng, matrix, classes=11)), matrix)


def test_regressor_with_several_outputs(data: tuple[np.ndarray, np.ndarray]) -> None:
    matrix, label = data
    assert_same(
        ensemble.RandomForestRegressor(5, random_state=0).fit(matrix, np.stack([label, -label], axis=1)), matrix
    )


def test_float32_rows_have_the_same_bits_with_either_type(data: tuple[np.ndarray, np.ndarray]) -> None:
    matrix, label = data[0].astype(np.float32), data[1]
    model = ensemble.HistGradientBoostingClassifier(max_iter=9).fit(matrix, label)
    engine = TreeEngine(read_sklearn(model, value_type=np.float32), transform=sklearn_output(model))
    assert engine.predict(matrix).tobytes() == model.predict_proba(matrix).tobytes()


def test_initial_prediction_that_is_a_constant(data: tuple[np.ndarray, np.ndarray]) -> None:
    matrix, label = data
    first = dummy.DummyRegressor(strategy="median")
    assert_same(ensemble.GradientBoostingRegressor(init=first, n_estimators=3).fit(matrix, label), matrix)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (linear_model.LinearRegression(), "the model sklearn.linear_model._base.LinearRegression"),
        (object(), "the model builtins.object"),
        (ensemble.RandomForestClassifier(), "a model that is not fitted"),
    ],
    ids=["another", "object", "unfitted"],
)
def test_what_is_not_supported_is_named(model: Any, reason: str) -> None:
    assert unsupported_sklearn(model) == (reason,)
    with pytest.raises(ModelError, match=reason):
        read_sklearn(model)


def test_initial_prediction_by_rows_is_refused(data: tuple[np.ndarray, np.ndarray]) -> None:
    first = linear_model.LinearRegression()
    model = ensemble.GradientBoostingRegressor(init=first, n_estimators=3).fit(*data)
    assert unsupported_sklearn(model) == (
        "an initial prediction of LinearRegression, which is not the same for all rows",
    )
    with pytest.raises(ModelError, match="LinearRegression"):
        sklearn_output(model)


def test_classifier_with_several_outputs_is_refused(data: tuple[np.ndarray, np.ndarray]) -> None:
    matrix, label = data
    model = ensemble.RandomForestClassifier(3).fit(matrix, np.stack([label, label], axis=1))
    assert unsupported_sklearn(model) == ("a classifier with several outputs",)


def test_subclass_is_refused(data: tuple[np.ndarray, np.ndarray]) -> None:
    class Other(ensemble.RandomForestRegressor):
        pass

    assert "Other" in unsupported_sklearn(Other(3).fit(*data))[0]
