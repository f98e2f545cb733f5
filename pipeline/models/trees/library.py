"""The compiled kernels of the tree engine: the shared library of ``native/*.c``, through ctypes.

Calls release the GIL. The library needs no Python headers, so one build serves every version of Python. It has kernels
for several kinds of processors, such as ``x86-64-v3``, and this module selects the newest kind that this machine runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_FOLDER = Path(__file__).with_name("native")
_FILE = _FOLDER / "libtrees.so"
_REASON = _FOLDER / "not_built.txt"

NEXT_STEP = (
    "install a C compiler (gcc, clang, or ziglang from PyPI) and install this package again; a wheel needs no compiler"
)
"""Advice for a machine on which `unavailable` returns a reason."""

_CACHE_LINE = 64


class Forest(ctypes.Structure):
    """``forest`` of assemble.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("start", "left", "right", "test")),
        ("trees", ctypes.c_int64),
        ("scratch", ctypes.c_int64),
    )


class ProgramStruct(ctypes.Structure):
    """``program`` of program.h: pointers to the arrays of `pipeline.models.trees.program.Program`, then numbers."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *(
                    "column",
                    "is_category",
                    "reading",
                    "look_up",
                    "steps",
                    "size",
                    "first",
                    "slot",
                    "thresholds",
                    "heap",
                ),
                *("codes", "slots", "set_slots", "sets", "members", "operations", "operation_start", "planes"),
                *("leaves", "leaf", "stride", "bits", "outputs", "base"),
            )
        ),
        *((name, ctypes.c_int64) for name in ("rows_of_bits", "first_rank", "pairs", "octets", "outputs_count")),
    )


def unavailable() -> str:
    """Return the reason why this machine cannot run the tree engine; empty if it can."""
    if sys.byteorder != "little":
        return "a big-endian machine"
    try:
        _load()
    except OSError as error:
        return str(error)
    return ""


@functools.cache
def _load() -> ctypes.CDLL:
    """Load the library.

    :raises OSError: when the library is missing, does not load, or is not built from the sources beside it.
    """
    if not _FILE.exists():
        stored = _REASON.read_text("utf-8").strip() if _REASON.exists() else ""
        raise OSError(stored or f"the compiled library {_FILE.name} is missing: the package was not installed")
    library = ctypes.CDLL(str(_FILE))
    library.trees_kind.restype = library.trees_sources.restype = ctypes.c_char_p
    library.trees_memory.restype = ctypes.c_int64
    _check_sources(library)
    if not library.trees_can_run(0):
        raise OSError(f"this processor is older than {library.trees_kind(0).decode()}")
    return library


def _check_sources(library: ctypes.CDLL) -> None:
    """Refuse a library of other sources: a checkout may be newer than its library. A wheel has no sources."""
    sources = sorted(path for path in _FOLDER.iterdir() if path.suffix in {".c", ".h"})
    found = hashlib.sha256()
    for path in sources:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    if sources and found.hexdigest() != library.trees_sources().decode():
        raise OSError("the compiled library is older than its sources: python build_support/native.py builds it")


@functools.cache
def kinds() -> tuple[str, ...]:
    """Return the kinds of processors whose kernels this machine can run, the oldest first, such as ``x86-64-v3``."""
    library = _load()
    found: list[str] = []
    while (name := library.trees_kind(len(found))) and library.trees_can_run(len(found)):
        found.append(name.decode())
    return tuple(found)


def kind() -> str:
    """Return the kind of processor whose kernels score: the newest that this machine runs, unless `force` is used."""
    return _forced or kinds()[-1]


@contextmanager
def force(kind: str) -> Iterator[None]:
    """Score with the kernels of an older kind of processor, in all threads of this process. For tests."""
    global _forced  # noqa: PLW0603
    if kind not in kinds():
        raise ValueError(f"this machine has no kernels for {kind}, only for {', '.join(kinds())}")
    _forced = kind
    try:
        yield
    finally:
        _forced = ""


_forced = ""


def address(array: npt.NDArray[Any]) -> int:
    """Return the address of the first element."""
    return int(array.__array_interface__["data"][0])


def aligned(size: int) -> npt.NDArray[np.uint8]:
    """Return ``size`` bytes, not initialized, that start at a cache line: no row of bits spans two."""
    room = np.empty(size + _CACHE_LINE, np.uint8)
    skip = -address(room) % _CACHE_LINE
    return room[skip : skip + size]


def measure(forest: Forest, *, nodes: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return [T, 3] operations, bits and scratch rows of each tree, and [N] the number of each leaf, else -1."""
    sizes = np.zeros((forest.trees, 3), np.int64)
    numbers = np.full(nodes, -1, np.int32)
    _check(_load().trees_measure(ctypes.byref(forest), *_pointers(sizes, numbers)))
    return sizes, numbers


def assemble(
    forest: Forest, order: npt.NDArray[np.int64], *, operations: int, bits: int, nodes: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Return the operations of the trees in ``order``, and [trees, bits] the rows of bits of their leaf numbers."""
    code = np.empty((operations, 4), np.uint32)
    planes = np.zeros((len(order), bits), np.uint32)
    again = np.empty(nodes, np.int32)
    first, *others = _pointers(order, again, code, planes)
    _check(_load().trees_assemble(ctypes.byref(forest), first, ctypes.c_int64(len(order)), *others))
    return code, planes


def _check(has_worked: int) -> None:
    if not has_worked:
        raise MemoryError("the tree engine compiles a model")


def _pointers(*arrays: npt.NDArray[Any]) -> Sequence[ctypes.c_void_p]:
    return [ctypes.c_void_p(address(array)) for array in arrays]


def score(
    program: ProgramStruct,
    matrix: npt.NDArray[Any],
    strides: tuple[int, int],
    out: npt.NDArray[Any],
) -> None:
    """Write the margins of the rows of ``matrix`` to ``out`` [rows, outputs], in C order.

    :param matrix: first element and type of the values; element (row, column) is ``row * strides[0] + column *
        strides[1]`` values further.
    """
    library = _load()
    is_double = out.dtype == np.float64
    memory = aligned(library.trees_memory(ctypes.byref(program), is_double))
    library.trees_score(
        kinds().index(kind()),
        2 * (matrix.dtype == np.float64) + is_double,
        ctypes.byref(program),
        ctypes.c_void_p(address(matrix)),
        *map(ctypes.c_int64, (*strides, len(out))),
        *_pointers(out, memory),
    )


def transform(name: str, values: npt.NDArray[Any], *, parameters: Sequence[float] = ()) -> None:
    """Apply a function of transforms.c, such as ``sigmoid``, to [rows, outputs] margins in place, in C order."""
    shape = values.shape if name.startswith("softmax") else (values.size,)
    function = getattr(_load(), f"trees_{name}")
    function(
        *(getattr(_libm(), needed) for needed in _LIBM_FUNCTIONS[name]),
        ctypes.c_void_p(address(values)),
        *map(ctypes.c_int64, shape),
        *map(ctypes.c_double, parameters),
    )


_LIBM_FUNCTIONS = {
    "sigmoid": ("expf",),
    "exp": ("expf",),
    "exp64": ("exp",),
    "softmax": ("expf",),
    "logistic": ("exp",),
    "exp_double": ("exp",),
    "softplus": ("exp", "log1p"),
    "softmax_double": ("exp",),
}
"""Functions of the C library that each function of transforms.c takes."""


@functools.cache
def _libm() -> ctypes.CDLL:
    """Load glibc's mathematics: the functions that xgboost and LightGBM call."""
    return ctypes.CDLL("libm.so.6")
