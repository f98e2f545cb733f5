"""The CatBoost flavor: cbm files, scored by CatBoost on the CPU.

Categories are hashed by the model, so that their values are given as they are, and none is unknown.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ModelError
from pipeline.models.feature_frame import FeatureFrame
from pipeline.models.flavors import Flavor
from pipeline.models.flavors.first_load import Described, first_load
from pipeline.models.flavors.library import LibraryPredictor, check_digest, import_or_explain
from pipeline.models.model import Feature, ModelVersion, Task
from pipeline.models.process import threads_wanted
from pipeline.spec.model_ref import OutputKind

_EXPECTED = "a file as model.save_model('model.cbm') wrote it"
_EXPONENTS = ("Poisson", "Tweedie")
"""Losses whose regressors predict the exponential of the raw value."""
_SAMPLES = ("a", "b", "c")


def inspect(uri: str, data: bytes, *, name: str | None = None, allow_code: bool = False) -> ModelVersion:
    """Describe the model file at ``uri``; see `pipeline.models.flavors.first_load.first_load`."""
    return first_load("catboost", uri, data, name=name, library="CatBoost")


def describe(version: ModelVersion, data: bytes, *, allow_code: bool = False) -> Described:
    """Load the file, and describe the model. To be called in a child process.

    :raises ModelError: when the file is damaged, or has features that are texts or embeddings.
    """
    model = _model(version, data)
    others = [*model.get_text_feature_indices(), *model.get_embedding_feature_indices()]
    names = [str(name) for name in model.feature_names_]
    if others or len(set(names)) != len(names):
        raise ModelError(
            "the CatBoost model has features that no column can hold",
            found=", ".join(names[index] for index in others) or "two features of one name",
            expected="numbers and categories, each with a name of its own",
            next_step="train without texts and embeddings, and with names of columns",
        )
    categorical = set(model.get_cat_feature_indices())
    features = tuple(Feature(name, "any" if index in categorical else "number") for index, name in enumerate(names))
    count = len(model.classes_)
    tasks: dict[int, Task] = {0: "regression", 1: "other", 2: "binary"}
    described = replace(
        version,
        features=features,
        task=tasks.get(count, "multiclass"),
        objective=str(model.get_all_params().get("loss_function", "")),
        trees=int(model.tree_count_),
    )
    kinds: tuple[OutputKind, ...] = ("prediction", "margin")
    if count:
        kinds = ("prediction", "label", "probabilities", "margin")
    values = {names[index]: _SAMPLES for index in categorical}
    return Described(described, CatBoostPredictor(described, model, threads=1), kinds, values)


def load(version: ModelVersion, data: bytes, *, threads: int | None = None) -> CatBoostPredictor:
    """Load the predictor for ``version``.

    :param data: bytes of the model file; their digest is verified before they are parsed.
    :param threads: threads of one predict call. Default: ``score.threads``, ``OMP_NUM_THREADS``, or 1.
    :raises ModelDigestMismatch: when ``data`` differs from the pinned file.
    :raises ModelError: when CatBoost is not installed, or cannot read the file.
    """
    check_digest(version, data)
    return CatBoostPredictor(version, _model(version, data), threads=threads or version.threads or threads_wanted())


def _model(version: ModelVersion, data: bytes) -> Any:
    # CatBoost itself does not miss bytes at the end of the trees.
    if data[:4] != b"CBM1" or len(data) < 8 or len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ModelError(
            "the CatBoost model is damaged",
            where=version.uri,
            found="a file that is cut off" if data[:4] == b"CBM1" else "other bytes",
            expected=_EXPECTED,
            next_step="copy the file again, or save the model again",
        )
    catboost: Any = import_or_explain("catboost", library="CatBoost", extra="catboost", where=version.uri)
    try:
        return catboost.CatBoost().load_model(blob=data)
    except catboost.CatBoostError as error:
        raise ModelError(
            "CatBoost cannot read the model",
            where=version.uri,
            found=str(error).strip()[:300],
            expected=_EXPECTED,
            next_step="copy the file again, or save the model again",
        ) from error


class CatBoostPredictor(LibraryPredictor):
    """A loaded model."""

    def __init__(self, version: ModelVersion, model: Any, *, threads: int) -> None:
        super().__init__(version, threads=threads)
        self._model = model
        self._is_classifier = len(model.classes_) > 0
        self._is_exponent = str(model.get_all_params().get("loss_function", "")).startswith(_EXPONENTS)

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> Any:
        """See `pipeline.models.model.Predictor.encode`: a frame of float64, and of categories as they are."""
        import pandas as pd

        columns = {
            feature.name: _values(table.column(index), is_category=feature.kind == "any")
            for index, feature in enumerate(self.version.features)
        }
        return FeatureFrame(pd.DataFrame(columns, copy=False))

    def example(self) -> Any:
        """See `pipeline.models.model.Predictor.example`."""
        names = [feature.name for feature in self.version.features]
        return self.encode(pa.table([["a"] if one.kind == "any" else [0.0] for one in self.version.features], names))

    def call(self, rows: FeatureFrame, kind: OutputKind) -> np.ndarray:
        """Call ``CatBoost.predict``; see `pipeline.models.model.Predictor.predict`."""
        types = {"label": "Class", "margin": "RawFormulaVal", "probabilities": "Probability"}
        usual = "Probability" if self._is_classifier else "Exponent" if self._is_exponent else "RawFormulaVal"
        found: np.ndarray = np.asarray(
            self._model.predict(rows.frame, prediction_type=types.get(kind, usual), thread_count=self.threads)
        )
        if kind == "label":
            return found.reshape(len(rows))
        if kind == "prediction" and self._is_classifier and found.shape[1] == 2:
            return np.ascontiguousarray(found[:, 1])
        return found

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.models.model.Predictor.is_out_of_memory`."""
        return isinstance(error, MemoryError) or "bad_alloc" in str(error) or "bad allocation" in str(error)


def _values(column: pa.ChunkedArray, *, is_category: bool) -> Any:
    """Return a column for a frame: float64 with NaN for nulls; categories as Python values, as CatBoost hashes them."""
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if is_category:
        return np.asarray(column.to_pylist(), dtype=object)
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    return pc.cast(column, pa.float64(), safe=False).to_numpy()


FLAVOR = Flavor(
    "catboost",
    inspect,
    load,
    accepts=lambda head, names: head.startswith(b"CBM1"),
    describe=describe,
    takes="frame",
    libraries=("catboost",),
    distributions=("catboost",),
)
