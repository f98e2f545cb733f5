"""Small models of every flavor, with rows to score and the library's own results for them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

ROWS = 700
CITIES = ("Berlin", "Köln", "Ulm")


@dataclass(frozen=True)
class FlavorCase:
    """A saved model, and what it must give."""

    flavor: str
    path: Path
    """Its file or folder; empty for a model in Python."""
    frame: pd.DataFrame
    """Rows to score; among them nulls where the model takes them."""
    expected: Mapping[str, np.ndarray]
    """Results of the library's own functions for the whole frame, by kind of output."""
    promise: str
    """``exact`` or ``fixed``, or both where it depends on the processor."""
    takes_nulls: bool = True
    """False: rows with a null are rejected."""
    unknown_category: str = ""
    """Column for which a category that the model has not seen is rejected; empty: the model takes any value."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of ``score``."""
    entrypoint: str = ""
    """``module:Class`` of a model in Python."""

    @property
    def reference(self) -> str:
        """Value of ``score.model``."""
        return self.entrypoint or str(self.path)

    @property
    def is_file(self) -> bool:
        """True if the model is one file."""
        return not self.entrypoint and self.path.is_file()


def training_frame(rows: int = ROWS, *, seed: int = 4, nulls: bool = True) -> tuple[pd.DataFrame, np.ndarray]:
    """Return columns of numbers, integers, categories and texts, and a class 0, 1 or 2 for each row."""
    random = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "amount": random.normal(50, 20, rows),
            "count": random.integers(0, 9, rows),
            "share": random.random(rows).astype(np.float32),
            "city": pd.Categorical(random.choice(CITIES, rows), categories=list(CITIES)),
            "note": [" ".join(random.choice(["late", "paid", "open", "refund"], 3)) for _ in range(rows)],
        }
    )
    target = (frame["amount"] > 50).to_numpy().astype(int) + (frame["city"] == "Ulm").to_numpy()
    if nulls:
        frame.loc[random.random(rows) < 0.1, "amount"] = np.nan
        frame.loc[random.random(rows) < 0.1, "city"] = None
    return frame, target


def lightgbm_binary(folder: Path) -> FlavorCase:
    """Return a binary LightGBM model with a category and nulls."""
    return _lightgbm(folder, {"objective": "binary"}, classes=2)


def lightgbm_multiclass(folder: Path) -> FlavorCase:
    """Return a LightGBM model with three classes."""
    return _lightgbm(folder, {"objective": "multiclass", "num_class": 3}, classes=3)


def _lightgbm(folder: Path, params: dict[str, Any], *, classes: int) -> FlavorCase:
    import lightgbm

    frame, target = training_frame()
    frame = frame.drop(columns="note")
    data = lightgbm.Dataset(frame, np.minimum(target, classes - 1))
    path = folder / "model.txt"
    lightgbm.train({"verbosity": -1, "num_threads": 1, "num_leaves": 7, **params}, data, 6).save_model(path)
    booster: Any = lightgbm.Booster(model_file=path)
    prediction = booster.predict(frame)
    is_binary = prediction.ndim == 1
    expected = {
        "prediction": prediction,
        "label": (prediction > 0.5 if is_binary else prediction.argmax(axis=1)).astype(np.int32),
        "probabilities": np.vstack((1.0 - prediction, prediction)).T if is_binary else prediction,
        "margin": booster.predict(frame, raw_score=True),
        "leaf": np.asarray(booster.predict(frame, pred_leaf=True), np.int32),
        "contributions": booster.predict(frame, pred_contrib=True),
    }
    return FlavorCase("lightgbm", path, frame, expected, "exact", unknown_category="city")


def sklearn_pipeline(folder: Path) -> FlavorCase:
    """Return a logistic regression behind a scaler, one-hot categories and words, with classes that are texts."""
    from sklearn.compose import ColumnTransformer
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    frame, target = training_frame(nulls=False)
    frame = frame.astype({"city": "str"})
    parts = [
        ("numbers", StandardScaler(), ["amount", "count", "share"]),
        ("city", OneHotEncoder(), ["city"]),
        ("note", TfidfVectorizer(), "note"),
    ]
    model = make_pipeline(ColumnTransformer(parts), LogisticRegression(max_iter=300))
    model.fit(frame, np.take(["low", "mid", "high"], target))
    return sklearn_case(folder, model, frame, "fixed", takes_nulls=False, unknown_category="city")


def sklearn_forest(folder: Path) -> FlavorCase:
    """Return a forest with two classes of integers."""
    from sklearn.ensemble import RandomForestClassifier

    frame, target = training_frame()
    frame = frame[["amount", "count", "share"]]
    model = RandomForestClassifier(12, max_depth=5, random_state=1, n_jobs=2).fit(frame, np.minimum(target, 1) * 10)
    model.set_params(n_jobs=1)
    return sklearn_case(folder, model, frame, "exact")


def sklearn_boosting(folder: Path) -> FlavorCase:
    """Return a regression by histogram boosting, whose frame has a categorical column and nulls."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    frame, target = training_frame()
    frame = frame.drop(columns="note")
    model = HistGradientBoostingRegressor(max_iter=8, random_state=1).fit(frame, target * 1.5)
    return sklearn_case(folder, model, frame, "exact", unknown_category="city")


def sklearn_ridge_in_joblib(folder: Path) -> FlavorCase:
    """Return a linear regression in a pickle, fitted without column names."""
    import joblib
    from sklearn.linear_model import Ridge

    rows = np.random.default_rng(3).normal(size=(ROWS, 17))
    model = Ridge().fit(rows, rows @ np.arange(17.0) + 1)
    path = folder / "model.joblib"
    joblib.dump(model, path, compress=3)
    frame = pd.DataFrame(rows, columns=[f"f{index}" for index in range(17)])
    expected = {"prediction": model.predict(rows)}
    return FlavorCase("sklearn", path, frame, expected, "fixed", takes_nulls=False, options={"allow_code": True})


def sklearn_case(folder: Path, model: Any, frame: pd.DataFrame, promise: str, **options: Any) -> FlavorCase:
    """Save an estimator with skops, and return it with its own results."""
    import skops.io
    from sklearn.base import is_classifier

    path = folder / "model.skops"
    skops.io.dump(model, path)
    expected = {"prediction": model.predict(frame)}
    if is_classifier(model):
        probabilities = model.predict_proba(frame)
        is_binary = probabilities.shape[1] == 2
        expected = {
            "prediction": probabilities[:, 1] if is_binary else probabilities,
            "probabilities": probabilities,
            "label": model.predict(frame),
        }
    return FlavorCase("sklearn", path, frame, expected, promise, **options)


def onnx_network(folder: Path) -> FlavorCase:
    """Return a network with one hidden layer, over a matrix of columns without names."""
    random = np.random.default_rng(6)
    weights = [random.normal(size=shape).astype(np.float32) for shape in ((8, 16), (16,), (16, 1))]
    frame = pd.DataFrame(random.normal(size=(ROWS, 8)), columns=[f"f{index}" for index in range(8)])
    nodes: list[Any] = [("MatMul", ["x", "w0"], ["a"]), ("Add", ["a", "w1"], ["b"]), ("Relu", ["b"], ["c"])]
    nodes += [("MatMul", ["c", "w2"], ["d"]), ("Sigmoid", ["d"], ["p"])]
    path = save_onnx(
        folder, nodes, {"x": ("FLOAT", ["rows", 8])}, {"p": ("FLOAT", ["rows", 1])}, dict(enumerate(weights))
    )
    return _onnx_case(path, frame, {"x": frame.to_numpy(np.float32)}, lambda found: {"prediction": found[0][:, 0]})


def onnx_classifier(folder: Path) -> FlavorCase:
    """Return a classifier with labels and probabilities, over one input for each column."""
    frame, _ = training_frame(nulls=False)
    frame = frame[["amount", "count"]]
    weights = {0: np.array([[0.1, -0.1], [0.5, -0.4]], np.float32)}
    nodes: list[Any] = [("Cast", ["count"], ["n"], {"to": 1}), ("Concat", ["amount", "n"], ["x"], {"axis": 1})]
    nodes += [("MatMul", ["x", "w0"], ["z"]), ("Softmax", ["z"], ["p"], {"axis": 1})]
    nodes += [("ArgMax", ["p"], ["label"], {"axis": 1, "keepdims": 0})]
    inputs = {"amount": ("FLOAT", ["rows", 1]), "count": ("INT64", ["rows", 1])}
    path = save_onnx(folder, nodes, inputs, {"label": ("INT64", ["rows"]), "p": ("FLOAT", ["rows", 2])}, weights)
    given = {
        "amount": frame[["amount"]].to_numpy(np.float32),
        "count": frame[["count"]].to_numpy(np.int64),
    }
    return _onnx_case(
        path,
        frame,
        given,
        lambda found: {"prediction": found[1][:, 1], "probabilities": found[1], "label": found[0]},
    )


def save_onnx(
    folder: Path, nodes: list[Any], inputs: Mapping[str, Any], outputs: Mapping[str, Any], weights: Mapping[int, Any]
) -> Path:
    """Write a graph; the weights are called ``w0`` and so on."""
    import onnx

    def value(name: str, kind: str, shape: list[Any]) -> Any:
        return onnx.helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), shape)

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(node[0], node[1], node[2], **(node[3] if len(node) > 3 else {})) for node in nodes],
        "graph",
        [value(name, *one) for name, one in inputs.items()],
        [value(name, *one) for name, one in outputs.items()],
        [onnx.numpy_helper.from_array(array, f"w{number}") for number, array in weights.items()],
    )
    path = folder / "model.onnx"
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def _onnx_case(path: Path, frame: pd.DataFrame, given: Any, results: Callable[[Any], Any]) -> FlavorCase:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, given)
    return FlavorCase("onnx", path, frame, results(found), "exact or fixed", takes_nulls=True)


def catboost_classifier(folder: Path) -> FlavorCase:
    """Return a CatBoost classifier with three classes that are texts, a category and nulls among the numbers."""
    import catboost

    frame, target = training_frame()
    frame = frame.drop(columns="note").astype({"city": "str"}).fillna({"city": "none"})
    options = {"iterations": 8, "depth": 3, "thread_count": 1, "allow_writing_files": False, "verbose": False}
    model: Any = catboost.CatBoostClassifier(cat_features=["city"], **options)
    model.fit(frame, np.take(["low", "mid", "high"], target))
    path = folder / "model.cbm"
    model.save_model(path)
    expected = {
        "prediction": model.predict_proba(frame),
        "probabilities": model.predict_proba(frame),
        "label": model.predict(frame).reshape(-1),
        "margin": model.predict(frame, prediction_type="RawFormulaVal"),
    }
    return FlavorCase("catboost", path, frame, expected, "exact")


class ChurnInPython:
    """A model in Python with a file, three classes, and outputs of all forms but lists."""

    features: ClassVar[Any] = {"amount": "number", "count": "integer", "city": list(CITIES), "note": "text"}
    outputs: ClassVar[Any] = {
        "prediction": "float64",
        "probabilities": {"low": "float64", "mid": "float64", "high": "float64"},
        "label": "string",
        "margin": "float32[2]",
    }

    def load(self, files: Mapping[str, Path]) -> None:
        """Read the weights."""
        self.weights = json.loads(files["weights.json"].read_text())

    def predict(self, frame: pd.DataFrame) -> dict[str, Any]:
        """Return all outputs of rows that depend on themselves alone."""
        amount = frame["amount"].fillna(self.weights["amount"])
        score = (amount / 100 + frame["count"].astype(float) + (frame["city"] == "Ulm")).to_numpy()
        score = score + frame["note"].str.count("late").fillna(0).to_numpy()
        shares = np.stack([score, score * 2, score * 3], axis=1)
        return {
            "prediction": pd.Series(score),
            "probabilities": pd.DataFrame(shares, columns=["high", "mid", "low"]),
            "label": np.where(score > 5, "high", "low"),
            "margin": np.stack([score, -score], axis=1),
        }


def python_class(folder: Path) -> FlavorCase:
    """Return a model in Python with a file."""
    frame, _ = training_frame()
    (folder / "weights.json").write_text('{"amount": 40.0}')
    model = ChurnInPython()
    model.load({"weights.json": folder / "weights.json"})
    found = model.predict(frame)
    expected = {
        "prediction": found["prediction"].to_numpy(),
        "probabilities": found["probabilities"][["low", "mid", "high"]].to_numpy(),
        "label": found["label"].astype(object),
        "margin": found["margin"].astype(np.float32),
    }
    options = {"model_files": str(folder)}
    entrypoint = f"{__name__}:ChurnInPython"
    return FlavorCase(
        "python", Path(), frame, expected, "code", unknown_category="city", options=options, entrypoint=entrypoint
    )


def mlflow_pyfunc(folder: Path) -> FlavorCase:
    """Return an MLflow model that only ``python_function`` loads, with two columns as its result."""
    with warnings.catch_warnings():
        # MLflow warns of type hints, of its own ones, too.
        warnings.simplefilter("ignore")
        return _mlflow_pyfunc(folder)


def _mlflow_pyfunc(folder: Path) -> FlavorCase:
    import mlflow.pyfunc
    from mlflow.models import infer_signature

    class Ratios(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
            ratio = model_input["amount"] / (1 + model_input["count"])
            return pd.DataFrame({"ratio": ratio, "length": model_input["note"].str.len() * 1.0})

    frame, _ = training_frame(nulls=False)
    frame = frame[["amount", "count", "note"]].astype({"note": object})
    model: Any = Ratios()
    expected = model.predict(None, frame)
    path = folder / "model"
    signature = infer_signature(frame, expected)
    mlflow.pyfunc.save_model(str(path), python_model=model, signature=signature, pip_requirements=["mlflow"])
    values = {"prediction": expected.to_numpy()}
    return FlavorCase("mlflow", path, frame, values, "code", options={"allow_code": True})


def torch_factory(folder: Path) -> FlavorCase:
    """Return weights in safetensors, for a module that a factory makes."""
    import safetensors.torch

    module, frame, expected = _torch_network()
    path = folder / "model.safetensors"
    safetensors.torch.save_file(module.state_dict(), path)
    options = {"model_files": str(path)}
    entrypoint = "pipeline.testing.torch_models:network"
    return FlavorCase(
        "torch", Path(), frame, {"prediction": expected}, "exact or fixed", options=options, entrypoint=entrypoint
    )


def torch_program(folder: Path) -> FlavorCase:
    """Return a program that was exported with any number of rows."""
    import torch

    module, frame, expected = _torch_network()
    shapes = ({0: torch.export.Dim("rows")},)
    program = torch.export.export(module, (torch.zeros(2, 8),), dynamic_shapes=shapes)
    path = folder / "model.pt2"
    torch.export.save(program, path)
    return FlavorCase("torch", path, frame, {"prediction": expected}, "exact or fixed", options={"allow_code": True})


def _torch_network() -> tuple[Any, pd.DataFrame, np.ndarray]:
    import torch

    from pipeline.testing.torch_models import Network

    torch.manual_seed(5)
    module = Network().eval()
    rows = np.random.default_rng(6).normal(size=(ROWS, 8)).astype(np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(rows)).numpy()
    return module, pd.DataFrame(rows, columns=[f"f{index}" for index in range(8)]), expected


CASES: dict[str, Callable[[Path], FlavorCase]] = {
    "lightgbm": lightgbm_binary,
    "lightgbm, three classes": lightgbm_multiclass,
    "sklearn, pipeline": sklearn_pipeline,
    "sklearn, forest": sklearn_forest,
    "sklearn, boosting": sklearn_boosting,
    "sklearn, joblib": sklearn_ridge_in_joblib,
    "onnx, matrix": onnx_network,
    "onnx, columns": onnx_classifier,
    "catboost": catboost_classifier,
    "python": python_class,
    "mlflow": mlflow_pyfunc,
    "torch, factory": torch_factory,
    "torch, program": torch_program,
}
"""A model of each kind, by name."""
