"""The engine's raw values and outputs are CatBoost's, bit for bit; what is not is refused.

``PIPELINE_TREES_EXAMPLES`` sets how many models are tried.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ModelError
from pipeline.models.trees import TreeEngine
from pipeline.models.trees.catboost import catboost_output, read_catboost, unsupported_catboost
from pipeline.testing.examples import choose

catboost = pytest.importorskip("catboost", reason="CatBoost is not installed")

EXAMPLES = int(os.environ.get("PIPELINE_TREES_EXAMPLES") or choose(20, of=300))
CHOSEN = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

SPECIAL = np.array(
    [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 1.0, np.inf, -np.inf], np.float32
)
REGRESSORS = (
    "RMSE",
    "MAE",
    "Quantile:alpha=0.7",
    "MAPE",
    "Huber:delta=1",
    "LogCosh",
    "Expectile:alpha=0.3",
    "MultiRMSE",
)
CLASSIFIERS = ("Logloss", "CrossEntropy", "MultiClassOneVsAll")


def train(matrix: np.ndarray, label: np.ndarray, loss: str, **settings: Any) -> Any:
    parameters = {"loss_function": loss, "thread_count": 1, "verbose": 0, "allow_writing_files": False} | settings
    return catboost.CatBoost(parameters).fit(matrix, label)


def to_json(model: Any, folder: Path) -> dict[str, Any]:
    file = folder / "model.json"
    model.save_model(str(file), format="json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def make_label(rng: np.random.Generator, matrix: np.ndarray, loss: str) -> np.ndarray:
    signal = np.nan_to_num(np.sin(3 * matrix)).sum(axis=1) + rng.standard_normal(len(matrix))
    if loss.startswith("MultiClass"):
        return (np.argsort(np.argsort(signal)) * 5 // len(signal)).astype(int)
    if loss == "MultiRMSE":
        return np.stack([signal, -2 * signal, signal**2], axis=1)
    return (signal > 0).astype(int) if loss in CLASSIFIERS else signal


def make_rows(rng: np.random.Generator, *, found: dict[str, Any], shape: tuple[int, int], missing: float) -> np.ndarray:
    """Rows of values at, just below and just above borders, of special values, and missing ones."""
    borders = [split["border"] for tree in found["oblivious_trees"] for split in tree["splits"]]
    near = rng.choice(np.append(SPECIAL, np.array(borders, np.float32)), shape)
    with np.errstate(over="ignore", under="ignore"):
        nudged = np.nextafter(near, rng.choice(np.array([-np.inf, np.inf], np.float32), shape))
    normal = rng.standard_normal(shape).astype(np.float32)
    matrix: np.ndarray = np.choose(rng.integers(0, 4, shape), [near, nudged, rng.choice(SPECIAL, shape), normal])
    matrix[rng.random(shape) < missing] = np.nan
    return matrix


def assert_same(model: Any, found: dict[str, Any], matrix: np.ndarray, *, has_output: bool = True) -> None:
    assert unsupported_catboost(found, raw=True) == ()
    tables = read_catboost(found)
    wanted = model.predict(matrix, prediction_type="RawFormulaVal", thread_count=1)
    engine = TreeEngine(tables, transform=catboost_output(found, raw=True))
    assert engine.predict(matrix).tobytes() == wanted.tobytes("C")
    assert engine.predict(np.asfortranarray(matrix), threads=2).tobytes() == wanted.tobytes("C")
    if not has_output:
        return
    assert unsupported_catboost(found) == ()
    output = TreeEngine(tables, transform=catboost_output(found)).predict(matrix)
    loss = found["model_info"]["params"]["loss_function"]["type"]
    if loss in CLASSIFIERS:
        probability = model.predict(matrix, prediction_type="Probability", thread_count=1)
        wanted = probability if loss.startswith("Multi") else probability[:, 1]
    assert output.tobytes() == wanted.tobytes("C")


@CHOSEN
@given(
    seed=st.integers(0, 2**32 - 1),
    loss=st.sampled_from([*REGRESSORS, *CLASSIFIERS, "MultiClass", "Poisson"]),
    features=st.integers(1, 12),
    depth=st.integers(1, 10),
    rounds=st.integers(1, 30),
    borders=st.sampled_from([1, 32, 254]),
    missing=st.sampled_from([0.0, 0.05, 0.5]),
    mode=st.sampled_from(["Min", "Max"]),
    rows=st.sampled_from([1, 7, 127, 128, 129, 512, 1100]),
)
def test_trained_models(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    loss: str,
    features: int,
    depth: int,
    rounds: int,
    borders: int,
    missing: float,
    mode: str,
    rows: int,
) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((400, features)).astype(np.float32)
    matrix[:, ::3] = matrix[:, ::3].round(1)
    label = make_label(rng, matrix, loss)
    label = np.abs(label) if loss == "Poisson" else label
    matrix[rng.random(matrix.shape) < missing] = np.nan
    # A feature without any number is refused in training.
    matrix[0], matrix[1] = 0, 1
    model = train(
        matrix, label, loss, iterations=rounds, depth=depth, border_count=borders, nan_mode=mode, learning_rate=0.3
    )
    found = to_json(model, tmp_path_factory.mktemp("model"))
    rows_ = make_rows(rng, found=found, shape=(rows, features), missing=missing)
    assert_same(model, found, rows_, has_output=loss not in {"MultiClass", "Poisson"})


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((400, 4)).astype(np.float32)
    return matrix, make_label(rng, matrix, "RMSE")


def test_scale_and_bias(data: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    model = train(*data, "RMSE", iterations=9)
    model.set_scale_and_bias(0.37, -1.25)
    assert_same(model, to_json(model, tmp_path), data[0])


@pytest.mark.parametrize("loss", ["MultiClass", "Poisson"])
def test_outputs_of_its_own_exp_are_refused_and_differ_by_two_units(
    data: tuple[np.ndarray, np.ndarray], tmp_path: Path, loss: str
) -> None:
    matrix, label = data
    model = train(matrix, np.abs(label).round(), loss, iterations=9)
    found = to_json(model, tmp_path)
    assert unsupported_catboost(found) == (f"the output of {loss}: CatBoost's own exp, or unknown",)
    with pytest.raises(ModelError, match="own exp"):
        catboost_output(found)
    raw = TreeEngine(read_catboost(found), transform=catboost_output(found, raw=True)).predict(matrix)
    if loss == "Poisson":
        wanted, near = model.predict(matrix, prediction_type="Exponent"), np.exp(raw)
    else:
        powers = np.exp(raw - raw.max(axis=1, keepdims=True))
        wanted, near = model.predict(matrix, prediction_type="Probability"), powers / powers.sum(axis=1, keepdims=True)
    assert np.abs(near / wanted - 1).max() < 1e-15


@pytest.mark.parametrize("policy", ["Depthwise", "Lossguide"])
def test_trees_that_are_not_symmetric_are_refused(
    data: tuple[np.ndarray, np.ndarray], tmp_path: Path, policy: str
) -> None:
    found = to_json(train(*data, "RMSE", iterations=3, grow_policy=policy), tmp_path)
    assert unsupported_catboost(found) == ("trees that are not symmetric (grow_policy)",)


@pytest.mark.parametrize("one_hot", [1, 200])
def test_categories_are_refused(data: tuple[np.ndarray, np.ndarray], tmp_path: Path, one_hot: int) -> None:
    matrix, label = data
    codes = np.column_stack([np.arange(400) % 7, matrix.round(0).astype(int)])
    model = train(codes, label, "RMSE", iterations=9, cat_features=[0], one_hot_max_size=one_hot)
    (reason,) = unsupported_catboost(to_json(model, tmp_path))
    assert reason.startswith("features of other kinds than numbers: ")


def test_another_object_is_refused() -> None:
    assert unsupported_catboost({}) == ("a model that is not CatBoost's JSON",)
    with pytest.raises(ModelError, match="CatBoost's JSON"):
        read_catboost({})
