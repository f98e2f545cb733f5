"""The base folded into the first tree: the same margins on the CPU, and in the GPU's order of addition."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ModelError
from pipeline.models.flavors.xgboost_fold import fold_base, fold_blockers
from pipeline.models.trees.xgboost import OBJECTIVES, base_margin, locate_ubj, read_ubj
from pipeline.testing.gpu_order import gpu_order_margins

ROUNDS = 6
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-(2.0**-130), 2.0**-130, width=32)
"""Float32 numbers; the second range has denormals only."""
DENORMAL = np.float32(1e-42)
SINGLE: dict[str, dict[str, Any]] = {
    name: {}
    for name in OBJECTIVES
    if not name.startswith(("multi:", "rank:", "survival:aft")) and name != "reg:quantileerror"
}
LABELS = {"logit": (0.0, 1.0), "log": (0.5, 4.0), "identity": (0.0, 1.0)}


def make_matrix(rows: int, *, seed: int, missing: float = 0.1) -> np.ndarray:
    """Rows with missing values, infinities and denormals."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, 5)).astype(np.float32)
    matrix[rng.random(matrix.shape) < missing] = np.nan
    matrix[:: max(rows // 7, 1), 2] = DENORMAL
    return matrix


def train(objective: str, *, seed: int = 0, rounds: int = ROUNDS, label: Any = None, **parameters: Any) -> Any:
    matrix = make_matrix(300, seed=seed)
    rng = np.random.default_rng(seed + 1)
    low, high = LABELS[OBJECTIVES[objective][0]]
    if label is None:
        label = np.where(rng.random(300) < 0.3, high, low)
    options = {"objective": objective, "max_depth": 4, "eta": 0.7, "nthread": 1, "verbosity": 0, **parameters}
    return xgboost.train(options, xgboost.DMatrix(matrix, label), rounds)


def raw(booster: Any) -> bytes:
    return bytes(booster.save_raw("ubj"))


def load(data: bytes) -> Any:
    return xgboost.Booster({"nthread": 1, "verbosity": 0}, model_file=bytearray(data))


def margins(data: bytes, matrix: np.ndarray, rounds: tuple[int, int] = (0, 0)) -> np.ndarray:
    scores = load(data).inplace_predict(matrix, predict_type="margin", iteration_range=rounds)
    return np.asarray(scores, np.float32)


def edited(booster: Any, *, leaves: dict[int, float] | None = None, base_score: str | None = None) -> bytes:
    """The model with the first leaf of some trees, or its base score, set to a value."""
    model = json.loads(booster.save_raw("json"))
    for number, value in (leaves or {}).items():
        tree = model["learner"]["gradient_booster"]["model"]["trees"][number]
        tree["split_conditions"][tree["left_children"].index(-1)] = value
    if base_score is not None:
        model["learner"]["learner_model_param"]["base_score"] = base_score
    return raw(load(json.dumps(model).encode()))


def assert_folds(data: bytes, matrix: np.ndarray, rounds: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Assert the same bits on the CPU, and in the GPU's order; return the margins."""
    folded = fold_base(data, iteration_range=rounds)
    wanted = margins(data, matrix, rounds)
    assert margins(folded, matrix, rounds).tobytes() == wanted.tobytes()
    assert gpu_order_margins(folded, matrix, iteration_range=rounds).tobytes() == wanted.tobytes()
    return wanted


class TestOneOutput:
    @settings(max_examples=60)
    @given(
        objective=st.sampled_from(sorted(SINGLE)),
        base_score=st.floats(2.0**-10, 1 - 2.0**-10, width=32) | st.just(0.5) | st.just(None),
        missing=st.sampled_from([0.0, 0.1, 0.9]),
        seed=st.integers(0, 5),
        trees=st.integers(1, 3),
    )
    def test_folded_model_has_the_bits_in_both_orders(
        self, objective: str, base_score: float | None, missing: float, seed: int, trees: int
    ) -> None:
        more = {} if base_score is None else {"base_score": base_score}
        booster = train(objective, seed=seed, num_parallel_tree=trees, subsample=0.8, **more)
        assert_folds(raw(booster), make_matrix(400, seed=seed + 9, missing=missing))

    @settings(max_examples=40)
    @given(
        base=FLOATS,
        leaf=FLOATS,
    )
    def test_any_leaf_and_base_are_added_with_one_rounding(self, base: float, leaf: float) -> None:
        data = edited(train("reg:squarederror"), leaves={0: leaf}, base_score=f"[{base!r}]")
        if not fold_blockers(read_ubj(data)):
            assert_folds(data, make_matrix(200, seed=3))

    def test_unfolded_model_differs_in_the_order_of_the_gpu(self) -> None:
        """The emulated order must be able to tell: else the tests above say nothing."""
        data, matrix = raw(train("binary:logistic", base_score=0.3, rounds=40)), make_matrix(2000, seed=4)
        differing = gpu_order_margins(data, matrix).view(np.uint32) != margins(data, matrix).view(np.uint32)
        assert differing.mean() > 0.3
        assert_folds(data, matrix)

    @pytest.mark.parametrize("rounds", [(0, 0), (0, 1), (2, 5), (5, 6)])
    def test_first_tree_of_the_range_is_folded(self, rounds: tuple[int, int]) -> None:
        assert_folds(raw(train("reg:squarederror")), make_matrix(300, seed=5), rounds)

    def test_categories(self) -> None:
        rng = np.random.default_rng(2)
        matrix = np.stack([rng.integers(0, 9, 400), rng.normal(size=400)], axis=1).astype(np.float32)
        label = (matrix[:, 0] % 3 == 0).astype(np.float32)
        data = xgboost.DMatrix(matrix, label, feature_types=["c", "float"], enable_categorical=True)
        booster = xgboost.train({"objective": "binary:logistic", "nthread": 1, "max_cat_to_onehot": 2}, data, 5)
        assert_folds(raw(booster), np.where(matrix == 3, np.float32(np.nan), matrix))

    def test_only_leaves_of_one_tree_and_the_base_change(self) -> None:
        before = raw(train("binary:logistic"))
        old, new = read_ubj(before), read_ubj(fold_base(before))
        base = base_margin(np.array([0.5], np.float32), objective="binary:logistic")
        assert old["learner"]["learner_model_param"]["base_score"] != "[5E-1]"
        assert new["learner"]["learner_model_param"]["base_score"] == "[5E-1]"
        assert float(base[0]) == 0.0
        trees = [model["learner"]["gradient_booster"]["model"]["trees"] for model in (old, new)]
        changed = [
            number
            for number, (left, right) in enumerate(zip(*trees, strict=True))
            if left["split_conditions"].tobytes() != right["split_conditions"].tobytes()
        ]
        assert changed == [0]
        split = trees[0][0]["left_children"] >= 0
        assert (trees[0][0]["split_conditions"][split] == trees[1][0]["split_conditions"][split]).all()

    def test_feature_named_like_the_base_is_no_base(self) -> None:
        booster = train("binary:logistic", base_score=0.3)
        booster.feature_names = ["base_score", "[3E-1]", "split_conditions", "trees", "learner"]
        folded = load(fold_base(raw(booster)))
        assert folded.feature_names == booster.feature_names


class TestSeveralOutputs:
    @pytest.mark.parametrize("objective", ["multi:softprob", "multi:softmax"])
    def test_bytes_are_unchanged_and_orders_agree(self, objective: str) -> None:
        label = np.random.default_rng(1).integers(0, 3, 300)
        data, matrix = raw(train(objective, num_class=3, label=label)), make_matrix(500, seed=6)
        assert fold_base(data) == data
        assert gpu_order_margins(data, matrix).tobytes() == margins(data, matrix).tobytes()

    def test_several_targets(self) -> None:
        label = np.random.default_rng(1).normal(size=(300, 2))
        data, matrix = raw(train("reg:squarederror", label=label)), make_matrix(500, seed=6)
        assert fold_base(data) == data
        assert gpu_order_margins(data, matrix).tobytes() == margins(data, matrix).tobytes()


class TestRefusals:
    def check(self, data: bytes, reason: str) -> None:
        assert fold_blockers(read_ubj(data)) == (reason,)
        with pytest.raises(ModelError, match="the GPU cannot score this model") as error:
            fold_base(data)
        assert error.value.found == reason

    def test_dart(self) -> None:
        """xgboost 3.4 names it gbtree in the file: only the weights of the trees tell."""
        self.check(raw(train("binary:logistic", booster="dart", rate_drop=0.5)), "the booster dart")

    def test_linear_booster(self) -> None:
        matrix = np.nan_to_num(make_matrix(300, seed=0))
        booster = xgboost.train({"booster": "gblinear", "nthread": 1}, xgboost.DMatrix(matrix, matrix[:, 0]), 2)
        self.check(raw(booster), "the booster gblinear")

    def test_vector_leaves(self) -> None:
        label = np.random.default_rng(1).normal(size=(300, 2))
        booster = train("reg:squarederror", label=label, multi_strategy="multi_output_tree", tree_method="hist")
        self.check(raw(booster), "vector leaves")

    def test_no_trees(self) -> None:
        self.check(raw(train("binary:logistic", rounds=0)), "a model without trees")

    @pytest.mark.parametrize("leaf", [float("inf"), float("nan"), 3e38])
    def test_leaf_that_is_not_finite(self, leaf: float) -> None:
        data = edited(train("reg:squarederror"), leaves={1: leaf})
        self.check(data, "leaves that are not finite, or whose sum may not be finite")

    def test_unknown_objective(self) -> None:
        model = json.loads(train("reg:squarederror").save_raw("json"))
        model["learner"]["objective"]["name"] = "reg:new"
        assert fold_blockers(model) == ("the objective reg:new",)

    def test_sum_of_negative_zeros(self) -> None:
        """The GPU's sum starts from 0.0 and cannot become -0.0, which the CPU's can: base_score 0.5 is a -0.0."""
        booster = train("binary:logistic", base_score=0.5, rounds=2)
        data = edited(booster, leaves={0: -0.0, 1: -0.0}, base_score="[5E-1]")
        matrix = make_matrix(2000, seed=1)
        assert (np.signbit(margins(data, matrix)) & (margins(data, matrix) == 0)).any()
        self.check(data, "rows whose leaves are all -0.0, with a base of -0.0")
        assert_folds(edited(booster, leaves={0: -0.0}, base_score="[5E-1]"), matrix)

    @pytest.mark.parametrize("size", [0, 1, 2000])
    def test_cut_model(self, size: int) -> None:
        with pytest.raises(ModelError, match="not complete UBJSON"):
            fold_base(raw(train("binary:logistic"))[:size])


class TestLocate:
    def test_place_has_the_bytes_of_the_value(self) -> None:
        data = raw(train("binary:logistic", base_score=0.3))
        text = data[locate_ubj(data, "learner", "learner_model_param", "base_score")]
        assert text[:2] == b"SL"
        assert b"E-1" in text
        place = locate_ubj(data, "learner", "gradient_booster", "model", "trees", 2, "left_children")
        tree = read_ubj(data)["learner"]["gradient_booster"]["model"]["trees"][2]
        assert data[place][:3] == b"[$l"
        assert np.frombuffer(data[place][-4 * len(tree["left_children"]) :], ">i4").tolist() == list(
            tree["left_children"]
        )

    @pytest.mark.parametrize(
        "path", [("learner", "nothing"), ("learner", "gradient_booster", "model", "trees", 99), ("learner", 0)]
    )
    def test_missing_value_is_an_error(self, path: tuple[str | int, ...]) -> None:
        with pytest.raises(ModelError, match="not complete UBJSON"):
            locate_ubj(raw(train("binary:logistic")), *path)
