"""Typed version of numba's decorator, and the C library's functions for compiled code."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_numba: Any = importlib.import_module("numba")


def compiled(function: Function) -> Function:
    """Compile a function on its first call, to run without the GIL. Other processes load the result from disk.

    If no directory can be written, each process compiles the function.
    """
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy", "fastmath": False}
    try:
        kernel: Function = _numba.njit(cache=True, **options)(function)
    except RuntimeError:
        kernel = _numba.njit(cache=False, **options)(function)
    return kernel


def external(name: str, *, kind: str) -> Any:
    """Return a C library function of one number, ``kind`` float32 or float64, for use in compiled code."""
    number = getattr(_numba.types, kind)
    return _numba.types.ExternalFunction(name, number(number))
