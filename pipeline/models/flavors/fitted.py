"""Turn fitted models of libraries into the bytes of model files. Only to save one is a library imported."""

from __future__ import annotations

from typing import Any

from pipeline.errors import SpecError
from pipeline.models.flavors.library import import_or_explain


def fitted_bytes(model: Any) -> bytes:
    """Return the file of a fitted model.

    :raises SpecError: for an object that is not a model of a supported library.
    """
    if hasattr(model, "get_booster"):
        model = model.get_booster()
    if hasattr(model, "save_raw"):
        return bytes(model.save_raw(raw_format="ubj"))
    if type(model).__module__.partition(".")[0] == "lightgbm":
        # What its own predict uses: up to the best iteration.
        booster = model if hasattr(model, "model_to_string") else model.booster_
        return str(booster.model_to_string()).encode()
    if type(model).__module__.partition(".")[0] == "sklearn":
        skops: Any = import_or_explain("skops.io", library="skops", extra="sklearn", where=type(model).__name__)
        return bytes(skops.dumps(model))
    raise SpecError(
        "not a model of a supported kind",
        found=type(model).__name__,
        expected="the path of a model file, its bytes, or a fitted model of xgboost, LightGBM or scikit-learn",
    )
