"""Load the user's map steps by name."""

from __future__ import annotations

import difflib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib import import_module, invalidate_caches, reload
from typing import cast

import pandas as pd

from pipeline.errors import StepFailed
from pipeline.plan.recipe import MapRecipe

_IMPORTED: dict[str, tuple[int, int]] = {}
"""Modification time and size of each step module's file at its import in this process."""
_RELOADING = threading.Lock()

Function = Callable[[pd.DataFrame], pd.DataFrame]


@dataclass(frozen=True)
class Step:
    """A map step with its function."""

    entrypoint: str
    function: Function
    dtype_backend: str = "numpy"


def load_steps(
    maps: Sequence[MapRecipe], *, import_paths: Sequence[str] = (), reload_changed: bool = False
) -> tuple[Step, ...]:
    """Import the steps of a recipe.

    :param reload_changed: reload modules whose files changed since this process imported them.
    """
    if reload_changed:
        for name in dict.fromkeys(step.entrypoint.partition(":")[0] for step in maps):
            _reload_if_changed(name)
    return tuple(
        Step(step.entrypoint, load_function(step.entrypoint, import_paths=import_paths), step.dtype_backend)
        for step in maps
    )


def _reload_if_changed(name: str) -> None:
    """Reload a module whose file changed since its import, or that other code imported."""
    with _RELOADING:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if module is None or file is None or not os.path.exists(file) or _IMPORTED.get(name) == _file_version(file):
            return
        try:
            invalidate_caches()
            reload(module)
        except Exception as error:
            raise StepFailed(
                "the module of a step cannot be imported",
                where=name,
                found=f"{type(error).__name__}: {error}",
                next_step="fix the module",
            ) from error
        _IMPORTED[name] = _file_version(file)


def _file_version(file: str) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_mtime_ns, status.st_size


def load_function(entrypoint: str, *, import_paths: Sequence[str] = ()) -> Function:
    """Import the function named ``module:function``; the attribute may be dotted.

    :param import_paths: folders to add to ``sys.path`` for good, since the module may import others later.
    :raises StepFailed: if the module or the function does not exist.
    """
    for path in reversed(import_paths):
        if path not in sys.path:
            sys.path.insert(0, path)
    name, _, attribute = entrypoint.partition(":")
    try:
        is_new = name not in sys.modules
        module = import_module(name)
        if is_new and (file := getattr(module, "__file__", None)):
            _IMPORTED[name] = _file_version(file)
    except Exception as error:
        raise StepFailed(
            "the module of a step cannot be imported",
            where=entrypoint,
            found=f"{type(error).__name__}: {error}",
            next_step="run from the folder the module is in, or fix the import",
        ) from error
    try:
        function = reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        raise StepFailed(
            f"the module {name} has no function {attribute!r}",
            where=entrypoint,
            found=getattr(module, "__file__", None) or "",
            next_step=f"did you mean {name}:{near[0]}?" if near else "fix the name",
        ) from error
    if not callable(function):
        raise StepFailed("a step is not a function", where=entrypoint, found=type(function).__name__)
    return cast(Function, function)


@contextmanager
def prepended_sys_path(folders: Sequence[str]) -> Iterator[None]:
    """Put ``folders`` first on ``sys.path`` inside the block."""
    before = list(sys.path)
    sys.path[:0] = [folder for folder in folders if folder not in before]
    try:
        yield
    finally:
        sys.path[:] = before
