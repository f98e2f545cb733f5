"""`LibraryPredictor`: what the predictors of all libraries but xgboost have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.common.digest import digest_bytes
from pipeline.errors import ModelDigestMismatch, ModelError
from pipeline.models.model import ModelData, ModelFolder, ModelVersion
from pipeline.models.outputs import output_type
from pipeline.spec.model_ref import OutputKind


class LibraryPredictor(ABC):
    """A loaded model whose library is called as its promise demands. One object serves all threads of a process."""

    def __init__(self, version: ModelVersion, *, threads: int) -> None:
        self.version = version
        self.threads = threads
        """Threads of one call of the library."""
        promise = version.promise
        self._chunk = promise.chunk if promise is not None and promise.kind == "fixed" else 0

    @abstractmethod
    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> Any:
        """See `pipeline.models.model.Predictor.encode`."""

    @abstractmethod
    def example(self) -> Any:
        """See `pipeline.models.model.Predictor.example`."""

    @abstractmethod
    def call(self, rows: Any, kind: OutputKind) -> np.ndarray:
        """Call the library once; see `predict`. At least one row."""

    def predict(self, matrix: Any, *, kind: OutputKind) -> np.ndarray:
        """See `pipeline.models.model.Predictor.predict`."""
        expected = output_type(self.version, kind)
        if not len(matrix) and expected is not None:
            is_flat = expected.width == 1 and not expected.is_list
            return np.empty((0,) if is_flat else (0, expected.width), expected.dtype)
        scores = predict_in_chunks(self, matrix, kind, chunk=self._chunk) if self._chunk else self.call(matrix, kind)
        if expected is not None and expected.dtype == object:
            # Texts of fixed width, as numpy keeps them.
            return scores.astype(object)
        return scores

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.models.model.Predictor.is_out_of_memory`."""
        return says_out_of_memory(error)


def predict_in_chunks(predictor: LibraryPredictor, rows: Any, kind: OutputKind, *, chunk: int) -> np.ndarray:
    """Return the scores of ``rows`` from calls of ``chunk`` rows each; the last one is filled up with its first row."""
    parts = []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        count = len(part)
        if count < chunk:
            part = part[np.concatenate([np.arange(count), np.zeros(chunk - count, np.int64)])]
        parts.append(predictor.call(part, kind)[:count])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def says_out_of_memory(error: BaseException) -> bool:
    """Return True if the type or the message of ``error`` says that memory ran out, as libraries word it."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(part in text for part in ("can't allocate memory", "bfc_arena", "Failed to allocate memory"))
    )


def digest_of(data: ModelData) -> str:
    """Return the digest of a model file, or of the files in a folder."""
    return data.digest if isinstance(data, ModelFolder) else digest_bytes(data)


def check_digest(version: ModelVersion, data: ModelData) -> None:
    """Check that ``data`` is the file that was pinned, before anything is parsed.

    :raises ModelDigestMismatch: if it is not.
    """
    digest = digest_of(data)
    if digest != version.digest:
        raise ModelDigestMismatch(
            "the model file is not the one that was pinned",
            where=version.uri,
            found=f"SHA-256 {digest}",
            expected=f"SHA-256 {version.digest}",
            next_step="put the pinned file back, or run a new job with the new model",
        )


def import_or_explain(module: str, *, library: str, extra: str, where: str) -> ModuleType:
    """Import the library of a model.

    :raises ModelError: when it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ModelError(
            f"{library} is not installed here",
            where=where,
            found=f"{type(error).__name__}: {error}",
            next_step=f"install the extra {extra}",
        ) from error
