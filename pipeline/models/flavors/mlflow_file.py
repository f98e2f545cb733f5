"""Read the file ``MLmodel`` of an MLflow model: its native file, and its signature. Without MLflow. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.errors import ModelError
from pipeline.models.model import Feature, FeatureKind
from pipeline.storage.urls import check_name

MLMODEL = "MLmodel"
NATIVE = {"xgboost": "data", "lightgbm": "data", "catboost": "data", "onnx": "data", "sklearn": "pickled_model"}
"""Flavors whose file is read by this package, and the field that names it."""
KINDS: dict[str, FeatureKind] = {
    "boolean": "indicator",
    "integer": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "string": "text",
}
"""Kind of a feature by the type of a column in a signature."""


@dataclass(frozen=True)
class MlflowModel:
    """The description of an MLflow model."""

    native: tuple[str, str] | None
    """Flavor and name of the file that this package reads itself; None: only ``python_function`` can load it."""
    flavors: tuple[str, ...]
    columns: tuple[tuple[str, str], ...] = ()
    """Name and type of each column of the signature; empty without one, or for tensors."""
    has_tensors: bool = False
    """True if the signature is of tensors."""

    @property
    def features(self) -> tuple[Feature, ...]:
        """The columns as features."""
        return tuple(Feature(name, KINDS.get(kind, "any")) for name, kind in self.columns)


def parse_mlmodel(data: bytes, *, where: str) -> MlflowModel:
    """Return what an ``MLmodel`` file says.

    :raises ModelError: if it is damaged.
    :raises RefusedForSafety: if it names a file outside of its folder.
    """
    try:
        described = yaml.safe_load(data)
        flavors = dict(described["flavors"])
        columns, has_tensors = _signature(described.get("signature"))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            "the MLmodel file is damaged",
            where=where,
            found=f"{type(error).__name__}: {error}"[:300],
            expected="the description that MLflow wrote",
            next_step="log the model again",
        ) from error
    native = next((found for name in NATIVE if (found := _native(name, flavors.get(name))) is not None), None)
    return MlflowModel(native, tuple(flavors), columns, has_tensors)


def _native(flavor: str, fields: Any) -> tuple[str, str] | None:
    if not isinstance(fields, Mapping) or not fields.get(NATIVE[flavor]):
        return None
    return flavor, check_name(str(fields[NATIVE[flavor]]))


def _signature(signature: Any) -> tuple[tuple[tuple[str, str], ...], bool]:
    if not isinstance(signature, Mapping) or not signature.get("inputs"):
        return (), False
    inputs = json.loads(signature["inputs"])
    if any(one.get("type") == "tensor" for one in inputs):
        return (), True
    # Columns may lack names: then they are given by their places.
    pairs = [(str(one.get("name", index)), str(one["type"])) for index, one in enumerate(inputs)]
    return tuple(pairs), False
