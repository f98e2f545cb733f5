"""The MLflow flavor: a model that only ``python_function`` loads, where the job allows code.

The signature says what it takes: columns are cast to its types before the call, and others are refused. Models with a
file of a flavor of this package are scored by that flavor; see `pipeline.models.folder_models`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import BadPrediction, ModelError, RefusedForSafety, SchemaDrift
from pipeline.models.feature_frame import FeatureFrame
from pipeline.models.flavors import Flavor
from pipeline.models.flavors.first_load import Described, first_load
from pipeline.models.flavors.library import LibraryPredictor, check_digest, import_or_explain
from pipeline.models.flavors.mlflow_file import KINDS, MLMODEL, parse_mlmodel
from pipeline.models.flavors.python_results import result_values
from pipeline.models.flavors.thread_pools import POOLS
from pipeline.models.model import Feature, ModelData, ModelFolder, ModelVersion, OutputType
from pipeline.models.process import threads_wanted
from pipeline.spec.model_ref import OutputKind

_TYPES: dict[str, pa.DataType] = {
    "boolean": pa.bool_(),
    "integer": pa.int32(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "string": pa.string(),
}


def inspect(uri: str, data: ModelData, *, name: str | None = None, allow_code: bool = False) -> ModelVersion:
    """Describe the model folder at ``uri``; see `pipeline.models.flavors.first_load.first_load`."""
    if not allow_code:
        raise RefusedForSafety(
            "loading the MLflow model runs code in its folder",
            where=uri,
            found="a model that only python_function loads, and score.allow_code: false",
            expected="a model logged with the MLflow flavor of xgboost, LightGBM, CatBoost, ONNX or "
            "scikit-learn (skops)",
            next_step="log it with such a flavor; or, if you trust whoever made it, set score.allow_code: true",
        )
    return first_load("mlflow", uri, data, name=name, allow_code=allow_code, library="MLflow")


def describe(version: ModelVersion, data: ModelData, *, allow_code: bool = False) -> Described:
    """Load the model, and describe it by its signature. To be called in a child process.

    :raises ModelError: for a model without a signature, or one of tensors; or if MLflow cannot load it.
    """
    folder = _folder(version, data)
    described = parse_mlmodel(folder.read(MLMODEL), where=version.uri)
    unknown = [f"{name}: {kind}" for name, kind in described.columns if kind not in KINDS]
    if not described.columns or unknown:
        raise ModelError(
            "the signature of the MLflow model does not tell its columns",
            where=version.uri,
            found=", ".join(unknown) or ("a signature of tensors" if described.has_tensors else "no signature"),
            expected="columns of the types " + ", ".join(KINDS),
            next_step="log it with signature=mlflow.models.infer_signature(frame, predictions)",
        )
    found = replace(version, features=described.features, task="other", objective="MLflow", runs_code=True)
    predictor = MlflowPredictor(found, _load(folder, version.uri), described.columns, threads=1)
    from pipeline.models.flavors.measure import sample_table

    example = sample_table(found.features, 64)
    values = predictor.call(predictor.encode(example), "prediction")
    names = {"f4": "float32", "f8": "float64", "i4": "int32", "i8": "int64", "b1": "bool"}
    kind = "string" if values.dtype.kind in "OU" else names.get(values.dtype.str[1:], "")
    if not kind:
        raise BadPrediction(
            "the MLflow model gives values of no type of a column",
            found=str(values.dtype),
            expected=", ".join((*names.values(), "string")),
            next_step="convert them in the model",
        )
    width = 1 if values.ndim == 1 else values.shape[1]
    outputs = (OutputType("prediction", kind, width, names=tuple(predictor.names) if width > 1 else ()),)
    return Described(found, predictor, ("prediction",), outputs=outputs, is_declared=True)


def load(version: ModelVersion, data: ModelData, *, threads: int | None = None) -> MlflowPredictor:
    """Load the predictor for ``version``.

    :param data: the folder; its files have the digests in the plan.
    :param threads: threads of BLAS and OpenMP in a call. Default: ``score.threads``, ``OMP_NUM_THREADS``, or 1.
    :raises ModelDigestMismatch: when the folder differs from what was pinned.
    :raises ModelError: when MLflow is not installed, or cannot load the model.
    """
    check_digest(version, data)
    folder = _folder(version, data)
    columns = parse_mlmodel(folder.read(MLMODEL), where=version.uri).columns
    threads = threads or version.threads or threads_wanted()
    return MlflowPredictor(version, _load(folder, version.uri), columns, threads=threads)


def _folder(version: ModelVersion, data: ModelData) -> ModelFolder:
    if isinstance(data, ModelFolder):
        return data
    raise ModelError("an MLflow model is a folder", where=version.uri, found="a file", next_step="name the folder")


def _load(folder: ModelFolder, where: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    pyfunc: Any = import_or_explain("mlflow.pyfunc", library="MLflow", extra="mlflow", where=where)
    try:
        return pyfunc.load_model(folder.path)
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(
            "MLflow cannot load the model",
            where=where,
            found=f"{type(error).__name__}: {error}"[:300],
            expected="a model whose requirements are installed here",
            next_step="install what its requirements.txt names, for driver and workers",
        ) from error


class MlflowPredictor(LibraryPredictor):
    """A loaded ``python_function``."""

    def __init__(self, version: ModelVersion, model: Any, columns: Any, *, threads: int) -> None:
        super().__init__(version, threads=threads)
        self._model = model
        self._columns = [(name, _TYPES[kind]) for name, kind in columns]
        self.names: list[str] = []
        """Columns of the last result that was a frame."""

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> Any:
        """See `pipeline.models.model.Predictor.encode`: a frame with the columns of the signature.

        :raises SchemaDrift: for a column that the signature's type cannot hold.
        """
        import pandas as pd

        columns = {
            name: _series(table.column(index), kind, feature)
            for index, ((name, kind), feature) in enumerate(zip(self._columns, self.version.features, strict=True))
        }
        return FeatureFrame(pd.DataFrame(columns, copy=False))

    def example(self) -> Any:
        """See `pipeline.models.model.Predictor.example`."""
        from pipeline.models.flavors.measure import sample_table

        return self.encode(sample_table(self.version.features, 1))

    def call(self, rows: FeatureFrame, kind: OutputKind) -> np.ndarray:
        """Cast the columns to the types of the signature, and call the model.

        :raises ValueError: for a row with a value that its type cannot hold, such as a null among integers.
        """
        frame = rows.frame.reset_index(drop=True)
        for name, wanted in self._columns:
            if pa.types.is_integer(wanted) or pa.types.is_boolean(wanted):
                frame[name] = _whole(frame[name], wanted)
        with POOLS.hold(self.threads):
            result = self._model.predict(frame)
        if hasattr(result, "columns"):
            self.names = list(map(str, result.columns))
        values = result_values(result, (), rows=len(frame))
        return (
            values.astype(object)
            if values.dtype.kind == "U"
            else values.squeeze(axis=1)
            if _is_flat(values)
            else values
        )


def _is_flat(values: np.ndarray) -> bool:
    return values.ndim == 2 and values.shape[1] == 1


def _series(column: pa.ChunkedArray, wanted: pa.DataType, feature: Feature) -> Any:
    """Return a column in the type of the signature; integers and flags with nulls as float64."""
    kind, types = column.type, pa.types
    if types.is_dictionary(kind):
        column, kind = pc.cast(column, kind.value_type), kind.value_type
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)
    if not types.is_null(kind) and not (is_text if types.is_string(wanted) else is_number):
        raise SchemaDrift(
            "the model cannot take a column",
            where=feature.name,
            found=str(kind),
            expected=f"{wanted}, by the signature of the MLflow model",
            next_step="convert it in a map step, or list the right columns under score.features",
        )
    if types.is_string(wanted):
        return pc.cast(column, wanted).to_pandas().astype(object)
    whole = types.is_integer(wanted) or types.is_boolean(wanted)
    return pc.cast(column, pa.float64() if whole and not types.is_integer(kind) else wanted, safe=False).to_pandas()


def _whole(series: Any, wanted: pa.DataType) -> Any:
    if series.dtype.kind == "f" and (not np.isfinite(series.to_numpy()).all() or (series % 1 != 0).any()):
        raise ValueError(f"{series.name}: a null or a fraction, and the signature says {wanted}")
    return series.astype(wanted.to_pandas_dtype())


FLAVOR = Flavor(
    "mlflow",
    inspect,
    load,
    accepts=lambda head, names: False,
    accepts_folder=lambda names: MLMODEL in names,
    describe=describe,
    takes="frame",
    libraries=("mlflow.pyfunc",),
    distributions=("mlflow-skinny", "mlflow"),
)
