"""The LightGBM flavor: text files of ``Booster.save_model``, scored by LightGBM.

Scores are those of ``Booster.predict`` on a frame with the training columns, bit for bit. By default all iterations of
the file are used; ``save_model`` itself leaves out those after the best one.
"""

from __future__ import annotations

import threading
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa

from pipeline.errors import ModelError
from pipeline.models.flavors import Flavor, matrix
from pipeline.models.flavors.first_load import Described, first_load
from pipeline.models.flavors.library import LibraryPredictor, check_digest, import_or_explain
from pipeline.models.flavors.lightgbm_file import ModelText, read_text
from pipeline.models.model import ModelVersion, Predict
from pipeline.models.process import threads_wanted
from pipeline.models.trees import TreeEngine
from pipeline.models.trees.lightgbm import (
    lightgbm_output,
    lightgbm_tree_problem,
    read_lightgbm,
    unsupported_lightgbm,
)
from pipeline.spec.model_ref import OutputKind

_load_lock = threading.Lock()
"""Boosters that are made at the same time may share state in LightGBM (microsoft/LightGBM, issue 6142)."""
_OWN: tuple[OutputKind, ...] = ("prediction", "label", "probabilities", "margin", "leaf", "contributions")
_OF_TREES = ("prediction", "label", "probabilities", "margin")


def inspect(uri: str, data: bytes, *, name: str | None = None, allow_code: bool = False) -> ModelVersion:
    """Describe the model file at ``uri``; see `pipeline.models.flavors.first_load.first_load`."""
    return first_load("lightgbm", uri, data, name=name, library="LightGBM")


def describe(version: ModelVersion, data: bytes, *, allow_code: bool = False) -> Described:
    """Load the file, and describe the model. To be called in a child process.

    :raises ModelError: when the file is damaged or cut off, or LightGBM is not installed.
    """
    text = read_text(data, where=version.uri)
    if problem := lightgbm_tree_problem(text.text):
        raise ModelError(
            "the trees of the model are damaged",
            found=problem,
            expected="a file as booster.save_model wrote it",
            next_step="copy the file again, or save the model again with booster.save_model('model.txt')",
        )
    described = text.describe(version, blockers=unsupported_lightgbm(text.text))
    booster = _booster(described, data)
    kinds = [kind for kind in _OWN if text.classes or kind not in ("label", "probabilities")]
    return Described(described, LightGBMPredictor(described, booster, text, threads=1), tuple(kinds))


def load(version: ModelVersion, data: bytes, *, threads: int | None = None) -> LightGBMPredictor:
    """Load the predictor for ``version``.

    :param data: bytes of the model file; their digest is verified before they are parsed.
    :param threads: threads of one predict call. Default: ``score.threads``, ``OMP_NUM_THREADS``, or 1.
    :raises ModelDigestMismatch: when ``data`` differs from the pinned file.
    :raises ModelError: when LightGBM is not installed, or cannot read the file.
    """
    check_digest(version, data)
    text = read_text(data, where=version.uri)
    booster = _booster(version, data)
    return LightGBMPredictor(version, booster, text, threads=threads or version.threads or threads_wanted())


def _booster(version: ModelVersion, data: bytes) -> Any:
    lightgbm: Any = import_or_explain("lightgbm", library="LightGBM", extra="lightgbm", where=version.uri)
    try:
        with _load_lock:
            return lightgbm.Booster(model_str=data.decode())
    except (lightgbm.basic.LightGBMError, ValueError) as error:
        raise ModelError(
            "LightGBM cannot read the model",
            where=version.uri,
            found=str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__,
            expected="a file as booster.save_model wrote it",
            next_step="copy the file again, or save the model again with booster.save_model('model.txt')",
        ) from error


class LightGBMPredictor(LibraryPredictor):
    """A loaded booster."""

    def __init__(self, version: ModelVersion, booster: Any, text: ModelText, *, threads: int) -> None:
        super().__init__(version, threads=threads)
        self.booster = booster
        self.text = text
        begin, end = version.iteration_range or (0, 0)
        self._options = {"start_iteration": begin, "num_iteration": end - begin if end else -1, "num_threads": threads}

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> np.ndarray:
        """See `pipeline.models.model.Predictor.encode`; float64."""
        return matrix.encode(table, self.version.features, order=order, dtype=np.float64)

    def example(self) -> np.ndarray:
        """See `pipeline.models.model.Predictor.example`."""
        return np.zeros((1, len(self.version.features)), np.float64)

    def call(self, rows: np.ndarray, kind: OutputKind) -> np.ndarray:
        """Call ``Booster.predict``; see `pipeline.models.model.Predictor.predict`."""
        if kind == "leaf":
            leaves: Any = self.booster.predict(rows, pred_leaf=True, **self._options)
            return np.asarray(leaves, np.int32).reshape(len(rows), -1)
        scores = self.booster.predict(
            rows, raw_score=kind == "margin", pred_contrib=kind == "contributions", **self._options
        )
        return finish(cast(np.ndarray, scores), kind, text=self.text)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.models.model.Predictor.is_out_of_memory`: LightGBM has one error for everything."""
        return isinstance(error, MemoryError) or (type(error).__name__ == "LightGBMError" and "bad_alloc" in str(error))


def finish(scores: np.ndarray, kind: OutputKind, *, text: ModelText) -> np.ndarray:
    """Return ``kind`` for the results of predict, as the classes of LightGBM's scikit-learn wrapper compute it."""
    if kind == "label":
        return (scores.argmax(axis=1) if scores.ndim == 2 else scores > 0.5).astype(np.int32)
    if kind == "probabilities" and scores.ndim == 1:
        return np.ascontiguousarray(np.vstack((1.0 - scores, scores)).T)
    return scores


def tree_engine_blockers(version: ModelVersion, kind: OutputKind) -> tuple[str, ...]:
    """Return the reasons why the tree engine cannot compute ``kind`` with LightGBM's bits; empty if it can."""
    return version.tree_engine_blockers if kind in _OF_TREES else (f"the output {kind}",)


def tree_predict(predictor: LightGBMPredictor, kind: OutputKind) -> Predict:
    """Return ``predictor.predict`` for ``kind`` and for margins on the tree engine, with the same number of threads.

    :raises ModelError: when the engine cannot read the trees, or is not installed.
    """
    text, threads, rounds = predictor.text, predictor.threads, predictor.version.iteration_range or (0, 0)
    engine = TreeEngine(
        read_lightgbm(text.text, iteration_range=rounds), transform=lightgbm_output(text.text, iteration_range=rounds)
    )

    def predict(matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        if kind == "margin":
            return engine.margin(matrix, threads=threads)
        return finish(engine.predict(matrix, threads=threads), kind, text=text)

    return predict


FLAVOR = Flavor(
    "lightgbm",
    inspect,
    load,
    accepts=lambda head, names: head.startswith(b"tree\n") and b"\nfeature_names=" in head,
    describe=describe,
    libraries=("lightgbm",),
    distributions=("lightgbm",),
    encodes_by_features=True,
    tree_engine_blockers=tree_engine_blockers,
    trees=tree_predict,
)
