"""Model formats: which one a file is in, and how it is inspected and loaded.

A flavor has two functions. ``inspect`` runs once, on the driver, and says what the model is; ``load`` runs once in each
worker process and gives the `pipeline.models.model.Predictor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from pipeline.common.plugins import find_adapter
from pipeline.models.flavors.detect import detect, detect_bytes, read_model
from pipeline.models.model import ModelVersion, Predict, Predictor
from pipeline.spec.model_ref import OutputKind

__all__ = ["BUILT_IN", "Flavor", "detect", "detect_bytes", "find_flavor", "read_model"]

BUILT_IN = {"xgboost": "pipeline.models.flavors.xgboost:FLAVOR"}
"""``module:attribute`` of the `Flavor` per name."""


@dataclass(frozen=True)
class Flavor:
    """How one model format is used."""

    name: str
    inspect: Callable[..., ModelVersion]
    """``inspect(uri, data, *, name=None)``: what the model file at ``uri``, with the bytes ``data``, is."""
    load: Callable[..., Predictor]
    """``load(version, data)``: the predictor, from the bytes of the file, after their digest was verified."""
    libraries: tuple[str, ...] = ()
    """Modules that ``load`` imports; workers import them while they start."""
    tree_engine_blockers: Callable[[ModelVersion, OutputKind], tuple[str, ...]] | None = None
    """``tree_engine_blockers(version, kind)``: why the tree engine cannot give that output, by name. None: it never
    can."""
    trees: Callable[[Any, OutputKind], Predict] | None = None
    """``trees(predictor, kind)``: the function that does with the tree engine what the predictor's ``predict`` does."""


def find_flavor(name: str) -> Flavor:
    """The flavor called ``name``.

    :raises SpecError: when there is none.
    """
    return cast(Flavor, find_adapter(name, kind="flavor", built_in=BUILT_IN))
