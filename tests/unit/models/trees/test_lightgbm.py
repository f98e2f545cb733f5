"""The engine's margins and outputs are LightGBM's, bit for bit.

``PIPELINE_TREES_EXAMPLES`` sets how many models of each kind are tried.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ModelError
from pipeline.models.trees import TreeEngine
from pipeline.models.trees.lightgbm import _read_number, lightgbm_output, read_lightgbm, unsupported_lightgbm
from pipeline.testing.examples import choose

lightgbm = pytest.importorskip("lightgbm", reason="LightGBM is not installed")

EXAMPLES = int(os.environ.get("PIPELINE_TREES_EXAMPLES") or choose(20, of=300))
CHOSEN = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

ZERO = float(np.float32(1e-35))
"""LightGBM's ``kZeroThreshold``."""

SPECIAL = np.array(
    [
        *(0.0, -0.0, 5e-324, -5e-324, 1e-45, -1e-45, 1e-36, -1e-36, 1e-30, -1e-30, 1.0, 1e30, -1e30),
        *(ZERO, -ZERO, *np.nextafter(ZERO, [0, 1]), *np.nextafter(-ZERO, [0, -1])),
        *(1.7e308, -1.7e308, np.inf, -np.inf),
    ]
)

OBJECTIVES: dict[str, dict[str, Any]] = {
    "regression": {},
    "regression sqrt": {"objective": "regression", "reg_sqrt": True},
    "regression_l1": {},
    "huber": {},
    "fair": {},
    "quantile": {"alpha": 0.7},
    "mape": {},
    "poisson": {},
    "gamma": {},
    "tweedie": {"tweedie_variance_power": 1.3},
    "binary": {},
    "binary sigmoid": {"objective": "binary", "sigmoid": 0.37},
    "multiclass": {"num_class": 4},
    "multiclassova": {"num_class": 4, "sigmoid": 1.7},
    "cross_entropy": {},
    "cross_entropy_lambda": {},
    "lambdarank": {},
    "rank_xendcg": {},
}


def make_data(rng: np.random.Generator, *, rows: int, kinds: np.ndarray, zeros: float, missing: float) -> np.ndarray:
    """Return [rows, features] numbers, or codes where ``kinds`` is 1."""
    matrix = rng.standard_normal((rows, len(kinds)))
    matrix[:, ::3] = matrix[:, ::3].round(1)
    matrix[:, kinds == 1] = rng.integers(0, rng.integers(2, 70), (rows, int(kinds.sum())))
    matrix[rng.random(matrix.shape) < zeros] = 0.0
    matrix[rng.random(matrix.shape) < missing] = np.nan
    return matrix


def make_label(rng: np.random.Generator, matrix: np.ndarray, objective: str) -> np.ndarray:
    signal = np.nan_to_num(np.sin(3 * matrix)).sum(axis=1) + rng.standard_normal(len(matrix))
    if objective.startswith(("binary", "cross")):
        return (signal > 0).astype(float)
    if objective.startswith(("multi", "lambda", "rank")):
        return np.clip(np.abs(signal).round(), 0, 3)
    return np.abs(signal) + 0.1 if objective in {"poisson", "gamma", "tweedie"} else signal


def train(
    rng: np.random.Generator, matrix: np.ndarray, *, objective: str, kinds: np.ndarray, rounds: int, **settings: Any
) -> Any:
    """Return a booster that was saved and loaded: its parameters have the digits of the text."""
    parameters = {"objective": objective, "verbose": -1, "num_threads": 1, "seed": int(rng.integers(1 << 30))}
    parameters |= OBJECTIVES[objective] | settings
    data = lightgbm.Dataset(
        matrix,
        make_label(rng, matrix, objective),
        categorical_feature=np.flatnonzero(kinds).tolist(),
        group=[50] * (len(matrix) // 50) if objective in {"lambdarank", "rank_xendcg"} else None,
        free_raw_data=False,
    )
    booster = lightgbm.train(parameters, data, rounds)
    return lightgbm.Booster(model_str=booster.model_to_string())


def make_rows(rng: np.random.Generator, *, text: str, rows: int, kinds: np.ndarray, missing: float) -> np.ndarray:
    """Rows of values at, just below and just above thresholds, of special values, and of odd category codes."""
    lines = [line.partition("=")[2].split() for line in text.split("\n") if line.startswith("threshold=")]
    pool = np.append(SPECIAL, np.array([float(value) for line in lines for value in line]))
    shape = (rows, len(kinds))
    near = rng.choice(pool, shape)
    with np.errstate(over="ignore", under="ignore"):
        nudged = np.nextafter(near, rng.choice([-np.inf, np.inf], shape))
    choice = rng.integers(0, 4, shape)
    matrix = np.choose(choice, [near, nudged, rng.choice(SPECIAL, shape), rng.standard_normal(shape)])
    codes = rng.integers(-2, 90, shape) + rng.choice([0, 0, 0.5, -0.5], shape)
    matrix = np.where((kinds == 1) & (choice != 2), codes, matrix)
    matrix[rng.random(shape) < missing] = np.nan
    return matrix


def assert_same(booster: Any, matrix: np.ndarray, **iterations: int) -> None:
    text = booster.model_to_string()
    assert unsupported_lightgbm(text) == ()
    begin = iterations.get("start_iteration", 0)
    bounds = (begin, begin + iterations["num_iteration"]) if iterations else (0, 0)
    with np.errstate(over="ignore"):
        single = matrix.astype(np.float32)
    for rows in (matrix, single):
        engine = TreeEngine(
            read_lightgbm(text, iteration_range=bounds, value_type=rows.dtype.type),
            transform=lightgbm_output(text, iteration_range=bounds),
        )
        margin = booster.predict(rows, raw_score=True, num_threads=1, **iterations)
        assert margin.dtype == np.float64
        assert engine.margin(rows).tobytes() == margin.tobytes()
        assert engine.margin(np.asfortranarray(rows), threads=2).tobytes() == margin.tobytes()
        assert engine.predict(rows).tobytes() == booster.predict(rows, num_threads=1, **iterations).tobytes()


@CHOSEN
@given(
    seed=st.integers(0, 2**32 - 1),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    boosting=st.sampled_from(["gbdt", "gbdt", "dart", "rf"]),
    features=st.integers(1, 12),
    categories=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    leaves=st.sampled_from([2, 7, 31, 100, 300]),
    bins=st.sampled_from([3, 63, 255, 1000]),
    rounds=st.integers(1, 12),
    zeros=st.sampled_from([0.0, 0.2, 0.7]),
    missing=st.sampled_from([0.0, 0.05, 0.5]),
    use_missing=st.booleans(),
    zero_as_missing=st.booleans(),
    rows=st.sampled_from([1, 63, 512, 1100]),
)
def test_trained_models(
    seed: int,
    objective: str,
    boosting: str,
    features: int,
    categories: float,
    leaves: int,
    bins: int,
    rounds: int,
    zeros: float,
    missing: float,
    use_missing: bool,
    zero_as_missing: bool,
    rows: int,
) -> None:
    rng = np.random.default_rng(seed)
    kinds = (rng.random(features) < categories).astype(int)
    matrix = make_data(rng, rows=800, kinds=kinds, zeros=zeros, missing=missing)
    booster = train(
        rng,
        matrix,
        objective=objective,
        kinds=kinds,
        rounds=rounds,
        boosting=boosting,
        num_leaves=leaves,
        max_bin=bins,
        use_missing=use_missing,
        zero_as_missing=zero_as_missing,
        min_data_in_leaf=1,
        min_data_in_bin=1,
        min_data_per_group=1,
        cat_smooth=1,
        max_cat_to_onehot=int(rng.integers(1, 20)),
        bagging_freq=1,
        bagging_fraction=0.7,
        feature_fraction=0.8,
    )
    text = booster.model_to_string()
    assert_same(booster, make_rows(rng, text=text, rows=rows, kinds=kinds, missing=missing))


def make_text(rng: np.random.Generator, *, splits: int, kinds: np.ndarray, trees: int) -> str:
    """Return a model that no training would give: any threshold with any missing type and direction."""
    names = " ".join(f"f{i}" for i in range(len(kinds)))
    infos = " ".join(["none"] * len(kinds))
    bodies = []
    for number in range(trees):
        left, right = [-1], [-1]
        pending: list[tuple[list[int], int]] = []
        for split in range(splits):
            if split:
                side, at = pending.pop(int(rng.integers(len(pending))))
                side[at] = split
                left.append(-1)
                right.append(-1)
            pending += [(left, split), (right, split)]
        for leaf, (side, at) in enumerate(pending):
            side[at] = ~leaf
        feature = rng.integers(0, len(kinds), splits)
        decision = rng.integers(0, 3, splits) * 4 + rng.integers(0, 2, splits) * 2
        pool = np.append(SPECIAL, rng.standard_normal(9))
        threshold = np.where(kinds[feature] == 1, 0, rng.choice(pool, splits))
        sets = np.flatnonzero(kinds[feature] == 1)
        decision[sets] = 1
        threshold[sets] = np.arange(len(sets))
        words = rng.integers(0, 2**32, 3 * len(sets))
        fields = {
            "num_leaves": [splits + 1],
            "num_cat": [len(sets)],
            "split_feature": feature,
            "split_gain": np.ones(splits, int),
            "threshold": threshold.tolist(),
            "decision_type": decision,
            "left_child": left,
            "right_child": right,
            "leaf_value": rng.standard_normal(splits + 1).tolist(),
            **({"cat_boundaries": np.arange(len(sets) + 1) * 3, "cat_threshold": words} if len(sets) else {}),
            "is_linear": [0],
            "shrinkage": [1],
        }
        bodies.append(
            f"Tree={number}\n" + "".join(f"{k}={' '.join(map(str, v))}\n" for k, v in fields.items()) + "\n\n"
        )
    sizes = " ".join(str(len(body)) for body in bodies)
    head = (
        f"tree\nversion=v4\nnum_class=1\nnum_tree_per_iteration=1\nlabel_index=0\nmax_feature_idx={len(kinds) - 1}\n"
        f"objective=binary sigmoid:1\nfeature_names={names}\nfeature_infos={infos}\ntree_sizes={sizes}\n\n"
    )
    return head + "".join(bodies) + "end of trees\n"


@CHOSEN
@given(
    seed=st.integers(0, 2**32 - 1),
    splits=st.sampled_from([1, 2, 7, 40, 255, 300]),
    trees=st.integers(1, 9),
    features=st.integers(1, 6),
    categories=st.sampled_from([0.0, 0.3, 1.0]),
    missing=st.sampled_from([0.0, 0.2]),
)
def test_trees_that_no_training_would_give(
    seed: int, splits: int, trees: int, features: int, categories: float, missing: float
) -> None:
    rng = np.random.default_rng(seed)
    kinds = (rng.random(features) < categories).astype(int)
    text = make_text(rng, splits=splits, kinds=kinds, trees=trees)
    booster = lightgbm.Booster(model_str=text)
    assert_same(booster, make_rows(rng, text=text, rows=600, kinds=kinds, missing=missing))


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return make_data(np.random.default_rng(0), rows=600, kinds=np.zeros(5, int), zeros=0.1, missing=0.1)


NUMBERS = np.zeros(5, int)


@pytest.mark.parametrize("bounds", [(0, 3), (2, 5), (4, 9)], ids=str)
@pytest.mark.parametrize("boosting", ["gbdt", "rf"])
def test_ranges_of_iterations(data: np.ndarray, bounds: tuple[int, int], boosting: str) -> None:
    forest = {"boosting": boosting, "bagging_freq": 1, "bagging_fraction": 0.6}
    booster = train(np.random.default_rng(1), data, objective="multiclass", kinds=NUMBERS, rounds=9, **forest)
    assert_same(booster, data, start_iteration=bounds[0], num_iteration=bounds[1] - bounds[0])


def test_range_outside_the_model_is_refused(data: np.ndarray) -> None:
    text = train(np.random.default_rng(1), data, objective="binary", kinds=NUMBERS, rounds=3).model_to_string()
    with pytest.raises(ModelError, match="0 to 4"):
        read_lightgbm(text, iteration_range=(0, 4))


def test_model_without_splits(data: np.ndarray) -> None:
    booster = train(np.random.default_rng(1), data, objective="binary", kinds=NUMBERS, rounds=3, min_data_in_leaf=599)
    assert_same(booster, data)


def test_model_that_continues_another_one(data: np.ndarray) -> None:
    first = lightgbm.train({"verbose": -1, "zero_as_missing": True}, lightgbm.Dataset(data, data[:, 0] > 0), 3)
    second = lightgbm.train(
        {"verbose": -1, "use_missing": False},
        lightgbm.Dataset(data, data[:, 1] > 0, free_raw_data=False),
        3,
        init_model=first,
    )
    assert_same(lightgbm.Booster(model_str=second.model_to_string()), data)


def test_custom_objective_has_its_margins_as_outputs(data: np.ndarray) -> None:
    def squares(scores: np.ndarray, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        return scores - dataset.get_label(), np.ones(len(scores))

    booster = lightgbm.train({"verbose": -1, "objective": squares}, lightgbm.Dataset(data, np.ones(len(data))), 3)
    assert_same(lightgbm.Booster(model_str=booster.model_to_string()), data)


@pytest.mark.parametrize("text", ["0.37", "1", "1.7", "0.333333", "1e-05", "2.5e+10", "123456", "1e-200", "0.1234567"])
def test_parameters_are_read_as_lightgbm_reads_them(data: np.ndarray, text: str) -> None:
    booster = train(np.random.default_rng(1), data, objective="binary", kinds=NUMBERS, rounds=2)
    model = booster.model_to_string().replace("sigmoid:1\n", f"sigmoid:{text}\n")
    changed = lightgbm.Booster(model_str=model)
    output = lightgbm_output(model)
    assert output.slope == _read_number(text) == pytest.approx(float(text))
    margins = changed.predict(data, raw_score=True)
    assert output(margins).tobytes() == changed.predict(data).tobytes()


def test_linear_trees_are_refused(data: np.ndarray) -> None:
    booster = lightgbm.train({"verbose": -1, "linear_tree": True}, lightgbm.Dataset(data, np.nan_to_num(data[:, 0])), 3)
    text = booster.model_to_string()
    assert unsupported_lightgbm(text) == ("linear trees: a leaf that is a function of the row",)
    with pytest.raises(ModelError, match="linear trees"):
        read_lightgbm(text)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("version=v4", "version=v9", "the format v9, none of v3, v4"),
        ("objective=binary", "objective=other", "the objective other"),
        ("num_leaves=31", "num_leaves=30", "a tree with 30 entries in split_feature, expected 29"),
    ],
)
def test_what_is_not_supported_is_named(data: np.ndarray, old: str, new: str, reason: str) -> None:
    text = train(
        np.random.default_rng(1), data, objective="binary", kinds=NUMBERS, rounds=3, min_data_in_leaf=1
    ).model_to_string()
    assert old in text
    assert unsupported_lightgbm(text.replace(old, new)) == (reason,)
    with pytest.raises(ModelError, match=reason):
        read_lightgbm(text.replace(old, new))


@pytest.mark.parametrize("length", [0, 5, 100, 400, 1500])
def test_every_cut_is_refused(data: np.ndarray, length: int) -> None:
    text = train(np.random.default_rng(1), data, objective="binary", kinds=NUMBERS, rounds=3).model_to_string()
    with pytest.raises(ModelError, match="cut off"):
        read_lightgbm(text[:length])


@CHOSEN
@given(seed=st.integers(0, 2**32 - 1), splits=st.sampled_from([1, 7]), categories=st.sampled_from([0.0, 0.5]))
def test_damaged_texts_are_refused_or_read(seed: int, splits: int, categories: float) -> None:
    rng = np.random.default_rng(seed)
    kinds = (rng.random(3) < categories).astype(int)
    lines = make_text(rng, splits=splits, kinds=kinds, trees=2).split("\n")
    at = int(rng.integers(len(lines)))
    name, equals, value = lines[at].partition("=")
    damage = rng.integers(4)
    if damage == 0:
        del lines[at]
    elif damage == 1:
        lines[at] = name + equals + value[: len(value) // 2]
    elif damage == 2:
        lines[at] = name + equals + value.replace("0", str(rng.choice(["9", "-", "x", "nan", "1e400"])))
    else:
        lines.insert(at, lines[int(rng.integers(len(lines)))])
    text = "\n".join(lines)
    reasons = unsupported_lightgbm(text)
    if not reasons:
        lightgbm_output(text)(TreeEngine(read_lightgbm(text)).margin(np.zeros((2, read_lightgbm(text).n_features))))
