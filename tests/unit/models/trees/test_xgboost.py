"""Every objective, booster and multi-output strategy of xgboost: margins and outputs bit for bit."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ModelError
from pipeline.models.trees import TreeEngine, read_xgboost, unsupported_xgboost
from pipeline.models.trees.xgboost import (
    LIBM_TRANSFORMS,
    OBJECTIVES,
    read_ubj,
    transform_name,
    unsupported_transform,
)

xgboost = pytest.importorskip("xgboost")

FEATURES = 6


def make_matrix(rows: int, *, seed: int, missing: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, FEATURES)).astype(np.float32)
    matrix[:, 1] = rng.integers(0, 5, rows)
    matrix[rng.random(matrix.shape) < missing] = np.nan
    return matrix


def train(rounds: int = 5, *, label: np.ndarray | None = None, seed: int = 0, dmatrix: Any = None, **parameters: Any):
    matrix = make_matrix(300, seed=seed)
    if label is None:
        label = (np.nan_to_num(matrix[:, 0]) > 0).astype(np.float32)
    data = xgboost.DMatrix(matrix, label, **(dmatrix or {}))
    parameters = {"nthread": 1, "max_depth": 4, "verbosity": 0, "seed": seed} | parameters
    return xgboost.train(parameters, data, rounds)


def as_json(booster: Any) -> dict[str, Any]:
    return json.loads(bytes(booster.save_raw("json")))


def library_scores(booster: Any, matrix: np.ndarray, *, kind: str, rounds: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Return the result of `xgboost.Booster.predict`; inplace_predict has the same bits, but not for DART."""
    if json.loads(booster.save_config())["learner"]["gradient_booster"]["name"] != "dart":
        return booster.inplace_predict(matrix, predict_type=kind, iteration_range=rounds)
    data = xgboost.DMatrix(matrix, nthread=1)
    return booster.predict(data, output_margin=kind == "margin", iteration_range=rounds, validate_features=False)


def assert_same(booster: Any, matrix: np.ndarray, *, rounds: tuple[int, int] = (0, 0)) -> TreeEngine:
    model = as_json(booster)
    assert unsupported_xgboost(model, iteration_range=rounds) == ()
    engine = TreeEngine(
        read_xgboost(model, iteration_range=rounds), transform=transform_name(model["learner"]["objective"]["name"])
    )
    for kind, found in (("margin", engine.margin(matrix)), ("value", engine.predict(matrix))):
        wanted = library_scores(booster, matrix, kind=kind, rounds=rounds)
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype == np.float32
        assert found.tobytes() == wanted.tobytes(), kind
    return engine


def labels(kind: str, rows: int = 300) -> np.ndarray:
    rng = np.random.default_rng(3)
    if kind == "classes":
        return rng.integers(0, 4, rows).astype(np.float32)
    if kind == "positive":
        return rng.gamma(2.0, 2.0, rows).astype(np.float32)
    if kind == "counts":
        return rng.poisson(2.0, rows).astype(np.float32)
    if kind == "binary":
        return (rng.random(rows) < 0.3).astype(np.float32)
    return rng.standard_normal(rows).astype(np.float32)


CASES: dict[str, dict[str, Any]] = {
    "reg:squarederror": {"kind": "real"},
    "reg:linear": {"kind": "real"},
    "reg:squaredlogerror": {"kind": "positive"},
    "reg:pseudohubererror": {"kind": "real"},
    "reg:absoluteerror": {"kind": "real"},
    "reg:quantileerror": {"kind": "real", "quantile_alpha": [0.1, 0.5, 0.9]},
    "reg:logistic": {"kind": "binary"},
    "reg:gamma": {"kind": "positive"},
    "reg:tweedie": {"kind": "counts"},
    "binary:logistic": {"kind": "binary"},
    "binary:logitraw": {"kind": "binary"},
    "binary:hinge": {"kind": "binary"},
    "multi:softmax": {"kind": "classes", "num_class": 4},
    "multi:softprob": {"kind": "classes", "num_class": 4},
    "count:poisson": {"kind": "counts"},
    "survival:cox": {"kind": "positive"},
    "survival:aft": {"kind": "positive"},
    "rank:pairwise": {"kind": "classes"},
    "rank:ndcg": {"kind": "classes"},
    "rank:map": {"kind": "binary"},
}


def train_objective(objective: str, **more: Any) -> Any:
    parameters = dict(CASES[objective])
    label = labels(parameters.pop("kind"))
    extra: dict[str, Any] = {}
    if objective.startswith("rank:"):
        extra["qid"] = np.repeat(np.arange(30), 10)
    if objective == "survival:aft":
        extra |= {"label_lower_bound": label, "label_upper_bound": label + 1}
    return train(objective=objective, label=label, dmatrix=extra, **parameters, **more)


def test_every_objective_has_a_case() -> None:
    assert set(CASES) == set(OBJECTIVES)


@pytest.mark.parametrize("objective", CASES)
def test_objective(objective: str) -> None:
    assert_same(train_objective(objective), make_matrix(700, seed=9))


@pytest.mark.parametrize("base_score", [0.01, 0.3, 0.5, 0.987])
@pytest.mark.parametrize("objective", ["reg:squarederror", "binary:logistic", "count:poisson", "survival:aft"])
def test_base_score_of_the_user(objective: str, base_score: float) -> None:
    assert_same(train_objective(objective, base_score=base_score), make_matrix(200, seed=5))


def test_base_score_vector() -> None:
    booster = train_objective("multi:softprob", base_score=[0.1, -0.25, 0.5, 1.75])
    assert len(set(read_xgboost(as_json(booster)).base.tolist())) == 4
    assert_same(booster, make_matrix(200, seed=5))


def test_base_score_of_one_number_for_all_outputs() -> None:
    model = as_json(train_objective("multi:softprob"))
    model["learner"]["learner_model_param"]["base_score"] = "2.5E-1"
    loaded = xgboost.Booster(model_file=bytearray(json.dumps(model).encode()))
    assert_same(loaded, make_matrix(200, seed=5))


@pytest.mark.parametrize("objective", sorted(name for name in OBJECTIVES if transform_name(name) in LIBM_TRANSFORMS))
def test_transformation_on_many_margins(objective: str) -> None:
    """One leaf a row: the margins go through all of float32's range, with the values where exp over- and underflows."""
    model = as_json(train_objective(objective, rounds=1))
    assert unsupported_transform(objective) == ()
    matrix = np.linspace(-120, 120, 4096, dtype=np.float32)[:, None]
    booster = _stairs(model, matrix[:, 0])
    assert_same(booster, np.nextafter(matrix, np.float32(np.inf)))


def _stairs(model: dict[str, Any], steps: np.ndarray) -> Any:
    """A model of one feature whose margin in output 0 is about the feature: a balanced tree with a leaf each step."""
    left, right, conditions = [], [], []

    def grow(low: int, high: int) -> None:
        node = len(left)
        left.append(-1)
        right.append(-1)
        conditions.append(float(steps[low]))
        if high - low > 1:
            queue.append((node, low, high))

    queue: list[tuple[int, int, int]] = []
    grow(0, len(steps))
    while queue:
        node, low, high = queue.pop(0)
        middle = (low + high) // 2
        conditions[node] = float(steps[middle])
        left[node], right[node] = len(left), len(left) + 1
        grow(low, middle)
        grow(middle, high)
    nodes = len(left)
    parents = [2147483647] * nodes
    for node in range(nodes):
        if left[node] >= 0:
            parents[left[node]] = parents[right[node]] = node
    learner = model["learner"]
    learner["learner_model_param"]["num_feature"] = "1"
    learner |= {"feature_names": [], "feature_types": []}
    for tree, factor in zip(learner["gradient_booster"]["model"]["trees"], (1.0, -0.7, 0.3, 0.0), strict=False):
        leaves = [value if left[node] >= 0 else value * factor for node, value in enumerate(conditions)]
        tree |= {name: [0.0] * nodes for name in ("base_weights", "loss_changes", "sum_hessian")}
        tree |= {name: [0] * nodes for name in ("default_left", "split_indices", "split_type")}
        tree |= {"left_children": left, "right_children": right, "split_conditions": leaves, "parents": parents}
        tree["tree_param"] |= {"num_nodes": str(nodes), "num_feature": "1", "num_deleted": "0"}
    return xgboost.Booster(model_file=bytearray(json.dumps(model).encode()))


@pytest.mark.parametrize("more", [{}, {"num_parallel_tree": 3, "subsample": 0.5}], ids=["single", "forest"])
@pytest.mark.parametrize("objective", ["binary:logistic", "multi:softprob"])
def test_dart(objective: str, more: dict[str, Any]) -> None:
    booster = train_objective(objective, rounds=12, booster="dart", rate_drop=0.4, one_drop=1, **more)
    stored = as_json(booster)["learner"]["gradient_booster"]
    weights = stored.get("weight_drop") or stored["model"]["weight_drop"]  # xgboost before 3.4, and from it on
    assert len(set(weights)) > 1
    assert_same(booster, make_matrix(700, seed=4))
    assert_same(booster, make_matrix(70, seed=4), rounds=(2, 7))


@pytest.mark.parametrize("strategy", ["one_output_per_tree", "multi_output_tree"])
@pytest.mark.parametrize("objective", ["reg:squarederror", "binary:logistic"])
def test_several_targets(objective: str, strategy: str) -> None:
    label = np.stack([labels("binary")] * 3, axis=1)
    label[::3, 1] = 1 - label[::3, 1]
    booster = train(objective=objective, label=label, multi_strategy=strategy, rounds=11)
    tables = assert_same(booster, make_matrix(700, seed=4)).tables
    assert tables.outputs == 3
    assert tables.leaf.shape[1] == (3 if strategy == "multi_output_tree" else 1)


def test_vector_leaves_of_classes() -> None:
    assert_same(train_objective("multi:softprob", multi_strategy="multi_output_tree"), make_matrix(300, seed=8))


@pytest.mark.parametrize("max_cat_to_onehot", [1, 100], ids=["partition", "one-hot"])
def test_categories(max_cat_to_onehot: int) -> None:
    matrix = make_matrix(600, seed=2)
    rng = np.random.default_rng(0)
    matrix[:, 1] = rng.integers(0, 40, 600)
    label = np.sin(matrix[:, 1]) + np.nan_to_num(matrix[:, 0])
    data = xgboost.DMatrix(matrix, label, feature_types=["q", "c", *"qqqq"], enable_categorical=True)
    booster = xgboost.train({"nthread": 1, "max_cat_to_onehot": max_cat_to_onehot, "max_depth": 6}, data, 8)
    test = make_matrix(700, seed=4)
    odd = [-1, -0.5, -0.0, 0.5, 39, 39.5, 40, 1000, 2**24 - 1, 2**24, 2**31, 1e30, np.inf, -np.inf, np.nan, -1e-45]
    test[:, 1] = np.resize(np.concatenate([np.arange(40), odd]), 700)
    tables = assert_same(booster, test).tables
    assert tables.is_category.any()


@pytest.mark.parametrize("rounds", [(0, 0), (0, 1), (3, 4), (2, 7), (7, 10), (0, 10)])
@pytest.mark.parametrize("objective", ["binary:logistic", "multi:softprob"])
def test_iteration_ranges(objective: str, rounds: tuple[int, int]) -> None:
    booster = train_objective(objective, rounds=10, num_parallel_tree=2, subsample=0.7)
    assert_same(booster, make_matrix(90, seed=4), rounds=rounds)
    model = as_json(booster)
    del model["learner"]["gradient_booster"]["model"]["iteration_indptr"]
    old = read_xgboost(model, iteration_range=rounds)
    assert pickle.dumps(old) == pickle.dumps(read_xgboost(as_json(booster), iteration_range=rounds))


def test_iteration_range_outside_the_model_is_refused() -> None:
    with pytest.raises(ModelError, match="iteration range"):
        read_xgboost(as_json(train()), iteration_range=(0, 6))


@pytest.mark.parametrize(
    "parameters", [{"max_depth": 12}, {"max_depth": 0, "max_leaves": 400}], ids=["deep", "lossguide"]
)
def test_deep_trees(parameters: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((6000, FEATURES)).astype(np.float32)
    label = np.sin(5 * matrix[:, 0]) * np.cos(3 * matrix[:, 1]) + matrix[:, 2] ** 3
    data = xgboost.DMatrix(matrix, label)
    parameters |= {"nthread": 1, "grow_policy": "lossguide", "min_child_weight": 0}
    booster = xgboost.train(parameters, data, 4)
    tables = assert_same(booster, rng.standard_normal((1100, FEATURES)).astype(np.float32)).tables
    assert np.diff(tables.start).max() > 2 * 256


def test_booster_without_trees_gives_its_base_score() -> None:
    booster = train(rounds=0, base_score=0.25)
    assert TreeEngine(read_xgboost(as_json(booster))).margin(make_matrix(3, seed=0)).tolist() == [0.25] * 3


def test_what_is_not_claimed_is_named() -> None:
    assert unsupported_xgboost(as_json(train(booster="gblinear"))) == ("the booster gblinear",)
    assert unsupported_xgboost({}) == ("a model that is not xgboost's JSON",)
    model = as_json(train())
    model["learner"]["objective"]["name"] = "reg:new"
    assert unsupported_xgboost(model) == ("the objective reg:new",)
    assert unsupported_transform("reg:new") == ("the objective reg:new",)
    with pytest.raises(ModelError, match="xgboost itself"):
        read_xgboost(model)


def test_right_children_that_xgboost_would_not_reach_are_named() -> None:
    model = as_json(train())
    tree = model["learner"]["gradient_booster"]["model"]["trees"][0]
    tree["left_children"][0], tree["right_children"][0] = tree["right_children"][0], tree["left_children"][0]
    assert unsupported_xgboost(model) == ("a right child that is not next to the left one",)


def test_vector_leaves_of_an_older_format_are_named() -> None:
    model = as_json(train(label=np.zeros((300, 2)), multi_strategy="multi_output_tree"))
    for tree in model["learner"]["gradient_booster"]["model"]["trees"]:
        del tree["leaf_weights"]
    assert unsupported_xgboost(model) == ("vector leaves in the format of xgboost before 3.2",)


def assert_equal(found: Any, wanted: Any, path: str = "") -> None:
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), path
        for name in wanted:
            assert_equal(found[name], wanted[name], f"{path}.{name}")
    elif isinstance(found, np.ndarray):
        np.testing.assert_array_equal(found, np.asarray(wanted, dtype=found.dtype), err_msg=path)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), path
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other, path)
    elif isinstance(wanted, float):
        assert np.float32(found) == np.float32(wanted), path
    else:
        assert found == wanted, path


@pytest.fixture(scope="module")
def booster() -> Any:
    rng = np.random.default_rng(0)
    values = np.c_[rng.normal(size=(500, 3)), rng.integers(0, 6, 500)]
    data = xgboost.DMatrix(values, rng.random(500), feature_types=["float"] * 3 + ["c"], enable_categorical=True)
    return xgboost.train({"max_depth": 4, "booster": "dart", "rate_drop": 0.5, "nthread": 1, "seed": 1}, data, 5)


class TestReadUbj:
    """The binary form of a model file reads as its JSON form."""

    def test_it_is_what_the_json_says(self, booster: Any) -> None:
        found = read_ubj(booster.save_raw("ubj"))
        assert_equal(found, json.loads(booster.save_raw("json")))
        stored = found["learner"]["gradient_booster"]
        tree = stored.get("gbtree", stored)["model"]["trees"][0]
        assert tree["split_conditions"].dtype == np.float32
        assert tree["split_conditions"].dtype.isnative

    def test_every_cut_is_refused(self, booster: Any) -> None:
        data = bytes(booster.save_raw("ubj"))
        for length in [*range(200), *range(200, len(data), 97)]:
            with pytest.raises(ModelError, match="not complete UBJSON"):
                read_ubj(data[:length])

    @pytest.mark.parametrize(
        "data", [b"Z", b"[#U\x01T", b"{L" + b"\xff" * 8, b"{U\x01a?}", b"[$U]", b"{U\x01aSd\x00\x00\x00\x00}"]
    )
    def test_what_is_no_object_is_refused(self, data: bytes) -> None:
        with pytest.raises(ModelError):
            read_ubj(data)

    def test_every_kind_of_value(self) -> None:
        data = (
            b"{U\x01ai\xffU\x01bU\xffU\x01cI\x01\x00U\x01dl\x00\x01\x00\x00U\x01eD\x3f\xf8\x00\x00\x00\x00\x00\x00"
            b"U\x01fTU\x01gFU\x01hZU\x01i[SU\x01xU\x07]U\x01j[#U\x02TFU\x01k[$I#U\x02\x00\x01\xff\xff}"
        )
        found = read_ubj(data)
        assert found.pop("k").tolist() == [1, -1]
        assert found == {
            "a": -1, "b": 255, "c": 256, "d": 65536, "e": 1.5, "f": True, "g": False, "h": None, "i": ["x", 7],
            "j": [True, False],
        }  # fmt: skip
