"""Scores of a real GPU have the bits of the CPU: every objective, deep and shallow trees, values of all kinds."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xgboost

from pipeline.devices.inventory import Gpu
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.flavors import xgboost_probe
from pipeline.models.flavors.xgboost_cuda import XGBoostDevicePredictor, on_device
from pipeline.models.flavors.xgboost_device import open_device, score
from pipeline.models.flavors.xgboost_fold import fold_base
from pipeline.models.trees.xgboost import OBJECTIVES
from pipeline.spec.model_ref import OutputKind
from pipeline.testing.fake_device import VARIABLE

pytestmark = pytest.mark.gpu
ROWS, FEATURES = 20_000, 8
LABELS = {"logit": (0.0, 1.0), "log": (0.5, 4.0), "identity": (0.0, 1.0)}
SINGLE = [name for name in OBJECTIVES if not name.startswith(("multi:", "rank:", "survival:aft", "reg:quantile"))]
SHAPES: dict[str, dict[str, Any]] = {
    "stumps": {"max_depth": 1, "rounds": 200},
    "shallow": {"max_depth": 6, "rounds": 300},
    "deep": {"max_depth": 14, "rounds": 20, "min_child_weight": 0},
    "leaf-wise": {"max_depth": 0, "max_leaves": 255, "grow_policy": "lossguide", "rounds": 20},
    "one round": {"max_depth": 3, "rounds": 1},
    "parallel trees": {"max_depth": 5, "rounds": 5, "num_parallel_tree": 4, "subsample": 0.5},
}


def make_matrix(rows: int = ROWS, *, seed: int = 0, features: int = FEATURES) -> np.ndarray:
    """Numbers of all sizes, missing values, denormals, and infinities, which the fake GPU refuses."""
    rng = np.random.default_rng(seed)
    matrix = (rng.standard_normal((rows, features)) * 10.0 ** rng.integers(-3, 4, (rows, 1))).astype(np.float32)
    matrix[rng.random(matrix.shape) < 0.05] = np.nan
    matrix[::97, 1] = np.float32(1e-42)
    if VARIABLE not in os.environ:
        matrix[::101, 2], matrix[::103, 3] = np.inf, -np.inf
    return matrix


def train(objective: str = "binary:logistic", *, rounds: int = 30, classes: int = 0, **options: Any) -> Any:
    matrix, rng = make_matrix(3000, seed=1), np.random.default_rng(2)
    matrix[np.isinf(matrix)] = 0.0
    low, high = LABELS[OBJECTIVES[objective][0]] if not classes else (0.0, 1.0)
    label = np.where(rng.random(len(matrix)) < 0.3, high, low)
    if classes:
        label, options["num_class"] = rng.integers(0, classes, len(matrix)), classes
    parameters = {"objective": objective, "nthread": 2, "verbosity": 0, "eta": 0.3, "seed": 5, **options}
    return xgboost.train(parameters, xgboost.DMatrix(matrix, label), rounds)


def put(booster: Any, gpu: Gpu) -> tuple[Any, XGBoostDevicePredictor]:
    """Return the model on the CPU and on the GPU."""
    data = bytes(booster.save_raw("ubj"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flavor, "probe", lambda data, where: xgboost_probe.facts(booster, data))
        reference: Any = flavor.load(flavor.inspect("model.ubj", data), data)
    return reference, on_device(reference, gpu=gpu, memory=0.5, threads=1)


def thresholds(booster: Any) -> np.ndarray:
    """Return rows that hold the thresholds of the splits, and the numbers beside them."""
    frame = booster.trees_to_dataframe()
    splits = frame[frame["Feature"] != "Leaf"]
    rows = make_matrix(3 * len(splits), seed=7)
    columns = splits["Feature"].str[1:].astype(int).to_numpy()
    values = splits["Split"].to_numpy(np.float32)
    for part, found in enumerate((values, np.nextafter(values, np.float32(-np.inf)), np.nextafter(values, np.inf))):
        rows[part * len(splits) + np.arange(len(splits)), columns] = found
    return rows


def assert_same(booster: Any, gpu: Gpu, *matrices: np.ndarray, kinds: tuple[OutputKind, ...] = ("margin",)) -> None:
    reference, on_gpu = put(booster, gpu)
    for matrix in matrices:
        for kind in kinds:
            found, wanted = on_gpu.predict(matrix, kind=kind), reference.predict(matrix, kind=kind)
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            differing = np.flatnonzero(
                (found.view(np.uint32) != wanted.view(np.uint32)).reshape(len(matrix), -1).any(1)
            )
            assert not len(differing), f"{len(differing)} rows, such as {matrix[differing[0]]}: {found[differing[0]]}"


@pytest.mark.parametrize("objective", SINGLE)
def test_every_objective(objective: str, gpu: Gpu) -> None:
    assert_same(train(objective), gpu, make_matrix(), kinds=("margin", "prediction"))


@pytest.mark.parametrize("base_score", [1e-6, 0.1, 0.5, 0.9])
def test_every_base(base_score: float, gpu: Gpu) -> None:
    assert_same(train(base_score=base_score), gpu, make_matrix(), kinds=("margin", "prediction", "label"))


@pytest.mark.parametrize("objective", ["multi:softprob", "multi:softmax"])
@pytest.mark.parametrize("classes", [3, 10])
def test_classes(objective: str, classes: int, gpu: Gpu) -> None:
    booster = train(objective, classes=classes)
    assert_same(booster, gpu, make_matrix(), kinds=("margin", "prediction", "label"))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_trees(shape: str, gpu: Gpu) -> None:
    booster = train(**SHAPES[shape])
    assert_same(booster, gpu, make_matrix(), thresholds(booster))


def test_model_that_is_not_folded_has_other_bits(gpu: Gpu) -> None:
    """Else the fold would be for nothing, and these tests could not fail."""
    booster, matrix = train(base_score=0.1, rounds=100), make_matrix()
    wanted = booster.inplace_predict(matrix, predict_type="margin")
    found = []
    for data in (bytes(booster.save_raw("ubj")), fold_base(bytes(booster.save_raw("ubj")))):
        loaded = open_device().booster(data)
        margins = score(open_device(), _margins_of(loaded), matrix)
        found.append(int((margins.reshape(-1).view(np.uint32) != wanted.view(np.uint32)).sum()))
    assert found[0] > len(matrix) // 10
    assert found[1] == 0


def _margins_of(booster: Any) -> Any:
    return lambda data: booster.inplace_predict(
        data, iteration_range=(0, 0), predict_type="margin", missing=np.nan, validate_features=False
    )


def test_threads_score_at_the_same_time(gpu: Gpu) -> None:
    reference, on_gpu = put(train(rounds=100), gpu)
    matrices = [make_matrix(seed=seed) for seed in range(8)]
    barrier = threading.Barrier(8)

    def predict(matrix: np.ndarray) -> bytes:
        table = pa.table([pa.array(column) for column in matrix.T], names=list(map(str, range(FEATURES))))
        barrier.wait()
        return b"".join(on_gpu.predict(on_gpu.encode(table), kind="prediction").tobytes() for _ in range(5))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(predict, matrices))
    wanted = [5 * reference.predict(matrix, kind="prediction").tobytes() for matrix in matrices]
    assert found == wanted


class TestUpload:
    def test_infinite_values_are_found(self, gpu: Gpu) -> None:
        _, on_gpu = put(train(), gpu)
        matrix = make_matrix()
        matrix[5, 2] = np.inf
        matrix[:, [0, 1, 4, 6, 7]] = np.nan_to_num(matrix[:, [0, 1, 4, 6, 7]])
        for values, columns, found in ((matrix, [0, 1, 2], True), (matrix, [0, 1, 4, 6, 7], False)):
            table = pa.table([pa.array(column) for column in values.T], names=list(map(str, range(FEATURES))))
            assert on_gpu.may_have_infinite(on_gpu.encode(table), columns) is found

    @pytest.mark.parametrize("rows", [1, 3, 127, 128, 129, 65_537])
    def test_any_number_of_rows(self, rows: int, gpu: Gpu) -> None:
        reference, on_gpu = put(train(), gpu)
        matrix = make_matrix(rows)
        table = pa.table([pa.array(column) for column in matrix.T], names=list(map(str, range(FEATURES))))
        encoded = on_gpu.encode(table)
        assert np.array_equal(encoded, matrix, equal_nan=True)
        found = on_gpu.predict(encoded[:], kind="margin")
        assert found.tobytes() == reference.predict(matrix, kind="margin").tobytes()
