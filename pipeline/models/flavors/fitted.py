"""Turn fitted models of libraries into the bytes of model files. Only to save one is a library imported."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from inspect import isfunction
from pathlib import Path
from typing import Any

from pipeline.common.code_search import find_code
from pipeline.common.step_code import FoundCode
from pipeline.errors import SpecError
from pipeline.models.flavors.library import import_or_explain
from pipeline.models.flavors.python_archive import archive_of


def fitted_bytes(model: Any, *, import_paths: Sequence[str] = ()) -> bytes:
    """Return the file of a fitted model, or the archive of an object with ``predict`` and declared ``features``.

    :param import_paths: folders whose modules travel with such an object.
    :raises SpecError: for an object that is not a model of a supported library, and declares no features.
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
    if type(model).__module__.partition(".")[0] == "catboost":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.cbm"
            model.save_model(str(path), format="cbm")
            return path.read_bytes()
    if hasattr(model, "SerializeToString") and hasattr(model, "graph"):
        return bytes(model.SerializeToString())
    if callable(getattr(model, "predict", model)) and hasattr(model, "features"):
        return _object_bytes(model, import_paths)
    raise SpecError(
        "not a model of a supported kind",
        found=type(model).__name__,
        expected="the path of a model file, its bytes, a fitted model of xgboost, LightGBM, scikit-learn or CatBoost, "
        "an ONNX model, or an object with predict(frame) and the attribute features",
        next_step="declare its features: a list of names, or {name: kind}",
    )


def _object_bytes(model: Any, import_paths: Sequence[str]) -> bytes:
    """Return the archive of an object: pickled, with the sources of its module where that is in ``import_paths``."""
    import cloudpickle

    kind = model if isfunction(model) else type(model)
    module = str(kind.__module__)
    code = FoundCode() if module == "__main__" else find_code([module], import_paths=import_paths)
    entrypoint = "" if module == "__main__" else f"{module}:{kind.__qualname__}"
    try:
        pickled = cloudpickle.dumps(model)
    except Exception as error:
        raise SpecError(
            "the model cannot be pickled",
            found=f"{type(error).__name__}: {error}"[:300],
            expected="an object that cloudpickle takes",
            next_step="write a class with load(files), and name it: model: module:Class",
        ) from error
    return archive_of(entrypoint, code, import_paths=import_paths, pickled=pickled).to_bytes()
