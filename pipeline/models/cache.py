"""Cache the models of this process: its threads share one loaded copy of each model file."""

from __future__ import annotations

import threading
from collections import OrderedDict
from time import perf_counter

from pipeline.models.flavors import find_flavor, read_model
from pipeline.models.model import ModelVersion, Predictor

MODELS = 4
"""Maximum of models in memory; the least recently used model is dropped first."""

_models: OrderedDict[str, Predictor] = OrderedDict()
_loading: dict[str, threading.Lock] = {}
_lock = threading.Lock()


def get_predictor(version: ModelVersion) -> tuple[Predictor, float]:
    """Return the predictor for ``version`` and the seconds this call took to load it (0.0 from the cache).

    Threads that request the same digest wait for the first of them to load the model. Other digests do not wait.

    :raises ModelDigestMismatch: when the file differs from the pinned file.
    :raises ModelError: when the file cannot be read.
    """
    with _lock:
        predictor = _find_cached(version.digest)
        loading = _loading.setdefault(version.digest, threading.Lock())
    if predictor is not None:
        return predictor, 0.0
    with loading:
        with _lock:
            predictor = _find_cached(version.digest)
        if predictor is not None:
            return predictor, 0.0
        start = perf_counter()
        predictor = find_flavor(version.flavor).load(version, read_model(version.uri))
        with _lock:
            _models[version.digest] = predictor
            while len(_models) > MODELS:
                _models.popitem(last=False)
        return predictor, perf_counter() - start


def _find_cached(digest: str) -> Predictor | None:
    if digest in _models:
        _models.move_to_end(digest)
    return _models.get(digest)


def forget_models() -> None:
    """Drop every model of this process."""
    with _lock:
        _models.clear()
