"""Cache the models of this process: its threads share one loaded copy of each model file."""

from __future__ import annotations

import threading
from collections import OrderedDict
from time import perf_counter

from pipeline.models.flavors import find_flavor
from pipeline.models.model import ModelVersion, Predictor
from pipeline.models.node_cache import read_version

MODELS = 4
"""Maximum of models in memory; the least recently used model is dropped first."""

_models: OrderedDict[tuple[object, ...], Predictor] = OrderedDict()
_loading: dict[tuple[object, ...], threading.Lock] = {}
_lock = threading.Lock()


def get_predictor(version: ModelVersion) -> tuple[Predictor, float]:
    """Return the predictor for ``version`` and the seconds this call took to load it (0.0 from the cache).

    Threads that request the same version wait for the first of them to load the model. Other versions do not wait.
    The digest is checked before anything is parsed: a child process of the driver has loaded the same bytes.

    :raises ModelDigestMismatch: when the file differs from the pinned file.
    :raises ModelError: when the file cannot be read.
    """
    with _lock:
        predictor = _find_cached(version)
        loading = _loading.setdefault(version.key, threading.Lock())
    if predictor is not None:
        return predictor, 0.0
    with loading:
        with _lock:
            predictor = _find_cached(version)
        if predictor is not None:
            return predictor, 0.0
        start = perf_counter()
        predictor = find_flavor(version.flavor).load(version, read_version(version))
        with _lock:
            _models[version.key] = predictor
            while len(_models) > MODELS:
                _models.popitem(last=False)
        return predictor, perf_counter() - start


def _find_cached(version: ModelVersion) -> Predictor | None:
    if version.key in _models:
        _models.move_to_end(version.key)
    return _models.get(version.key)


def forget_models() -> None:
    """Drop every model of this process."""
    with _lock:
        _models.clear()
