"""The ONNX flavor: model files of ONNX, scored by ONNX Runtime on the CPU.

A file is loaded from its bytes alone: tensors in other files are refused, and so are operators that ONNX Runtime does
not have. Scores have the bits of ONNX Runtime; the library that exported the model may have others in the last places.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ModelError, RefusedForSafety
from pipeline.models.feature_frame import FeatureFrame
from pipeline.models.flavors import Flavor, matrix
from pipeline.models.flavors.first_load import Described, first_load
from pipeline.models.flavors.library import LibraryPredictor, check_digest, import_or_explain
from pipeline.models.flavors.onnx_file import has_external_data
from pipeline.models.model import Feature, FeatureKind, ModelVersion
from pipeline.models.process import threads_wanted
from pipeline.spec.model_ref import OutputKind

_TYPES: dict[str, tuple[FeatureKind, Any]] = {
    "tensor(float)": ("number", np.float32),
    "tensor(double)": ("number", np.float64),
    "tensor(int64)": ("integer", np.int64),
    "tensor(int32)": ("integer", np.int32),
    "tensor(bool)": ("indicator", np.bool_),
    "tensor(string)": ("text", object),
}
"""Kind and dtype of a feature by the type of its tensor."""
_LABELS = ("tensor(int64)", "tensor(string)")
_NUMBERS = ("tensor(float)", "tensor(double)")
_NEXT_STEP = "copy the file again, or export the model again"


def inspect(uri: str, data: bytes, *, name: str | None = None, allow_code: bool = False) -> ModelVersion:
    """Describe the model file at ``uri``; see `pipeline.models.flavors.first_load.first_load`."""
    return first_load("onnx", uri, data, name=name, library="ONNX")


def describe(version: ModelVersion, data: bytes, *, allow_code: bool = False) -> Described:
    """Load the file, and describe the model. To be called in a child process.

    :raises RefusedForSafety: for a file with tensors in other files.
    :raises ModelError: when the file is damaged, or has inputs or outputs that are not one row of columns.
    """
    session = _session(version, data, threads=1)
    inputs, _ = _inputs(session)
    features = _features(inputs)
    is_classifier = _is_classifier(session.get_outputs())
    described = replace(version, features=features, task="other", objective="ONNX")
    predictor = OnnxPredictor(described, session, threads=1)
    kinds: tuple[OutputKind, ...] = ("prediction", "label", "probabilities") if is_classifier else ("prediction",)
    if is_classifier:
        classes = predictor.call(predictor.example(), "probabilities").shape[1]
        described = replace(described, task="binary" if classes == 2 else "multiclass")
    return Described(described, predictor, kinds)


def load(version: ModelVersion, data: bytes, *, threads: int | None = None) -> OnnxPredictor:
    """Load the predictor for ``version``.

    :param data: bytes of the model file; their digest is verified before they are parsed.
    :param threads: threads of one call. Default: ``score.threads``, ``OMP_NUM_THREADS``, or 1.
    :raises ModelDigestMismatch: when ``data`` differs from the pinned file.
    :raises ModelError: when ONNX Runtime is not installed, or cannot read the file.
    """
    check_digest(version, data)
    threads = threads or version.threads or threads_wanted()
    return OnnxPredictor(version, _session(version, data, threads=threads), threads=threads)


def _session(version: ModelVersion, data: bytes, *, threads: int) -> Any:
    try:
        is_split = has_external_data(data)
    except ValueError as error:
        raise ModelError(
            "the ONNX model is damaged", where=version.uri, found=str(error), next_step=_NEXT_STEP
        ) from error
    if is_split:
        raise RefusedForSafety(
            "the ONNX model has tensors in other files",
            where=version.uri,
            found="tensors with the data location EXTERNAL",
            expected="a model in one file, whose digest covers all of it",
            next_step="save it again with onnx.save(model, path, save_as_external_data=False)",
        )
    runtime: Any = import_or_explain("onnxruntime", library="ONNX Runtime", extra="onnx", where=version.uri)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    try:
        return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(
            "ONNX Runtime cannot read the model",
            where=version.uri,
            found=str(error).strip()[:300],
            expected="operators of ONNX and of ONNX Runtime itself",
            next_step=_NEXT_STEP,
        ) from error


def _inputs(session: Any) -> tuple[list[Any], int]:
    """Return the inputs, and the only number of rows that a call may have; 0 for any.

    :raises ModelError: for inputs that are not columns.
    """
    inputs = session.get_inputs()
    rows = {one.shape[0] for one in inputs if one.shape}
    sizes = {size for size in rows if isinstance(size, int)}
    is_matrix = len(inputs) == 1 and len(inputs[0].shape) == 2 and inputs[0].type in _NUMBERS
    problem = ""
    for one in inputs:
        width = one.shape[1] if len(one.shape) == 2 else 1
        if one.type not in _TYPES or not 1 <= len(one.shape) <= 2 or not isinstance(width, int):
            problem = f"{one.name}: {one.type} {one.shape}"
        elif width != 1 and not is_matrix:
            problem = f"{one.name}: {one.type} {one.shape}, beside {len(inputs) - 1} other inputs"
    if problem or not inputs or len(sizes) > 1:
        raise ModelError(
            "the inputs of the ONNX model are not columns",
            found=problem or f"{len(inputs)} inputs with rows {sorted(map(str, rows))}",
            expected="one input [rows, features] of floats, or one input [rows] or [rows, 1] for each feature",
            next_step="export the model with such inputs",
        )
    return inputs, next(iter(sizes), 0)


def _features(inputs: list[Any]) -> tuple[Feature, ...]:
    if _is_matrix(inputs):
        return tuple(Feature(f"f{index}") for index in range(inputs[0].shape[1]))
    return tuple(Feature(one.name, _TYPES[one.type][0]) for one in inputs)


def _is_matrix(inputs: list[Any]) -> bool:
    return len(inputs) == 1 and inputs[0].type in _NUMBERS and len(inputs[0].shape) == 2 and inputs[0].shape[1] != 1


def _is_classifier(outputs: list[Any]) -> bool:
    """Return True for labels and a matrix of probabilities, as exporters of scikit-learn write them."""
    return (
        len(outputs) >= 2
        and outputs[0].type in _LABELS
        and outputs[1].type in _NUMBERS
        and len(outputs[0].shape) == 1
        and len(outputs[1].shape) == 2
    )


class OnnxPredictor(LibraryPredictor):
    """A loaded session."""

    def __init__(self, version: ModelVersion, session: Any, *, threads: int) -> None:
        super().__init__(version, threads=threads)
        self._session = session
        self._inputs, self._batch = _inputs(session)
        self._outputs = session.get_outputs()
        self._is_classifier = _is_classifier(self._outputs)

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> Any:
        """See `pipeline.models.model.Predictor.encode`: a matrix, or a frame with a column for each input."""
        if _is_matrix(self._inputs):
            return matrix.encode(table, self.version.features, dtype=_TYPES[self._inputs[0].type][1])
        import pandas as pd

        columns = {
            feature.name: _values(table.column(index), feature) for index, feature in enumerate(self.version.features)
        }
        return FeatureFrame(pd.DataFrame(columns, copy=False))

    def example(self) -> Any:
        """See `pipeline.models.model.Predictor.example`."""
        from pipeline.models.flavors.measure import sample_table

        return self.encode(sample_table(self.version.features, 1))

    def call(self, rows: Any, kind: OutputKind) -> np.ndarray:
        """Run the session; a model for a fixed number of rows gets that many, filled up with the first row."""
        if not self._batch or len(rows) == self._batch:
            return self._run(rows, kind)
        parts = []
        for start in range(0, len(rows), self._batch):
            part = rows[start : start + self._batch]
            count = len(part)
            places = np.concatenate([np.arange(count), np.zeros(self._batch - count, np.int64)])
            parts.append(self._run(part[places], kind)[:count])
        return np.concatenate(parts)

    def _run(self, rows: Any, kind: OutputKind) -> np.ndarray:
        number = 1 if self._is_classifier and kind != "label" else 0
        given = {one.name: self._tensor(rows, one) for one in self._inputs}
        found: np.ndarray = np.asarray(self._session.run([self._outputs[number].name], given)[0])
        if self._is_classifier and kind == "prediction" and found.shape[1] == 2:
            return np.ascontiguousarray(found[:, 1])
        return found.reshape(len(found)) if found.ndim == 2 and found.shape[1] == 1 else found

    def _tensor(self, rows: Any, one: Any) -> np.ndarray:
        if not isinstance(rows, FeatureFrame):
            return np.ascontiguousarray(rows)
        column: np.ndarray = rows.frame[one.name].to_numpy()
        dtype = _TYPES[one.type][1]
        is_missing = rows.frame[one.name].isna().to_numpy()
        if dtype not in (np.float32, np.float64) and is_missing.any():
            raise ValueError(f"null for the input {one.name}, which has the type {one.type}")
        return column.astype(dtype).reshape((-1, 1) if len(one.shape) == 2 else (-1,))


def _values(column: pa.ChunkedArray, feature: Feature) -> Any:
    """Return a column for a frame; numbers with nulls as float64 with NaN."""
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if feature.kind == "text":
        return np.asarray(column.to_pylist(), dtype=object)
    if column.null_count or pa.types.is_decimal(column.type):
        column = pc.cast(column, pa.float64(), safe=False)
    return column.to_numpy()


FLAVOR = Flavor(
    "onnx",
    inspect,
    load,
    accepts=lambda head, names: head[:1] == b"\x08" and len(head) > 2 and head[2] in b"\x12\x1a\x22\x2a\x32\x3a\x42",
    describe=describe,
    takes="frame",
    libraries=("onnxruntime",),
    distributions=("onnxruntime",),
)
