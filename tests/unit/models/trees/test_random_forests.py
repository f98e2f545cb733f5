"""Random models and random rows: the engine's margins are xgboost's, bit for bit.

``PIPELINE_TREES_EXAMPLES`` sets how many models of each kind are tried.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.models.trees import TreeEngine, read_xgboost, unsupported_xgboost
from pipeline.models.trees.xgboost import transform_name
from pipeline.testing.examples import choose

xgboost = pytest.importorskip("xgboost")

EXAMPLES = int(os.environ.get("PIPELINE_TREES_EXAMPLES") or choose(30, of=300))
CHOSEN = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
SPECIAL = np.array(
    [
        0.0,
        -0.0,
        1e-45,
        -1e-45,
        1.1754944e-38,
        3.4028235e38,
        -3.4028235e38,
        1.0,
        np.nextafter(np.float32(1), 0),
        16777216.0,
    ],
    np.float32,
)


def grow(rng: np.random.Generator, *, splits: int, shape: str) -> tuple[list[int], list[int]]:
    """Return the children of a random tree: even, lopsided or a chain."""
    left, right, leaves = [-1], [-1], [0]
    for _ in range(splits):
        at = {"even": 0, "random": int(rng.integers(len(leaves))), "chain": len(leaves) - 1}[shape]
        node = leaves.pop(at)
        left[node], right[node] = len(left), len(left) + 1
        children = [left[node], right[node]]
        leaves.extend(children if rng.random() < 0.5 else children[::-1])
        left.extend([-1, -1])
        right.extend([-1, -1])
    return left, right


def make_tree(
    rng: np.random.Generator, *, number: int, pool: np.ndarray, kinds: np.ndarray, **form: Any
) -> dict[str, Any]:
    left, right = grow(rng, **form)
    nodes = len(left)
    split = np.array(left) >= 0
    feature = np.where(split, rng.integers(0, len(kinds), nodes), 0)
    category = split & (kinds[feature] == 1)
    conditions = np.where(split, rng.choice(pool, nodes), rng.standard_normal(nodes).astype(np.float32))
    sets = [np.unique(rng.integers(0, 70, rng.integers(1, 20))) for _ in range(int(category.sum()))]
    sizes = [len(codes) for codes in sets]
    parents = np.full(nodes, 2147483647)
    parents[np.array(left)[split]] = parents[np.array(right)[split]] = np.flatnonzero(split)
    return {
        "base_weights": [0.0] * nodes,
        "categories": [int(code) for codes in sets for code in codes],
        "categories_nodes": np.flatnonzero(category).tolist(),
        "categories_segments": np.cumsum([0, *sizes])[:-1].tolist() if sizes else [],
        "categories_sizes": sizes,
        "default_left": rng.integers(0, 2, nodes).tolist(),
        "id": number,
        "left_children": left,
        "loss_changes": [0.0] * nodes,
        "parents": parents.tolist(),
        "right_children": right,
        "split_conditions": [float(value) for value in conditions],
        "split_indices": feature.tolist(),
        "split_type": category.astype(int).tolist(),
        "sum_hessian": [1.0] * nodes,
        "tree_param": {
            "num_deleted": "0",
            "num_feature": str(len(kinds)),
            "num_nodes": str(nodes),
            "size_leaf_vector": "1",
        },
    }


def make_model(
    rng: np.random.Generator, *, trees: int, outputs: int, dart: bool, kinds: np.ndarray, **form: Any
) -> Any:
    """Return a Booster with random trees that no training would give."""
    gbtree = {
        "cats": {"enc": [], "feature_segments": [], "sorted_idx": []},
        "gbtree_model_param": {"num_parallel_tree": "1", "num_trees": str(trees * outputs)},
        "iteration_indptr": list(range(0, trees * outputs + 1, outputs)),
        "tree_info": list(range(outputs)) * trees,
        "trees": [make_tree(rng, number=i, kinds=kinds, **form) for i in range(trees * outputs)],
    }
    booster: dict[str, Any] = {"model": gbtree, "name": "gbtree"}
    if dart:
        weights = rng.random(trees * outputs).astype(np.float32)
        booster = {"gbtree": booster, "name": "dart", "weight_drop": [float(weight) for weight in weights]}
    base = rng.random(outputs).astype(np.float32)
    model = {
        "learner": {
            "attributes": {},
            "feature_names": [],
            "feature_types": [["q", "c"][kind] for kind in kinds],
            "gradient_booster": booster,
            "learner_model_param": {
                "base_score": "[" + ",".join(f"{value:.9E}" for value in base) + "]",
                "boost_from_average": "1",
                "num_class": str(outputs if outputs > 1 else 0),
                "num_feature": str(len(kinds)),
                "num_target": "1",
            },
            "objective": {"name": "multi:softprob", "softmax_multiclass_param": {"num_class": str(outputs)}}
            if outputs > 1
            else {"name": "binary:logistic", "reg_loss_param": {"scale_pos_weight": "1"}},
        },
        "version": [3, 2, 0],
    }
    return xgboost.Booster({"nthread": 1}, model_file=bytearray(json.dumps(model).encode()))


def make_rows(
    rng: np.random.Generator, *, rows: int, pool: np.ndarray, kinds: np.ndarray, missing: float
) -> np.ndarray:
    """Rows of values at, just below and just above thresholds, of special values, and of odd category codes."""
    shape = (rows, len(kinds))
    near = rng.choice(pool, shape)
    with np.errstate(over="ignore", under="ignore"):
        nudged = np.nextafter(near, rng.choice(np.array([-np.inf, np.inf], np.float32), shape))
    odd = rng.choice(np.append(SPECIAL, np.array([np.inf, -np.inf], np.float32)), shape)
    choice = rng.integers(0, 4, shape)
    matrix = np.choose(choice, [near, nudged, odd, rng.standard_normal(shape).astype(np.float32)])
    codes = rng.integers(-2, 80, shape) + rng.choice(np.array([0, 0, 0.5], np.float32), shape)
    matrix = np.where((kinds == 1) & (choice != 2), codes, matrix).astype(np.float32)
    matrix[rng.random(shape) < missing] = np.nan
    return matrix


def assert_same(booster: Any, matrix: np.ndarray, *, transform: bool = False) -> None:
    model = json.loads(bytes(booster.save_raw("json")))
    assert unsupported_xgboost(model) == ()
    name = transform_name(model["learner"]["objective"]["name"])
    engine = TreeEngine(read_xgboost(model), transform=name)
    is_dart = model["learner"]["gradient_booster"]["name"] == "dart"
    if is_dart:
        # Only inplace_predict takes infinities, and its DART is not predict's.
        matrix = np.where(np.isinf(matrix), np.float32(3e38), matrix)
    data = xgboost.DMatrix(matrix, nthread=1) if is_dart else None

    def library(kind: str) -> np.ndarray:
        if data is None:
            return booster.inplace_predict(matrix, predict_type=kind)
        return booster.predict(data, output_margin=kind == "margin", validate_features=False)

    wanted = library("margin")
    assert engine.margin(matrix).tobytes() == wanted.tobytes()
    assert engine.margin(np.asfortranarray(matrix), threads=2).tobytes() == wanted.tobytes()
    if transform:
        assert engine.predict(matrix).tobytes() == library("value").tobytes()


@CHOSEN
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(["even", "random", "chain"]),
    splits=st.sampled_from([0, 1, 2, 7, 40, 63, 150, 300]),
    trees=st.integers(1, 10),
    outputs=st.sampled_from([1, 1, 1, 2, 5]),
    dart=st.booleans(),
    features=st.integers(1, 12),
    categories=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    thresholds=st.sampled_from([1, 3, 100, 1000]),
    rows=st.sampled_from([1, 63, 64, 511, 512, 513, 1100]),
    missing=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_trees_that_no_training_would_give(
    seed: int,
    shape: str,
    splits: int,
    trees: int,
    outputs: int,
    dart: bool,
    features: int,
    categories: float,
    thresholds: int,
    rows: int,
    missing: float,
) -> None:
    rng = np.random.default_rng(seed)
    kinds = (rng.random(features) < categories).astype(int)
    pool = np.append(SPECIAL, rng.standard_normal(thresholds).astype(np.float32))
    form: dict[str, Any] = {"pool": pool, "splits": splits, "shape": shape}
    booster = make_model(rng, trees=trees, outputs=outputs, dart=dart, kinds=kinds, **form)
    assert_same(booster, make_rows(rng, rows=rows, pool=pool, kinds=kinds, missing=missing), transform=True)


@CHOSEN
@given(
    seed=st.integers(0, 2**32 - 1),
    features=st.integers(1, 20),
    categories=st.sampled_from([0, 0, 1, 3]),
    missing=st.sampled_from([0.0, 0.02, 0.3, 0.9]),
    depth=st.integers(1, 13),
    policy=st.sampled_from(["depthwise", "lossguide"]),
    method=st.sampled_from(["hist", "approx", "exact"]),
    booster=st.sampled_from(["gbtree", "gbtree", "dart"]),
    parallel=st.integers(1, 3),
    objective=st.sampled_from(
        ["binary:logistic", "reg:squarederror", "multi:softprob", "count:poisson", "survival:cox"]
    ),
    rounds=st.integers(1, 6),
)
def test_trained_models(
    seed: int,
    features: int,
    categories: int,
    missing: float,
    depth: int,
    policy: str,
    method: str,
    booster: str,
    parallel: int,
    objective: str,
    rounds: int,
) -> None:
    rng = np.random.default_rng(seed)
    categories = 0 if method == "exact" else min(categories, features)
    kinds = np.arange(features) < categories
    matrix = rng.standard_normal((400, features)).astype(np.float32)
    matrix[:, kinds] = rng.integers(0, rng.integers(2, 60), (400, categories))
    label = np.abs(np.sin(3 * matrix).sum(axis=1) + rng.standard_normal(400))
    label = np.clip(label.round(), 0, 1 if objective == "binary:logistic" else 3)
    matrix[rng.random(matrix.shape) < missing] = np.nan
    data = xgboost.DMatrix(
        matrix[:300], label[:300], feature_types=[["q", "c"][int(kind)] for kind in kinds], enable_categorical=True
    )
    parameters = {
        "objective": objective,
        "booster": booster,
        "max_depth": depth,
        "tree_method": method,
        "grow_policy": policy if method == "hist" else "depthwise",
        "num_parallel_tree": parallel,
        "subsample": 0.8,
        "min_child_weight": 0,
        "max_cat_to_onehot": int(rng.integers(1, 30)),
        "nthread": 1,
        "verbosity": 0,
        "seed": seed % 2**31,
    }
    parameters |= {"num_class": 4} if objective == "multi:softprob" else {}
    parameters |= {"rate_drop": 0.5} if booster == "dart" else {}
    assert_same(xgboost.train(parameters, data, rounds), matrix, transform=True)
