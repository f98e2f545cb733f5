"""Imports in our own processes: without garbage collection, and without parts of a library that scoring never uses."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

_lock = threading.RLock()
_partial: set[str] = set()
"""Packages that were imported without a part."""
_may_leave_out = threading.Event()
_kept: dict[str, dict[str, ModuleType]] = {}
"""Modules of packages that were imported in part for processes forked from this one, by package."""


@contextmanager
def frozen_imports() -> Iterator[None]:
    """Disable garbage collection inside the block, and exclude all objects that exist at its end from later runs.

    Imports make hundreds of thousands of objects and hardly any garbage. The collector would visit all of them during
    the imports, later, and in each forked process, where a visit writes to their memory.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def allow_partial_imports() -> None:
    """Let `import_library` leave out parts in this process, which runs only code of this package."""
    _may_leave_out.set()


def import_library(name: str, *, without: Collection[str]) -> ModuleType:
    """Import the package ``name``; after `allow_partial_imports`, as if the packages of ``without`` were not installed.

    Nothing is left out if one of them, or ``name``, is imported already.

    :param without: packages that ``name`` imports if they are installed; empty: the process needs all packages whole.
    :raises ImportError: if the package cannot be imported.
    """
    if not without:
        require_whole_imports()
    with _lock:
        if not _may_leave_out.is_set() or not {name, *without}.isdisjoint(sys.modules):
            return import_module(name)
        _partial.add(name)
        if name in _kept:
            sys.modules.update(_kept.pop(name))
            return sys.modules[name]
        # None makes an import of that name fail.
        sys.modules.update(dict.fromkeys(without))  # type: ignore[arg-type]
        try:
            return import_module(name)
        finally:
            for missing in without:
                del sys.modules[missing]


def import_for_forks(name: str, *, without: Collection[str]) -> None:
    """Import the package ``name`` without the packages of ``without``, for `import_library` in processes forked later.

    In this process, and in a forked one that does not call `allow_partial_imports`, the package is not imported yet.

    :raises ImportError: if the package cannot be imported.
    """
    with _lock:
        if not {name, *without}.isdisjoint(sys.modules):
            return
        allow_partial_imports()
        try:
            import_library(name, without=without)
            _kept[name] = {module: sys.modules[module] for module in _modules_of({name})}
        finally:
            require_whole_imports()


def require_whole_imports() -> None:
    """Leave nothing out from now on: this process is about to run code of others, such as a step or a plugin.

    A package that was imported in part is imported again, whole, when it is imported next.
    """
    with _lock:
        _may_leave_out.clear()
        for name in _modules_of(_partial):
            del sys.modules[name]
        _partial.clear()


def _modules_of(packages: Collection[str]) -> list[str]:
    # A list first: other threads import meanwhile.
    return [name for name in list(sys.modules) if name.partition(".")[0] in packages] if packages else []
