"""Models of this process: each is read, verified and loaded once, whatever the number of its threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from time import perf_counter

from pipeline.models.flavors import find_flavor, read_model
from pipeline.models.model import ModelVersion, Predictor

MODELS = 4
"""How many models are kept; the one that was used longest ago goes first."""

_models: OrderedDict[str, Predictor] = OrderedDict()
_loading: dict[str, threading.Lock] = {}
_lock = threading.Lock()


def get_predictor(version: ModelVersion) -> tuple[Predictor, float]:
    """The predictor for ``version`` and the seconds this call spent to load it (0.0 when it was there).

    Threads that ask for one digest at a time wait for the first of them; other digests go on.

    :raises ModelDigestMismatch: when the file is not the one that was pinned.
    :raises ModelError: when it cannot be read.
    """
    with _lock:
        found = _find(version.digest)
        loading = _loading.setdefault(version.digest, threading.Lock())
    if found is not None:
        return found, 0.0
    with loading:
        with _lock:
            found = _find(version.digest)
        if found is not None:
            return found, 0.0
        start = perf_counter()
        predictor = find_flavor(version.flavor).load(version, read_model(version.uri))
        with _lock:
            _models[version.digest] = predictor
            while len(_models) > MODELS:
                _models.popitem(last=False)
        return predictor, perf_counter() - start


def _find(digest: str) -> Predictor | None:
    if digest in _models:
        _models.move_to_end(digest)
    return _models.get(digest)


def forget_models() -> None:
    """Drop every model of this process."""
    with _lock:
        _models.clear()
