"""``TreeEngine``: margins and outputs of a tree ensemble, from its tables."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from pipeline.errors import BadPrediction, ModelError
from pipeline.models.trees import library
from pipeline.models.trees.library import NEXT_STEP, ProgramStruct, unavailable
from pipeline.models.trees.program import Program, build_program
from pipeline.models.trees.tables import Floats, TreeTables, unsupported

Transform = Callable[[Any], Any]
"""Function of margins, in C order, that returns outputs. It may change the margins, and can be pickled."""

TRANSFORMS = ("identity", "sigmoid", "exp", "exp64", "softmax", "argmax", "hinge")
"""Names of xgboost's transformations, which ``TreeEngine.predict`` applies to float32 margins."""

_BLOCK = 512
"""Rows that the kernels score together (``ROWS`` of ``native/program.h``)."""


def kernel_name() -> str:
    """Return the name of the kernels for reports, such as ``x86-64-v3``; empty if there are none."""
    return "" if unavailable() else library.kind()


def apply_transform(name: str, margins: Floats) -> Floats:
    """Return xgboost's outputs for float32 margins, with the bits that xgboost computes on the CPU.

    :param name: one of `TRANSFORMS`.
    :param margins: [rows] or [rows, outputs] in C order; it may be changed.
    :returns: the shape of ``margins``; for ``argmax``, [rows] class numbers.
    :raises OSError: when the compiled library is missing, except for identity, hinge and argmax.
    """
    if name == "identity":
        return margins
    if name == "hinge":
        return (margins > 0).astype(np.float32)
    if name == "argmax":
        classes: Floats = margins.reshape(len(margins), -1).argmax(axis=1).astype(np.float32)
        return classes
    library.transform(name, margins.reshape(len(margins), -1))
    return margins


class TreeEngine:
    """Scores rows with an ensemble of trees. Threads may share an engine. Pickling stores the tables only."""

    def __init__(self, tables: TreeTables, *, transform: str | Transform = "identity") -> None:
        reasons = list(unsupported(tables))
        if isinstance(transform, str) and transform not in TRANSFORMS:
            reasons.append(f"the transformation {transform}")
        if reasons:
            raise ModelError(
                "the tree engine cannot score this model",
                found="; ".join(reasons),
                next_step="score it with the library that trained it",
            )
        self.tables = tables
        self.transform = transform
        self._lock = threading.Lock()
        self._program: tuple[ProgramStruct, Program] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"tables": self.tables, "transform": self.transform}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tables"], transform=state["transform"])  # type: ignore[misc]

    def prepare(self) -> None:
        """Load the kernels and compile the tables before the first score."""
        row: npt.NDArray[Any] = np.zeros((1, self.tables.n_features), self.tables.value_type)
        self.margin(row)

    def margin(self, matrix: Floats, *, out: Floats | None = None, threads: int = 1) -> Floats:
        """Return the margins: [rows], or [rows, outputs] of a model with several outputs, of the tables' ``sum_type``.

        Releases the GIL.

        :param matrix: [rows, features] of the tables' ``value_type``, missing values as NaN, category codes as numbers.
            C order, Fortran order, or some rows of such a matrix; any other layout is copied.
        :param out: array for the result, in C order.
        """
        flat, strides, rows = self._lay_out(matrix)
        dtype = np.dtype(self.tables.sum_type)
        shape = (rows,) if self.tables.outputs == 1 else (rows, self.tables.outputs)
        if out is None:
            out = np.empty(shape, dtype)
        elif out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise _contract("out", out, expected=f"{dtype} in C order of the shape {shape}")
        target = out.reshape(rows, self.tables.outputs)
        program = self._ready()
        bounds = _cut(rows, threads=threads)

        def run(begin: int, end: int) -> None:
            library.score(program, flat[begin * strides[0] :], strides, target[begin:end])

        if len(bounds) == 1:
            run(*bounds[0])
        else:
            with ThreadPoolExecutor(len(bounds)) as pool:
                list(pool.map(run, *zip(*bounds, strict=True)))
        return out

    def predict(self, matrix: Floats, *, threads: int = 1) -> Floats:
        """Return the outputs: margins with the transformation applied; for ``argmax``, [rows] class numbers."""
        margins = self.margin(matrix, threads=threads)
        if not isinstance(self.transform, str):
            outputs: Floats = self.transform(margins)
            return outputs
        return apply_transform(self.transform, margins)

    def _ready(self) -> ProgramStruct:
        reason = unavailable()
        if reason:
            raise ModelError("the tree engine is not available", found=reason, next_step=NEXT_STEP)
        with self._lock:
            if self._program is None:
                program = build_program(self.tables)
                self._program = program.to_struct(), program
            return self._program[0]

    def _lay_out(self, matrix: Floats) -> tuple[npt.NDArray[Any], tuple[int, int], int]:
        """Return the matrix as a flat array, its strides in elements, and its rows."""
        dtype = np.dtype(self.tables.value_type)
        if matrix.ndim != 2 or matrix.shape[1] != self.tables.n_features or matrix.dtype != dtype:
            raise _contract("the matrix", matrix, expected=f"{dtype} [rows, {self.tables.n_features}]")
        rows, columns = matrix.shape
        step, lead = (stride // matrix.itemsize for stride in matrix.strides)
        if step == 1 < lead and matrix.strides == (matrix.itemsize, lead * matrix.itemsize):
            # End at the last value, not after a whole column: the matrix may be the last rows of another matrix.
            flat = as_strided(matrix, ((columns - 1) * lead + rows,), (matrix.itemsize,))
            return flat, (1, lead), rows
        return np.ascontiguousarray(matrix).reshape(-1), (columns, 1), rows


def _contract(name: str, array: npt.NDArray[Any], *, expected: str) -> BadPrediction:
    return BadPrediction(
        f"the tree engine cannot use {name} as it is",
        found=f"{array.dtype} of the shape {array.shape}",
        expected=expected,
        next_step="convert it before the call",
    )


def _cut(rows: int, *, threads: int) -> list[tuple[int, int]]:
    """Cut rows into at most ``threads`` runs of whole blocks."""
    blocks = -(-rows // _BLOCK)
    runs = max(1, min(threads, blocks))
    edges = [min(rows, _BLOCK * (blocks * i // runs)) for i in range(runs + 1)]
    return list(itertools.pairwise(edges))
