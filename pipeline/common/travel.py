"""Functions, instances and classes that travel by value: those of a notebook's cells, lambdas and closures.

What a worker can import travels by name, as ``module:function``. Anything else is pickled with its code, and travels as
``code:<sha256>/<name>``: a job keeps the bytes, and a process loads them only if they have this digest. The bytes hold
the version of Python, because code of one minor version does not run on another, and the source text, for people and
for tracebacks.
"""

from __future__ import annotations

import ast
import inspect
import io
import linecache
import os
import pickle
import pickletools
import re
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from pipeline.common.digest import digest_bytes
from pipeline.common.secrets import redact
from pipeline.common.units import format_bytes
from pipeline.errors import EnvMismatch, SpecError, StateCorrupt

PREFIX = "code:"
PATTERN = r"code:[0-9a-f]{64}/[A-Za-z_]\w*"
"""Form of the name of a value that travels by value."""
MAX_BYTES = 200 << 20
"""Largest value that travels; a larger one is refused."""
LARGE_BYTES = 10 << 20
"""Size from which on a plan names what makes a value large."""
SCHEMA_VERSION = 1
_PROTOCOL = 4
_SHOWN = 5
"""Most parts of a value that a message names."""

_known: dict[str, bytes] = {}
"""Values by SHA-256 that this process has packed, or read from a job."""
_lock = threading.Lock()


@dataclass(frozen=True)
class PackedValue:
    """A value that travels by value, as stored."""

    name: str
    """Name of the function or class."""
    python: str
    """Minor version of Python that can load it, such as ``3.11``."""
    source: str
    """Source text of the function or class; empty if unknown."""
    files: dict[str, str] = field(default_factory=dict, repr=False)
    """Text of the cells and files that its code is from, by the name in tracebacks."""
    uses: tuple[tuple[str, str, int], ...] = ()
    """Name, type and size in bytes of the values that it uses, the largest first."""
    modules: tuple[str, ...] = ()
    """Modules that it imports, by name."""
    origin: str = ""
    """File that defined it; empty for a cell."""
    data: bytes = field(default=b"", repr=False)

    def to_bytes(self) -> bytes:
        """Return the value for storage: a pickle of plain types, which `from_bytes` reads without running code."""
        return pickle.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, protocol=_PROTOCOL)

    @staticmethod
    def from_bytes(stored: bytes, *, sha256: str, where: str) -> PackedValue:
        """Inverse of `to_bytes`. Nothing of the value runs.

        :param sha256: digest that the bytes must have.
        :raises StateCorrupt: for other bytes.
        """
        if digest_bytes(stored) != sha256:
            raise StateCorrupt(
                "the stored function of a step is not the planned one",
                where=where,
                found=f"sha256 {digest_bytes(stored)[:12]}",
                expected=f"sha256 {sha256[:12]}",
                next_step="restore the file, or run the job again as a new job",
            )
        try:
            record = _PlainUnpickler(io.BytesIO(stored)).load()
            record.pop("schema_version")
            return PackedValue(**record)
        except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateCorrupt("the stored function of a step cannot be read", where=where, found=str(error)) from error

    def load(self, *, where: str) -> Any:
        """Return the value. Its code runs as far as loading it needs.

        :raises EnvMismatch: if it was packed by another minor version of Python.
        """
        if self.python != _python():
            raise EnvMismatch(
                f"{self.name} was stored by another version of Python",
                where=where,
                found=f"Python {_python()}",
                expected=f"Python {self.python}, whose code was stored with the job",
                next_step=f"run this process with Python {self.python}; or put the function into a module, and run a "
                "new job with module:function",
            )
        for name, text in self.files.items():
            # Without a time of modification, linecache keeps the lines: tracebacks show them.
            linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        return pickle.loads(self.data)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}, not only plain types")


def is_packed(entrypoint: str) -> bool:
    """True for the name of a value that travels by value."""
    return entrypoint.startswith(PREFIX) and re.fullmatch(PATTERN, entrypoint) is not None


def digest_of(entrypoint: str) -> str:
    """Return the SHA-256 in the name of a value that travels by value."""
    return entrypoint.removeprefix(PREFIX).partition("/")[0]


def shown_name(entrypoint: str) -> str:
    """Return the name of a step for messages: that of the function, if it travels by value."""
    return entrypoint.partition("/")[2] if is_packed(entrypoint) else entrypoint


def entrypoint_of(value: Any, *, what: str = "a step") -> str:
    """Return the name by which other processes load a function, an instance or a class.

    ``module:name`` if it can be imported, else ``code:<sha256>/<name>``; then its bytes are known in this process.

    :param what: kind of the value, for errors.
    :raises SpecError: for a value that cannot travel, or is too large.
    """
    return _importable_name(value) or pack(value, what=what)


def _importable_name(value: Any) -> str:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return ""
    found: Any = sys.modules.get(module)
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        return ""
    is_method = isinstance(value, (MethodType, BuiltinFunctionType))
    return f"{module}:{name}" if found is value and not is_method else ""


def pack(value: Any, *, what: str = "a step") -> str:
    """Pickle a value with its code. Return its name, ``code:<sha256>/<name>``.

    :raises SpecError: for a value that cannot travel, or is too large.
    """
    name, uses = name_of(value), _used_values(value)
    sizes = sorted(
        ((used, type(item).__name__, _size(item)) for used, item in uses.items()), key=lambda use: (-use[2], use[0])
    )
    if sum(size for _, _, size in sizes) > MAX_BYTES:
        raise _too_large(name, sum(size for _, _, size in sizes), sizes, what=what)
    source = _source(value)
    if redact(source) != source:
        raise SpecError(
            f"{what} from this session holds a secret: {name}",
            found="a password or key in its source text, which would be stored with the job",
            expected="a secret that is read where the function runs",
            next_step="read it inside of the function, as os.environ['NAME'] does",
        )
    try:
        packed = _Packer()
        data = packed.pack(value)
    except Exception as error:
        raise _cannot_travel(name, error, uses, what=what) from error
    if len(data) > MAX_BYTES:
        raise _too_large(name, len(data), sizes, what=what)
    stored = PackedValue(
        name=name,
        python=_python(),
        source=source,
        files=packed.files,
        uses=tuple(use for use in sizes if use[2] >= 1 << 10),
        modules=tuple(_modules(data, source)),
        origin=_origin(value),
        data=data,
    ).to_bytes()
    return f"{PREFIX}{remember(stored)}/{name}"


def remember(stored: bytes) -> str:
    """Keep a stored value in this process. Return its SHA-256."""
    sha256 = digest_bytes(stored)
    with _lock:
        _known[sha256] = stored
    return sha256


def known(sha256: str) -> bytes | None:
    """Return a stored value that this process has packed or read; None for others."""
    return _known.get(sha256)


def describe(entrypoint: str) -> str:
    """Return how a value travels, for the plan of a job: ``clean (by value, 1.2 KiB, sha256 3f9a1b2c)``."""
    if not is_packed(entrypoint):
        return entrypoint
    sha256 = digest_of(entrypoint)
    stored = known(sha256)
    if stored is None:
        return f"{shown_name(entrypoint)} (by value, sha256 {sha256[:8]})"
    text = f"{shown_name(entrypoint)} (by value, {format_bytes(len(stored))}, sha256 {sha256[:8]})"
    if len(stored) < LARGE_BYTES:
        return text
    value = PackedValue.from_bytes(stored, sha256=sha256, where=text)
    return f"{text}; it carries {_listed(value.uses)}"


def changed_since(entrypoint: str) -> str:
    """Return how the definition of a packed value in this process differs from the stored one; empty if it does not.

    Known are functions and classes of ``__main__``, and those whose file is still here.
    """
    stored = known(digest_of(entrypoint)) if is_packed(entrypoint) else None
    if stored is None:
        return ""
    value = PackedValue.from_bytes(stored, sha256=digest_of(entrypoint), where=entrypoint)
    if value.origin:
        text = _read(value.origin)
        if text is not None and text not in value.files.values():
            return f"{value.origin} has changed"
        return ""
    current = getattr(sys.modules.get("__main__"), value.name, None)
    if current is None or not value.source or not (source := _source(current)):
        return ""
    return "" if source == value.source else f"{value.name} is defined differently in this session"


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def name_of(value: Any) -> str:
    """Return a name for a function, an instance or a class: an identifier."""
    while (inner := getattr(value, "func", None)) is not None and callable(inner):  # functools.partial
        value = inner
    name = getattr(value, "__name__", None) or type(value).__name__
    text = re.sub(r"\W+", "_", str(name)).strip("_") or "function"
    return text if text[0].isalpha() or text[0] == "_" else f"f_{text}"


def _definition(value: Any) -> Any:
    """Return the function or class whose source text defines ``value``."""
    while (inner := getattr(value, "func", None)) is not None and callable(inner):
        value = inner
    if isinstance(value, MethodType):
        value = value.__func__
    return value if isinstance(value, (FunctionType, type)) else type(value)


def _source(value: Any) -> str:
    defined = _definition(value)
    try:
        return textwrap.dedent(inspect.getsource(defined))
    except (OSError, TypeError, IndentationError, SyntaxError):
        pass
    # A class of a cell has no file: its text is that of the cell that holds its methods.
    for method in vars(defined).values() if isinstance(defined, type) else ():
        if isinstance(method, FunctionType):
            text = "".join(linecache.getlines(method.__code__.co_filename))
            return _class_text(text, defined.__name__) or text
    return ""


def _class_text(text: str, name: str) -> str:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name]
    return ast.get_source_segment(text, nodes[-1]) or "" if nodes else ""


def _origin(value: Any) -> str:
    """Return the file of a function or class of a module; empty for a cell."""
    defined = _definition(value)
    module = sys.modules.get(getattr(defined, "__module__", ""))
    path = getattr(module, "__file__", None)
    return os.path.abspath(path) if path and getattr(module, "__name__", "") != "__main__" else ""


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError):
        return None


class _Packer:
    """Pickles values with code whose file names do not depend on this process, so that equal code has equal bytes."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        """Texts of the code, by the name that stands in the code."""

    def pack(self, value: Any) -> bytes:
        """Return the bytes of a value."""
        import cloudpickle
        from cloudpickle.cloudpickle import _code_reduce

        packer = self

        class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
            def reducer_override(self, obj: Any) -> Any:
                if isinstance(obj, CodeType):
                    name = packer.file_name(obj.co_filename)
                    make, arguments, *rest = _code_reduce(obj.replace(co_filename=name))
                    # Newer versions of cloudpickle leave the name out.
                    return (make, tuple(name if item == "<dynamic-code>" else item for item in arguments), *rest)
                return _untracked(super().reducer_override(obj))

        written = io.BytesIO()
        Pickler(written, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
        return written.getvalue()

    def file_name(self, path: str) -> str:
        """Return a name for a file or cell by its content, and keep its text."""
        text = "".join(linecache.getlines(path))
        if not text:
            return "<code>"
        stem = os.path.basename(path) if os.path.isfile(path) and "ipykernel" not in path else "cell"
        name = f"<{stem} {digest_bytes(text.encode())[:8]}>"
        self.files[name] = text
        return name


def _untracked(reduced: Any) -> Any:
    """Return how cloudpickle makes a class, without the id of the class in this process.

    With the id, loading the bytes here would change the class of the notebook, and its bytes would differ in each
    process.
    """
    if not isinstance(reduced, tuple) or not reduced[0].__name__.startswith("_make_skeleton_"):
        return reduced
    make, (*arguments, _, extra), *rest = reduced
    return (make, (*arguments, None, extra), *rest)


def _used_values(value: Any) -> dict[str, Any]:
    """Return the values that a function or class uses, by name: globals, closure cells, defaults and attributes."""
    found: dict[str, Any] = {}
    waiting, seen = [value], set[int]()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        for name, used in _references(item):
            if isinstance(used, (FunctionType, MethodType, type)) and not _importable_name(used):
                waiting.append(used)
            elif not isinstance(used, (ModuleType, FunctionType, BuiltinFunctionType, type)):
                found.setdefault(name, used)
    return found


def _references(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, MethodType):
        yield from _references(value.__func__)
        yield from _references(value.__self__)
    elif isinstance(value, FunctionType):
        yield from _globals_of(value.__code__, value.__globals__)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # empty
                continue
        yield from ((f"default {number}", item) for number, item in enumerate(value.__defaults__ or ()))
        yield from (value.__kwdefaults__ or {}).items()
    elif isinstance(value, type):
        for name, item in vars(value).items():
            function = getattr(item, "__func__", item)
            if isinstance(function, FunctionType) or not name.startswith("__"):
                yield f"{value.__name__}.{name}", function
    else:
        if (inner := getattr(value, "func", None)) is not None:
            yield "func", inner
            yield from ((f"argument {number}", item) for number, item in enumerate(getattr(value, "args", ())))
            yield from getattr(value, "keywords", {}).items()
        yield type(value).__name__, type(value)
        yield from ((f"self.{name}", item) for name, item in getattr(value, "__dict__", {}).items())


def _globals_of(code: CodeType, context: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name, context[name]) for name in code.co_names if name in context)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant, context)


def _size(value: Any) -> int:
    """Return the bytes of a value, as far as they are known without copying it."""
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    usage = getattr(value, "memory_usage", None)
    if callable(usage):
        try:
            return int(getattr(usage(), "sum", usage)())
        except Exception:
            return 0
    if isinstance(value, (bytes, bytearray, str)):
        return len(value)
    try:
        if isinstance(value, dict):
            return sum(map(_size, value.values())) + sys.getsizeof(value)
        if isinstance(value, (list, tuple, set, frozenset)) and len(value):
            first = next(iter(value))
            return sys.getsizeof(value) + len(value) * _size(first)
        return sys.getsizeof(value)
    except Exception:
        return 0


def _imported_modules(data: bytes) -> Iterator[str]:
    """Yield the names of the modules that a pickle imports when it is loaded.

    Names alone are no imports: functions that travel by value carry that of their own module.
    """
    memo: list[str | None] = []
    last: tuple[str | None, str | None] = (None, None)
    is_module = False
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("MEMOIZE", "PROTO", "FRAME"):
            if opcode.name == "MEMOIZE":
                memo.append(last[1])
            continue
        pushed = argument if isinstance(argument, str) else None
        if opcode.name in ("BINGET", "LONG_BINGET"):
            pushed = memo[int(argument or 0)]
        if opcode.name == "STACK_GLOBAL" and last[0]:
            yield last[0]
        if is_module and pushed:
            yield pushed
        is_module = opcode.name == "STACK_GLOBAL" and last[1] == "subimport"
        last = (last[1], pushed)


def _modules(data: bytes, source: str) -> list[str]:
    """Return the names of modules in a pickle and in import statements."""
    names = dict.fromkeys(name for name in _imported_modules(data) if name != "__main__")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return sorted(names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= dict.fromkeys(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names[node.module] = None
            names |= dict.fromkeys(f"{node.module}.{alias.name}" for alias in node.names if alias.name != "*")
    return sorted(names)


def _listed(uses: Any) -> str:
    shown = [f"{name} ({kind}, {format_bytes(size)})" for name, kind, size in uses[:_SHOWN]]
    return ", ".join(shown) or "values of unknown size"


def _too_large(name: str, size: int, uses: list[tuple[str, str, int]], *, what: str) -> SpecError:
    return SpecError(
        f"{what} from this session is too large to travel: {name}",
        found=f"{format_bytes(size)}, of which {_listed(uses)}",
        expected=f"at most {format_bytes(MAX_BYTES)} in all, which each worker reads",
        next_step="store the data in a file, and read it inside of the function; or join it to the source before",
    )


def _cannot_travel(name: str, error: Exception, uses: dict[str, Any], *, what: str) -> SpecError:
    culprits = [f"{used} ({type(item).__module__}.{type(item).__qualname__})" for used, item in _culprits(uses)]
    text = f"{type(error).__name__}: {error}".partition("\n")[0]
    return SpecError(
        f"{what} from this session cannot travel to workers: {name}",
        found=f"it uses {', '.join(culprits)}: {text}" if culprits else text,
        expected="values that can be pickled: no connections, locks, open files or clients",
        next_step="open it inside of the function; or put the function into a module beside the notebook, and name it "
        "as module:function",
    )


def _culprits(uses: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    import cloudpickle

    for name, item in uses.items():
        try:
            cloudpickle.dumps(item)
        except Exception:
            yield name, item


Reader = Callable[[str], bytes | None]
"""Returns the stored value of a SHA-256, or None."""


def load_packed(entrypoint: str, read: Reader) -> Any:
    """Return the value of a name ``code:<sha256>/<name>``.

    :param read: asked for bytes that this process does not know.
    :raises SpecError: if nobody has the bytes.
    :raises StateCorrupt: for bytes with another digest.
    :raises EnvMismatch: if another minor version of Python has stored them.
    """
    sha256 = digest_of(entrypoint)
    stored = known(sha256) or read(sha256)
    if stored is None:
        raise SpecError(
            f"the function {shown_name(entrypoint)} is not here",
            where=f"{PREFIX}{sha256[:12]}…",
            found="its name only: the function was defined in a notebook or a session of Python",
            expected="the directory of the job that was planned there, which keeps the function",
            next_step="resume or retry that job; or put the function into a module, and name it as module:function",
        )
    return PackedValue.from_bytes(stored, sha256=sha256, where=shown_name(entrypoint)).load(
        where=shown_name(entrypoint)
    )
