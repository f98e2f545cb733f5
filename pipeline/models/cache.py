"""Cache the models of this process: its threads share one loaded copy of each model file.

The cache is limited by bytes: a share of the worker's memory. The models of the job at work, which the plan has counted
in full, are kept whatever they take; of the others, those used longest ago are dropped first.
"""

from __future__ import annotations

import atexit
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter

from pipeline.models.flavors import find_flavor
from pipeline.models.folders import open_folder
from pipeline.models.model import ModelData, ModelVersion, Predictor
from pipeline.models.node_cache import read_version
from pipeline.models.process import process_facts

MODEL_SHARE = 0.2
"""Share of a worker's memory limit for models in the cache."""
UNLIMITED_BYTES = 1 << 30
"""Bytes for models in a process without a memory limit."""
LOADED_FACTOR = 10
"""Bytes of a loaded model / bytes of its file, where its flavor says nothing else; an upper bound."""

ModelKey = tuple[object, ...]
"""`ModelVersion.key`."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    predictor: Predictor
    nbytes: int
    """Estimated bytes in memory."""


_models: OrderedDict[ModelKey, _Loaded] = OrderedDict()
_loading: dict[ModelKey, threading.Lock] = {}
_lock = threading.Lock()
_kept: set[ModelKey] = set()
_on_drop: list[Callable[[ModelKey], None]] = []


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
        flavor = find_flavor(version.flavor)
        data = _read(version) if flavor.has_file else b""
        predictor = flavor.load(version, data)
        factor = LOADED_FACTOR if flavor.loaded_factor is None else flavor.loaded_factor(data)
        with _lock:
            _models[version.key] = _Loaded(predictor, factor * version.nbytes)
            dropped = _evict(newest=version.key)
        _forget(dropped)
        return predictor, perf_counter() - start


def _read(version: ModelVersion) -> ModelData:
    return open_folder(version) if version.files else read_version(version)


def keep_models(versions: Iterable[ModelVersion]) -> None:
    """Keep the models of ``versions`` from now on, whatever they take, in place of those of the last call."""
    with _lock:
        _kept.clear()
        _kept.update(version.key for version in versions)


def is_cached(version: ModelVersion) -> bool:
    """Return True if the model of ``version`` is in memory."""
    with _lock:
        return version.key in _models


def limit_bytes(memory: int | None = None) -> int:
    """Return the bytes that models may take which no job has to keep.

    :param memory: memory limit of a worker, 0 if it has none. Default: that of this process.
    """
    memory = process_facts().memory if memory is None else memory
    return int(MODEL_SHARE * memory) if memory > 0 else UNLIMITED_BYTES


def on_drop(forget: Callable[[ModelKey], None]) -> None:
    """Call ``forget`` with the key of each model that is dropped from now on."""
    _on_drop.append(forget)


def forget_models() -> None:
    """Drop every model of this process."""
    with _lock:
        dropped = list(_models)
        _models.clear()
        _kept.clear()
    _forget(dropped)


# A booster that outlives the functions of its library is an "Exception ignored in Booster.__del__".
atexit.register(forget_models)


def _find_cached(version: ModelVersion) -> Predictor | None:
    if version.key not in _models:
        return None
    _models.move_to_end(version.key)
    return _models[version.key].predictor


def _evict(*, newest: ModelKey) -> list[ModelKey]:
    """Drop models used longest ago while all together take too much; return their keys."""
    limit, total = limit_bytes(), sum(loaded.nbytes for loaded in _models.values())
    dropped = []
    for key in [key for key in _models if key != newest and key not in _kept]:
        if total <= limit:
            break
        total -= _models.pop(key).nbytes
        dropped.append(key)
    return dropped


def _forget(dropped: Iterable[ModelKey]) -> None:
    for key in dropped:
        for forget in _on_drop:
            forget(key)
