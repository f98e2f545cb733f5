"""Import the modules of a job's steps exactly as planned, apart from the modules of other jobs in this process.

A process lives longer than a job: a worker of a running cluster, a notebook. Each job has its own module objects, made
from the planned sources. Two jobs, or two versions of one file, never see each other's modules, even in two threads.
An ``import`` in a step's code finds the modules of its own job, at any time.

Lookups by name at run time (pickle, `importlib.import_module`) see the job that was loaded last.
"""

from __future__ import annotations

import builtins
import difflib
import os
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib import import_module, reload
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import decode_source, resolve_name, spec_from_file_location
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.common.code_search import OWN, find_module, is_pinned
from pipeline.common.digest import digest_bytes
from pipeline.common.imports import require_whole_imports
from pipeline.common.step_code import CodeFile, StepCode, code_digest, unique_files
from pipeline.common.travel import Reader, is_packed, load_packed, shown_name
from pipeline.errors import PipelineError, StepChanged, StepFailed

if TYPE_CHECKING:
    import pandas as pd

Function = Callable[["pd.DataFrame"], "pd.DataFrame"]
ReadArchived = Callable[[CodeFile], bytes | None]
"""Returns the source that the job keeps of a file, or None if it keeps none."""

MAX_CACHED = 4
"""Jobs whose modules a process keeps; a module may hold large tables."""

_lock = threading.RLock()
"""Held while modules are exchanged in ``sys.modules``, and while they are imported."""
_in_use = threading.RLock()
"""Held by `StepModules.in_use`: samples of several jobs run one after the other."""
_active: list[StepModules] = []
"""The modules that are in ``sys.modules`` now: those of one job, or of none."""
_cache: OrderedDict[tuple[Any, ...], StepModules] = OrderedDict()
_installed: dict[str, str] = {}
"""SHA-256 of installed modules at their import, and of native ones by path."""
_STARTED = time.time()


class StepModules:
    """The modules of one job's steps in this process."""

    def __init__(
        self,
        code: Sequence[StepCode],
        *,
        import_paths: Sequence[str] = (),
        archived: ReadArchived | None = None,
        sources: Mapping[str, bytes] | None = None,
        stored: Reader | None = None,
    ) -> None:
        """Prepare the modules; nothing is imported yet.

        :param import_paths: folders of the job, first on ``sys.path`` while its modules are active.
        :param archived: returns sources that the job keeps; given if the job may go on with them.
        :param sources: sources by SHA-256 that were read already.
        :param stored: returns the bytes of functions that travel by value, as the job keeps them.
        """
        self.import_paths = tuple(map(os.path.abspath, import_paths))
        self.modules: dict[str, ModuleType] = {}
        """Modules that were imported, by name."""
        self._code = {step.module: step for step in code}
        files = unique_files(code)
        self._files = {name: file for name, file in files.items() if self._is_own(file)}
        self._installed = {name: file for name, file in files.items() if name not in self._files}
        self._archived, self._sources = archived, dict(sources or {})
        self._stored = stored or (lambda sha256: None)
        self._packed: dict[str, Function] = {}
        self._namespaces = _namespaces(self._files)
        self._tops = {name.partition(".")[0] for name in self._files}
        self._finder = _Finder(self)
        self._builtins = {**vars(builtins), "__import__": self._import}
        self._displaced: dict[str, ModuleType] = {}
        self._before: set[str] = set()
        self._added_paths: list[str] = []

    def _is_own(self, file: CodeFile) -> bool:
        return is_pinned(file.path, self.import_paths) and file.module.partition(".")[0] != OWN

    def function(self, entrypoint: str) -> Function:
        """Import the function named ``module:function``; the attribute may be dotted.

        :raises StepFailed: if the module or the function does not exist, or raises anything while it is imported.
        :raises StepChanged: if the code is not the planned one.
        """
        if is_packed(entrypoint):
            return self._packed_function(entrypoint)
        name, _, attribute = entrypoint.partition(":")
        require_whole_imports()
        with self.activated():
            module = self._import_step(name, entrypoint)
            return _attribute(module, attribute, entrypoint)

    def _packed_function(self, entrypoint: str) -> Function:
        """Load a function that travels by value; what it imports are the modules of this job."""
        require_whole_imports()
        name = shown_name(entrypoint)
        with self.activated():
            if entrypoint not in self._packed:
                with importing(name):
                    function = load_packed(entrypoint, lambda sha256: self._sources.get(sha256) or self._stored(sha256))
                self._packed[entrypoint] = checked_function(function, name)
            return self._packed[entrypoint]

    def _import_step(self, name: str, entrypoint: str) -> ModuleType:
        with importing(entrypoint):
            if name in self._installed:
                return _import_installed(name, self._installed[name], self.import_paths)
            return import_module(name)

    @contextmanager
    def activated(self) -> Iterator[None]:
        """Make these the modules in ``sys.modules`` inside the block. Other threads wait."""
        with _lock:
            before = _current()
            _switch(self)
            try:
                yield
            finally:
                _switch(before)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep these modules in ``sys.modules`` while steps run on a sample; afterwards all is as before."""
        with _in_use:
            with _lock:
                before = _current()
                _switch(self)
            try:
                yield
            finally:
                with _lock:
                    if _current() is self:
                        _switch(before)

    def activate(self) -> None:
        """Keep these modules in ``sys.modules`` until another job's are activated."""
        with _lock:
            _switch(self)

    def owns(self, name: str) -> bool:
        """True if a name belongs to these modules."""
        return name in self._files or name in self._namespaces or name in self.modules

    def _enter(self) -> None:
        self._displaced = {name: sys.modules.pop(name) for name in list(sys.modules) if self._is_displaced(name)}
        sys.modules.update(self.modules)
        self._before = set(sys.modules)
        self._added_paths = [path for path in self.import_paths if path not in sys.path]
        sys.path[:0] = self._added_paths
        sys.meta_path.insert(0, self._finder)

    def _leave(self) -> None:
        for name in list(sys.modules):
            if self.owns(name) or (name not in self._before and self._is_new(name)):
                self.modules[name] = sys.modules.pop(name)
        sys.modules.update(self._displaced)
        self._displaced = {}
        for path in self._added_paths:
            if path in sys.path:
                sys.path.remove(path)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)

    def _is_displaced(self, name: str) -> bool:
        if name in self._namespaces:
            # A namespace that other distributions share stays.
            folders = getattr(sys.modules[name], "__path__", ())
            return all(is_pinned(os.path.join(folder, ""), self.import_paths) for folder in folders)
        return self.owns(name) or (name.partition(".")[0] in self._tops and self._is_new(name))

    def _is_new(self, name: str) -> bool:
        """True for a module of the job's folders."""
        file = getattr(sys.modules.get(name), "__file__", None)
        return isinstance(file, str) and name.partition(".")[0] != OWN and is_pinned(file, self.import_paths)

    def _import(
        self, name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] = (), level: int = 0
    ) -> Any:
        """Import for the code of these modules: ``import`` statements call this function."""
        ready = self._imported(name, globals or {}, fromlist or (), level)
        if ready is not None:
            return ready
        other = _current()
        top = name.partition(".")[0]
        is_foreign = not level and top not in self._tops and top in sys.modules
        if is_foreign and (other is None or other is self or not other.owns(top)):
            return builtins.__import__(name, globals, locals, fromlist, level)
        with self.activated():
            return builtins.__import__(name, globals, locals, fromlist, level)

    def _imported(self, name: str, context: Mapping[str, Any], fromlist: Sequence[str], level: int) -> Any:
        """Return the result of an import that needs nothing else; None if something has to be imported first."""
        if level:
            package = context.get("__package__") or ""
            name = resolve_name("." * level + name, package) if package else name
        module = self.modules.get(name)
        if module is None or getattr(module.__spec__, "_initializing", False):
            return None
        if any(item == "*" or not hasattr(module, item) for item in fromlist):
            return None
        return module if fromlist else self.modules.get(name.partition(".")[0])

    def spec_of(self, name: str) -> ModuleSpec | None:
        """Return the spec of one of these modules; None for any other."""
        file = self._files.get(name)
        if file is None:
            return None
        source, path = self._planned_source(file)
        if not file.is_source:
            _check_native(file, path)
            return spec_from_file_location(name, path)
        loader = _Loader(name, path, source, self)
        folders = [os.path.dirname(path)] if file.is_package else None
        return spec_from_file_location(name, path, loader=loader, submodule_search_locations=folders)

    def _planned_source(self, file: CodeFile) -> tuple[bytes, str]:
        """Return the planned content of a file, and its path on this machine.

        :raises StepChanged: if the file has another content here.
        :raises StepFailed: if the file is not here.
        """
        if file.sha256 in self._sources:
            return self._sources[file.sha256], file.path
        contents = [(path, data) for path in self._places(file) if (data := _read(path)) is not None]
        for path, data in contents:
            if digest_bytes(data) == file.sha256:
                return data, path
        archived = self._archived(file) if self._archived is not None else None
        if archived is not None:
            return archived, file.path
        if not contents:
            raise _missing(file)
        path, data = contents[0]
        raise self._changed(file, path, digest_bytes(data))

    def _places(self, file: CodeFile) -> Iterator[str]:
        yield file.path
        elsewhere = find_module(file.module, import_paths=self.import_paths)
        if elsewhere is not None and elsewhere.origin and elsewhere.origin != file.path:
            yield elsewhere.origin

    def _changed(self, file: CodeFile, path: str, digest: str) -> StepChanged:
        step = next((name for name, code in self._code.items() if file in code.files), file.module)
        can_pin = "" if self._archived is None else "; the job keeps no copy of it that could be used instead"
        return StepChanged(
            f"the code of step {step} changed since the job was planned",
            where=path,
            found=f"sha256 {digest[:12]} on {socket.gethostname()}{can_pin}",
            expected=f"sha256 {file.sha256[:12]}, as planned",
            next_step="put the planned file back and resume; or run the job spec as a new job",
        )

    def run_module(self, module: ModuleType, code: CodeType) -> None:
        """Run the code of a module that was just created."""
        module.__dict__["__builtins__"] = self._builtins
        self.modules[module.__name__] = module
        try:
            exec(code, module.__dict__)
        except BaseException:
            self.modules.pop(module.__name__, None)
            raise


def restore_modules() -> None:
    """Take the modules of jobs out of ``sys.modules``: a session of Python has its own there again."""
    with _lock:
        _switch(None)


class _Finder(MetaPathFinder):
    """Finds the modules of a job. It is on ``sys.meta_path`` only while they are active."""

    def __init__(self, modules: StepModules) -> None:
        self._modules = modules

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of one of the job's modules; None for any other."""
        return self._modules.spec_of(fullname)


class _Loader(SourceFileLoader):
    """Loads a module from its planned source, never from byte code of unknown age."""

    def __init__(self, name: str, path: str, source: bytes, modules: StepModules) -> None:
        super().__init__(name, path)
        self._source, self._modules = source, modules

    def get_code(self, fullname: str) -> CodeType:
        """Compile the planned source."""
        code: CodeType = compile(self._source, self.path, "exec", dont_inherit=True)
        return code

    def get_source(self, fullname: str) -> str:
        """Return the planned source."""
        return decode_source(self._source)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, with the imports of its job."""
        self._modules.run_module(module, self.get_code(module.__name__))


def _current() -> StepModules | None:
    return _active[0] if _active else None


def _switch(modules: StepModules | None) -> None:
    """Exchange the modules in ``sys.modules``; the lock is held."""
    current = _current()
    if current is modules:
        return
    if current is not None:
        current._leave()
    _active[:] = [] if modules is None else [modules]
    if modules is not None:
        modules._enter()


def _namespaces(files: Mapping[str, CodeFile]) -> dict[str, list[str]]:
    """Return the packages without a file above ``files``, with their folders."""
    folders: dict[str, list[str]] = {}
    for name, file in files.items():
        folder = os.path.dirname(os.path.dirname(file.path) if file.is_package else file.path)
        parent = name.rpartition(".")[0]
        while parent and parent not in files:
            folders.setdefault(parent, [])
            if folder not in folders[parent]:
                folders[parent].append(folder)
            folder, parent = os.path.dirname(folder), parent.rpartition(".")[0]
    return folders


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def _missing(file: CodeFile) -> StepFailed:
    return StepFailed(
        "the code of a step is not on this machine",
        where=file.path,
        found=f"no module {file.module} on {socket.gethostname()}",
        expected=f"the file that the job was planned with, sha256 {file.sha256[:12]}",
        next_step="put the folder of the job on storage that all workers have, or install the module on the workers",
    )


def _check_native(file: CodeFile, path: str) -> None:
    """Refuse native code that this process has loaded from another version of the file."""
    if _installed.setdefault(path, file.sha256) != file.sha256:
        raise StepChanged(
            f"the native module {file.module} changed while a process was using it",
            where=path,
            found=f"sha256 {_installed[path][:12]} in the process",
            expected=f"sha256 {file.sha256[:12]}, as planned",
            next_step="restart the workers, then resume",
        )


def _import_installed(name: str, planned: CodeFile, import_paths: Sequence[str]) -> ModuleType:
    """Import a step's module from outside of the job's folders, like any other module of the process.

    :raises StepChanged: if its file is another than planned.
    """
    spec = find_module(name, import_paths=import_paths)
    path = spec.origin if spec is not None and spec.origin else planned.path
    data = _read(path)
    if data is not None and digest_bytes(data) != planned.sha256:
        raise StepChanged(
            f"the code of step {name} is not the planned one",
            where=path,
            found=f"sha256 {digest_bytes(data)[:12]} on {socket.gethostname()}",
            expected=f"sha256 {planned.sha256[:12]}, as planned",
            next_step="install the same version for driver and workers, then run the job spec as a new job",
        )
    module = sys.modules.get(name)
    if module is None:
        module = import_module(name)
    elif _installed.get(name, planned.sha256) != planned.sha256 or (
        name not in _installed and os.path.exists(path) and os.stat(path).st_mtime > _STARTED
    ):
        module = reload(module)
    _installed[name] = planned.sha256
    return module


@contextmanager
def importing(entrypoint: str) -> Iterator[None]:
    """Turn whatever a module raises while it is imported, or its attributes, into `StepFailed`.

    Errors of this package and KeyboardInterrupt pass.
    """
    try:
        yield
    except (PipelineError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        raise StepFailed(
            "the module of a step ends the process when it is imported",
            where=entrypoint,
            found=f"SystemExit: {error}",
            expected="a module that defines functions",
            next_step='put its main part below: if __name__ == "__main__":',
        ) from error
    except BaseException as error:
        raise StepFailed(
            "the module of a step cannot be imported",
            where=entrypoint,
            found=f"{type(error).__name__}: {error}",
            next_step="run from the folder the module is in, or fix the import",
        ) from error


def _attribute(module: ModuleType, attribute: str, entrypoint: str) -> Function:
    try:
        with importing(entrypoint):
            function: Any = _lookup(module, attribute)
    except _NoAttribute as error:
        with importing(entrypoint):
            near = difflib.get_close_matches(attribute, dir(module), n=1)
        raise StepFailed(
            f"the module {module.__name__} has no function {attribute!r}",
            where=entrypoint,
            found=getattr(module, "__file__", None) or "",
            next_step=f"did you mean {module.__name__}:{near[0]}?" if near else "fix the name",
        ) from error
    return checked_function(function, entrypoint)


def checked_function(function: Any, entrypoint: str) -> Function:
    """Return ``function`` if it can be called with rows.

    :raises StepFailed: for another object, and for a class.
    """
    if not callable(function):
        raise StepFailed("a step is not a function", where=entrypoint, found=type(function).__name__)
    result: Function = function
    return result


class _NoAttribute(PipelineError):
    """A module or class lacks an attribute."""


def _lookup(module: ModuleType, attribute: str) -> Any:
    try:
        return reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        raise _NoAttribute(str(error)) from error


def modules_of(
    code: Sequence[StepCode],
    *,
    import_paths: Sequence[str],
    scope: str,
    archived: ReadArchived | None,
    stored: Reader | None = None,
) -> StepModules:
    """Return the modules of a job in this process; the last `MAX_CACHED` jobs are kept.

    :param scope: job that shares modules among its partitions, such as its directory.
    :param stored: see `StepModules`.
    """
    paths = tuple(file.path for file in unique_files(code).values())
    key = (scope, code_digest(code), paths, tuple(import_paths))
    with _lock:
        if key not in _cache:
            _cache[key] = StepModules(code, import_paths=import_paths, archived=archived, stored=stored)
        _cache.move_to_end(key)
        while len(_cache) > MAX_CACHED:
            _cache.popitem(last=False)
        return _cache[key]
