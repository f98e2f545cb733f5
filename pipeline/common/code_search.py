"""Find the code of a job's steps: the files of their modules, and of all modules that those import from its folders.

Imports are read from the source, wherever they stand in it; nothing is imported. A name that is computed at run time
is not seen. Modules of Python, of installed packages and of this package are not followed.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import invalidate_caches
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import resolve_name
from typing import Any

from pipeline.common.digest import digest_bytes
from pipeline.common.step_code import CodeFile, FoundCode, StepCode
from pipeline.common.syntax import parse_module
from pipeline.common.travel import PackedValue, digest_of, is_packed, known

INSTALLED = {"site-packages", "dist-packages"}
"""Folders of installed packages, which change with the environment, not with the job."""
OWN = __name__.partition(".")[0]


def module_of(entrypoint: str) -> str:
    """Return the module of ``module:function``; for a function that travels by value its whole name."""
    return entrypoint if is_packed(entrypoint) else entrypoint.partition(":")[0]


def find_code(entrypoints: Iterable[str], *, import_paths: Sequence[str] = ()) -> FoundCode:
    """Return the code of the modules of ``entrypoints``.

    A step module outside of ``import_paths`` counts with its own file only. A module that does not exist has no files;
    its import explains that. A function that travels by value counts with its stored bytes, and the modules it imports.

    :param import_paths: folders that are searched before ``sys.path``; imports are followed inside them.
    """
    invalidate_caches()
    search = _Search(tuple(os.path.abspath(path) for path in import_paths))
    modules = dict.fromkeys(map(module_of, entrypoints))
    steps = tuple(StepCode(name, search.closure(name)) for name in modules)
    return FoundCode(steps, search.sources)


def find_module(name: str, *, import_paths: Sequence[str]) -> ModuleSpec | None:
    """Return the spec of a module without importing it or its packages; None if there is no such module."""
    path: Sequence[str] | None = [*import_paths, *(folder or os.getcwd() for folder in sys.path)]
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        try:
            spec = PathFinder.find_spec(".".join(parts[:depth]), path)
        except (ImportError, OSError, ValueError):
            return None
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def is_pinned(path: str, import_paths: Sequence[str]) -> bool:
    """True if a file is code of the job: below one of its folders, and not of an installed package."""
    below = any(path.startswith(os.path.join(folder, "")) for folder in import_paths)
    return below and not INSTALLED & set(path.split(os.sep))


@dataclass
class _Search:
    """A search over the files of some steps, each read once."""

    import_paths: tuple[str, ...]
    sources: dict[str, bytes] = field(default_factory=dict)
    _files: dict[str, CodeFile | None] = field(default_factory=dict)
    """File of each module that was looked at; None for a module that is not followed."""
    _imports: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def closure(self, module: str) -> tuple[CodeFile, ...]:
        """Return the file of ``module`` and those of all modules that it imports, directly or not."""
        if is_packed(module):
            return self._closure_of_packed(module)
        return self._closure(module, _with_packages(module))

    def _closure_of_packed(self, entrypoint: str) -> tuple[CodeFile, ...]:
        sha256 = digest_of(entrypoint)
        stored = known(sha256)
        if stored is None:
            return ()
        self.sources[sha256] = stored
        file = CodeFile(entrypoint, f"{sha256}.pickle", len(stored), sha256)
        value = PackedValue.from_bytes(stored, sha256=sha256, where=entrypoint)
        names = (name for module in value.modules for name in _with_packages(module))
        return (file, *self._closure("", names))

    def _closure(self, module: str, names: Iterable[str]) -> tuple[CodeFile, ...]:
        files: dict[str, CodeFile] = {}
        seen: set[str] = set()
        waiting = [*names]
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            file = self._file(name, is_step=name == module)
            if file is not None:
                files[name] = file
                waiting.extend(self._imports.get(name, ()))
        return tuple(files[name] for name in sorted(files))

    def _file(self, name: str, *, is_step: bool) -> CodeFile | None:
        if name not in self._files or (is_step and self._files[name] is None):
            self._files[name] = self._read(name, is_step=is_step)
        return self._files[name]

    def _read(self, name: str, *, is_step: bool) -> CodeFile | None:
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or (top == OWN and not is_step):
            return None
        spec = find_module(name, import_paths=self.import_paths)
        if spec is None or not spec.has_location or not spec.origin:
            return None
        path = os.path.abspath(spec.origin)
        is_followed = is_pinned(path, self.import_paths) and top != OWN
        if not (is_followed or is_step):
            return None
        try:
            data = _content(spec, path)
        except OSError:
            return None
        file = CodeFile(name, path, len(data), digest_bytes(data))
        if file.is_source:
            self.sources[file.sha256] = data
            if is_followed:
                package = name if file.is_package else name.rpartition(".")[0]
                self._imports[name] = tuple(dict.fromkeys(_imported(data, package=package)))
        return file


def _content(spec: ModuleSpec, path: str) -> bytes:
    loader: Any = spec.loader
    if os.path.exists(path) or not hasattr(loader, "get_data"):
        with open(path, "rb") as file:
            return file.read()
    content: bytes = loader.get_data(path)  # inside a zip archive
    return content


def _with_packages(name: str) -> Iterator[str]:
    """Yield ``a``, ``a.b``, ``a.b.c`` for ``a.b.c``."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        yield ".".join(parts[:depth])


def _imported(source: bytes, *, package: str) -> Iterator[str]:
    """Yield the modules that a source may import. Some of them may be attributes, or not exist."""
    try:
        tree = parse_module(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # the import explains it
    for node in ast.walk(tree):
        for name in _names(node, package):
            yield from _with_packages(name)


def _names(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute("." * node.level + (node.module or ""), package)
        if base:
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        name = node.args[0].value
        if called in ("import_module", "__import__") and isinstance(name, str):
            absolute = _absolute(name, package)
            if absolute.replace(".", "").isidentifier():
                yield absolute


def _absolute(name: str, package: str) -> str:
    """Return an absolute name; empty for a relative import beyond the top."""
    try:
        return resolve_name(name, package) if name.startswith(".") else name
    except ImportError:
        return ""
