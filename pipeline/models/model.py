"""Describe a model independently of its flavor: features, version, predictor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from pipeline.spec.model_ref import OutputKind

Task = Literal["binary", "multiclass", "regression", "ranking", "other"]
FeatureKind = Literal["number", "integer", "indicator", "category"]


@dataclass(frozen=True)
class Feature:
    """One input column of a model."""

    name: str
    kind: FeatureKind = "number"
    categories: tuple[str, ...] | tuple[int, ...] | None = None
    """Values of a category in the order of their codes. None: the model stores no values, and rows contain codes."""


@dataclass(frozen=True)
class ModelVersion:
    """An immutable model version. Workers get this description and load the file themselves."""

    name: str
    version: str
    """Number in the registry; for a bare file, the first 12 digits of the digest."""
    uri: str
    """Path or URL of the file."""
    digest: str
    """SHA-256 of the file's bytes."""
    flavor: str
    """Name of the `pipeline.models.flavors` adapter, ``xgboost``."""
    nbytes: int
    """Bytes of the file."""
    features: tuple[Feature, ...]
    task: Task
    outputs: int
    """Values per row of ``prediction`` (1, or the number of classes or targets)."""
    objective: str = ""
    """Objective by the library's name."""
    trees: int = 0
    """Trees evaluated per row; 0 for a model without trees."""
    margins: int = 1
    """Values per row of ``margin``: one per class or target, even if ``prediction`` is only the best class."""
    tree_engine_blockers: tuple[str, ...] = ()
    """Reasons, by name, why the tree engine (`pipeline.models.trees`) cannot score the model."""
    registry: str = ""
    """Path or URL of the registry that resolved the version. Empty for a bare file."""

    @property
    def reference(self) -> str:
        """Reference to this version: ``models:/churn/3``, or the path of a bare file."""
        return f"models:/{self.name}/{self.version}" if self.registry else self.uri

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features, in the order of the matrix's columns."""
        return tuple(feature.name for feature in self.features)


class Predict(Protocol):
    """Type of `Predictor.predict` as a function."""

    def __call__(self, matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        """See `Predictor.predict`."""


class Predictor(Protocol):
    """A loaded model. One object serves all threads of a worker process."""

    version: ModelVersion

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> np.ndarray:
        """Make the matrix for `predict` from a table of exactly the model's feature columns, in its order.

        :param order: memory order of the matrix. `predict` accepts both; xgboost is faster with C.
        :returns: float32 [rows, features]; missing values are NaN, categories their codes.
        """

    def predict(self, matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        """Score ``matrix`` (float32 [rows, features]).

        :returns: [rows] or [rows, k]: float32 for ``prediction``, ``margin`` and ``contributions``, int32 for ``leaf``
            (k = trees) and ``label``. For ``contributions``, k = features + 1 with the bias last; for multi-class,
            k = classes × (features + 1).
        """

    def out_of_memory_errors(self) -> tuple[type[BaseException], ...]:
        """Return the error types that a call with fewer rows may avoid."""
