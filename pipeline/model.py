"""What a model is to everything but the flavor that reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from pipeline.errors import SpecError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

OutputKind = Literal["prediction", "label", "margin", "leaf", "contributions"]
Task = Literal["binary", "multiclass", "regression", "ranking", "other"]
FeatureKind = Literal["number", "integer", "indicator", "category"]
Engine = Literal["auto", "xgboost", "trees"]

_REGISTRY = re.compile(
    r"models:/(?P<name>[A-Za-z0-9_][A-Za-z0-9._ -]{0,127})"
    r"(?:@(?P<alias>[A-Za-z0-9._-]{1,255})|/(?P<version>[1-9][0-9]{0,8}))"
)
"""MLflow's grammar, with the names of it that do no harm in a path. The built-in registry has lower-case ones only."""


@dataclass(frozen=True)
class ModelRef:
    """What a job spec says about which model to use: a file, or a name in a registry with an alias or a version."""

    text: str

    @property
    def is_file(self) -> bool:
        """Whether it is the path or URL of a model file."""
        return not self.text.startswith("models:/")

    @property
    def name(self) -> str:
        """Name of the model in its registry; empty for a file."""
        return self._part("name")

    @property
    def alias(self) -> str:
        """The alias that says which version; empty when the reference has a number, and for a file."""
        return self._part("alias")

    @property
    def version(self) -> int | None:
        """The number of the version; None when the reference has an alias, and for a file."""
        number = self._part("version")
        return int(number) if number else None

    def _part(self, name: str) -> str:
        match = _REGISTRY.fullmatch(self.text)
        return (match[name] or "") if match else ""

    @staticmethod
    def parse(text: str) -> ModelRef:
        """Check the grammar ``models:/name@alias``, ``models:/name/3`` or a path.

        :raises SpecError: for a ``models:`` URI of another form.
        """
        if text.startswith("models:") and not _REGISTRY.fullmatch(text):
            raise SpecError(
                "a model reference is malformed",
                found=text,
                expected="models:/name@alias, models:/name/3, or the path of a model file",
            )
        return ModelRef(text)


@dataclass(frozen=True)
class Feature:
    """One input column of a model."""

    name: str
    kind: FeatureKind = "number"
    categories: tuple[str, ...] | tuple[int, ...] | None = None
    """Values of a category in the order of their codes; None when the model does not tell (then codes are given)."""


@dataclass(frozen=True)
class ModelVersion:
    """An immutable model: what a reference resolved to. It is the recipe that travels to workers, never the bytes."""

    name: str
    version: str
    """The registry's number, or the first 12 digits of the digest for a bare file."""
    uri: str
    """Path or URL of the file."""
    digest: str
    """SHA-256 of the file's bytes."""
    flavor: str
    """Name of the `pipeline.flavors` adapter, ``xgboost``."""
    nbytes: int
    """Bytes of the file."""
    features: tuple[Feature, ...]
    task: Task
    outputs: int
    """Values per row of ``prediction`` (1, or the number of classes or targets)."""
    objective: str = ""
    """As the library names it."""
    trees: int = 0
    """Trees that are evaluated per row; 0 when it is no ensemble."""
    margins: int = 1
    """Values per row of ``margin``: one a class or target, also where ``prediction`` is only the best class."""
    not_for_trees: tuple[str, ...] = ()
    """What keeps the tree engine (`pipeline.trees`) from scoring it, by name."""
    registry: str = ""
    """Where it was resolved: path or URL of the registry. Empty for a bare file."""

    @property
    def reference(self) -> str:
        """What names this very version: ``models:/churn/3``, or the path of a bare file."""
        return f"models:/{self.name}/{self.version}" if self.registry else self.uri

    @property
    def feature_names(self) -> tuple[str, ...]:
        """In the order of the matrix's columns."""
        return tuple(feature.name for feature in self.features)


class Predict(Protocol):
    """`Predictor.predict` by itself."""

    def __call__(self, matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        """See `Predictor.predict`."""


class Predictor(Protocol):
    """A loaded model. One object serves all threads of a worker process."""

    version: ModelVersion

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> np.ndarray:
        """The matrix `predict` takes, from a table that has exactly the model's feature columns, in its order.

        :param order: of the matrix in memory. `predict` takes either; the library itself is faster with C.
        :returns: float32 [rows, features]; missing values are NaN, categories their codes.
        """

    def predict(self, matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        """Score ``matrix`` (float32 [rows, features]).

        :returns: [rows] or [rows, k]: float32 for ``prediction``, ``margin`` and ``contributions`` (k = features + 1,
            the bias last; classes × that for multi-class), int32 for ``leaf`` (k = trees) and ``label``.
        """

    def out_of_memory_errors(self) -> tuple[type[BaseException], ...]:
        """Exception types that mean: try again with fewer rows."""
