"""The xgboost flavor: JSON and UBJ model files, scored by xgboost.

Scores are those of ``Booster.predict``, bit for bit. By default all trees of the file are used, as there. Only the
scikit-learn wrapper of xgboost stops at ``best_iteration``; ``score.iteration_range: best`` does the same.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from contextlib import nullcontext
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa

from pipeline.common.digest import digest_bytes
from pipeline.common.imports import import_library
from pipeline.devices.report import DeviceReport
from pipeline.errors import ModelError
from pipeline.models.flavors import Flavor, matrix
from pipeline.models.flavors.detect import is_xgboost
from pipeline.models.flavors.library import check_digest
from pipeline.models.flavors.xgboost_outputs import labels, outputs_of_predictions
from pipeline.models.flavors.xgboost_probe import NO_PACKAGE, UNNEEDED, first_line, is_out_of_memory, probe
from pipeline.models.model import DevicePredictor, Feature, FeatureKind, ModelVersion, Predict, Task
from pipeline.models.process import threads_wanted
from pipeline.models.trees import TreeEngine, read_xgboost
from pipeline.models.trees.xgboost import read_ubj, transform_name, unsupported_transform
from pipeline.spec.model_ref import OutputKind

_KINDS: dict[str, FeatureKind] = {"c": "category", "i": "indicator", "int": "integer"}
_TASKS: dict[str, Task] = {
    "binary": "binary",
    "multi": "multiclass",
    "rank": "ranking",
    "reg": "regression",
    "count": "regression",
    "survival": "regression",
}
_facts: dict[str, dict[str, Any]] = {}
_facts_lock = threading.Lock()


def inspect(uri: str, data: bytes, *, name: str | None = None, allow_code: bool = False) -> ModelVersion:
    """Describe the model file at ``uri`` (path or fsspec URL). A child process loads the file and scores one row.

    :param data: the bytes of the file.
    :param name: name of the version; default: the file's name without its ending.
    :param allow_code: without effect: loading the file never runs code.
    :raises ModelError: when the file is damaged or not an xgboost model, or xgboost is not installed.
    """
    digest = digest_bytes(data)
    with _facts_lock:
        if digest not in _facts:
            _facts[digest] = probe(data, where=uri)
        facts = _facts[digest]
    return ModelVersion(
        name=name or uri.rstrip("/").rsplit("/", 1)[-1].rsplit(".", 1)[0] or "model",
        version=digest[:12],
        uri=uri,
        digest=digest,
        flavor="xgboost",
        nbytes=len(data),
        features=_features(facts, where=uri),
        task=_TASKS.get(facts["objective"].split(":")[0], "other"),
        outputs=facts["prediction"],
        objective=facts["objective"],
        trees=facts["leaf"],
        margins=facts["margin"],
        tree_engine_blockers=tuple(facts["tree_engine_blockers"]),
        device_blockers=tuple(facts["device_blockers"]),
        rounds=facts["rounds"],
        trees_per_round=facts["trees_per_round"],
        best_iteration=facts["best_iteration"],
    )


def _features(facts: dict[str, Any], *, where: str) -> tuple[Feature, ...]:
    names = facts["names"]
    if not names:
        raise ModelError(
            "the model has no features",
            where=where,
            expected="a trained model",
            next_step="train the model, then save it again",
        )
    if len(set(names)) != len(names):
        repeated = next(name for name, count in Counter(names).items() if count > 1)
        raise ModelError(
            "the model has two features of one name",
            where=where,
            found=f"{repeated!r}, {names.count(repeated)} times among {len(names)} features",
            expected="a name of its own for each feature, because columns are found by name",
            next_step="set booster.feature_names to unique names, then booster.save_model('model.ubj')",
        )
    return tuple(
        Feature(name, _KINDS.get(kind, "number"), None if values is None else tuple(values), stored, tuple(offsets))
        for name, kind, values, stored, offsets in zip(
            names,
            facts["types"],
            facts["categories"],
            facts["category_bytes"],
            facts["category_offsets"],
            strict=True,
        )
    )


def load(version: ModelVersion, data: bytes, *, threads: int | None = None) -> XGBoostPredictor:
    """Load the predictor for ``version``.

    :param data: bytes of the model file; their digest is verified before they are parsed.
    :param threads: threads of one predict call; default: ``OMP_NUM_THREADS``, or 1.
    :raises ModelDigestMismatch: when ``data`` differs from the pinned file.
    :raises ModelError: when xgboost is not installed, or cannot read the file.
    """
    check_digest(version, data)
    try:
        xgboost: Any = import_library("xgboost", without=UNNEEDED)
    except ImportError as error:
        raise ModelError(
            "xgboost is not installed here", where=version.uri, found=str(error), next_step=NO_PACKAGE
        ) from error
    try:
        booster = xgboost.Booster(model_file=bytearray(data))
    except xgboost.core.XGBoostError as error:
        raise ModelError("xgboost cannot read the model", where=version.uri, found=first_line(error)) from error
    threads = threads or version.threads or threads_wanted()
    booster.set_param({"nthread": threads, "device": "cpu"})
    predictor = XGBoostPredictor(version, booster, threads=threads)
    # xgboost initializes at the first call, which must not run in two threads at once.
    predictor.predict(np.zeros((1, len(version.features)), dtype=np.float32), kind="prediction")
    return predictor


def loaded_factor(data: bytes) -> int:
    """Return bytes of a loaded model / bytes of its file: 4.6 MiB of UBJ took 9 MiB, 8.1 MiB of JSON 80 (measured)."""
    return 3 if data[:2] == b"{L" else 10


class XGBoostPredictor:
    """A loaded booster. One object serves all threads of a process."""

    def __init__(self, version: ModelVersion, booster: Any, *, threads: int = 1) -> None:
        self.version = version
        self.booster = booster
        self.threads = threads
        """Threads of one predict call, with either engine."""
        self._library: Any = import_library("xgboost", without=UNNEEDED)
        self._range = version.iteration_range or (0, 0)
        # inplace_predict rounds DART's scores otherwise than predict, up to xgboost 3.2.
        self._is_inplace = version.trees > 0 and _booster_name(booster) != "dart"
        # Only tree models predict thread-safely (xgboost, "Prediction", on thread safety).
        self._guard: Any = nullcontext() if version.trees else threading.Lock()

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> np.ndarray:
        """See `pipeline.models.model.Predictor.encode`."""
        return matrix.encode(table, self.version.features, order=order)

    def predict(self, matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        """See `Predictor.predict`. The results equal those of ``Booster.predict`` bit for bit."""
        is_margin = kind == "margin"
        if not len(matrix):
            # For no rows, xgboost's result has other shapes in some versions.
            return self.predict(np.zeros((1, matrix.shape[1]), matrix.dtype), kind=kind)[:0]
        try:
            with self._guard:
                # With a column-major matrix xgboost takes 2.6 times as long on a wide table (measured).
                matrix = np.ascontiguousarray(matrix)
                if kind == "leaf":
                    return self._predict_dmatrix(matrix, pred_leaf=True).reshape(len(matrix), -1).astype(np.int32)
                if kind == "contributions":
                    return self._predict_dmatrix(matrix, pred_contribs=True).reshape(len(matrix), -1)
                if self._is_inplace:
                    # As predict, without a copy of the data.
                    scores = self.booster.inplace_predict(
                        matrix,
                        iteration_range=self._range,
                        validate_features=False,
                        predict_type="margin" if is_margin else "value",
                        missing=np.nan,
                    )
                else:
                    scores = self._predict_dmatrix(matrix, output_margin=is_margin)
        except self._library.core.XGBoostError as error:
            text = first_line(error)
            if is_out_of_memory(text):
                raise MemoryError(text) from error
            raise
        return outputs_of_predictions(self.version, scores, kind=kind)

    def _predict_dmatrix(self, matrix: np.ndarray, **options: bool) -> np.ndarray:
        data = self._library.DMatrix(matrix, missing=np.nan, nthread=self.threads)
        scores = self.booster.predict(data, iteration_range=self._range, validate_features=False, **options)
        return cast(np.ndarray, scores)

    def example(self) -> np.ndarray:
        """See `pipeline.models.model.Predictor.example`."""
        return np.zeros((1, len(self.version.features)), np.float32)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.models.model.Predictor.is_out_of_memory`."""
        return isinstance(error, MemoryError)


def _booster_name(booster: Any) -> str:
    """Return gbtree, dart or gblinear."""
    return str(json.loads(booster.save_config())["learner"]["gradient_booster"]["name"])


def tree_engine_blockers(version: ModelVersion, kind: OutputKind) -> tuple[str, ...]:
    """Return the reasons why the tree engine cannot compute ``kind`` with xgboost's bits; empty if it can."""
    if kind in ("leaf", "contributions", "probabilities"):
        return (f"the output {kind}",)
    if version.tree_engine_blockers or kind == "margin":
        return version.tree_engine_blockers
    return unsupported_transform(version.objective)


def device_blockers(version: ModelVersion, kind: OutputKind) -> tuple[str, ...]:
    """Return the reasons why a GPU cannot compute ``kind`` with the CPU's bits; empty if it can."""
    if version.device_blockers or kind == "margin":
        return version.device_blockers
    return unsupported_transform(version.objective)


def device_report() -> DeviceReport:
    """Report the GPU of this process; see `pipeline.models.flavors.xgboost_cuda`."""
    from pipeline.models.flavors import xgboost_cuda

    return xgboost_cuda.device_report()


def on_device(predictor: XGBoostPredictor, **options: Any) -> DevicePredictor:
    """Put the model of ``predictor`` on the GPU of this process; see `pipeline.models.flavors.xgboost_cuda`."""
    from pipeline.models.flavors import xgboost_cuda

    return xgboost_cuda.on_device(predictor, **options)


def tree_predict(predictor: XGBoostPredictor, kind: OutputKind) -> Predict:
    """Return ``predictor.predict`` for ``kind`` and for margins on the tree engine, with the same number of threads.

    :raises ModelError: when the engine cannot read the trees, or is not installed.
    """
    version, threads = predictor.version, predictor.threads
    transform = "identity" if kind == "margin" else transform_name(version.objective)
    model = read_ubj(predictor.booster.save_raw("ubj"))
    tables = read_xgboost(model, iteration_range=version.iteration_range or (0, 0))
    engine = TreeEngine(tables, transform=transform)

    def predict(matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        if kind == "margin":
            return engine.margin(matrix, threads=threads)
        scores = engine.predict(matrix, threads=threads)
        return labels(version, scores) if kind == "label" else scores

    return predict


FLAVOR = Flavor(
    "xgboost",
    inspect,
    load,
    accepts=lambda head, names: is_xgboost(head),
    libraries=("xgboost",),
    unneeded=UNNEEDED,
    encodes_by_features=True,
    loaded_factor=loaded_factor,
    tree_engine_blockers=tree_engine_blockers,
    trees=tree_predict,
    device_blockers=device_blockers,
    device_report=device_report,
    on_device=on_device,
)
