"""Override ``dask.config`` for a block; blocks may overlap in any order, as those of jobs that run side by side.

``dask.config.set`` restores on leaving what it found on entering. Of two blocks that overlap, the first to enter is the
first to leave: the second then puts back the values of the first, for good.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dask.config

_MISSING = object()
_lock = threading.RLock()
_layers: list[Mapping[str, Any]] = []
"""Values of the blocks that are entered, in their order."""
_originals: dict[str, Any] = {}
"""Value that each key of ``_layers`` had before the first block."""


@contextmanager
def override_config(values: Mapping[str, Any]) -> Iterator[None]:
    """Set keys of ``dask.config`` for the block. The last block that was entered decides.

    After the block a key has the value of the last block still entered, or the original one. A value that somebody
    else has set since is left alone.
    """
    layer = dict(values)
    with _lock:
        for key in layer:
            if not any(key in other for other in _layers):
                _originals[key] = dask.config.get(key, _MISSING)
        _layers.append(layer)
        dask.config.set(layer)
    try:
        yield
    finally:
        with _lock:
            before = {key: _value(key) for key in layer}
            # By identity: two blocks may hold equal values.
            _layers[:] = [other for other in _layers if other is not layer]
            for key, value in before.items():
                if dask.config.get(key, _MISSING) == value:
                    _assign(key, _value(key))
                if not any(key in other for other in _layers):
                    del _originals[key]


def _value(key: str) -> Any:
    """Return the value that ``key`` is to have."""
    return next((layer[key] for layer in reversed(_layers) if key in layer), _originals[key])


def _assign(key: str, value: Any) -> None:
    if value is _MISSING:
        dask.config.pop(key, None)
    else:
        dask.config.set({key: value})
