"""Compute a filter's expression tree on a table, with Arrow kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.sources.filters.compare import COMPARE, comparable, compare, is_one_of
from pipeline.sources.filters.nodes import (
    Column,
    Compare,
    Compute,
    Constant,
    Every,
    IsIn,
    IsNan,
    IsNull,
    Node,
    Not,
    Some,
)

_COMPUTE: dict[str, Callable[..., Any]] = {
    "+": pc.add_checked,
    "-": pc.subtract_checked,
    "*": pc.multiply_checked,
    "/": pc.divide,
}


def evaluate(node: Node, table: pa.Table) -> Any:
    """Return the value of ``node`` for every row of ``table``: an Arrow array [rows], or one scalar for all rows.

    :raises pyarrow.ArrowException: if there is no kernel for the types, or an integer overflows.
    :raises SpecError: if a literal cannot take the type of its column.
    """
    return _EVALUATE[type(node)](node, table)


def _every(node: Every, table: pa.Table) -> Any:
    result = evaluate(node.parts[0], table)
    for part in node.parts[1:]:
        result = pc.and_kleene(result, evaluate(part, table))
    return result


def _some(node: Some, table: pa.Table) -> Any:
    result = evaluate(node.parts[0], table)
    for part in node.parts[1:]:
        result = pc.or_kleene(result, evaluate(part, table))
    return result


def _compare(node: Compare, table: pa.Table) -> Any:
    left = evaluate(node.left, table)
    if isinstance(node.right, Constant) and not isinstance(node.left, Constant):
        return compare(node.operator, left, node.right.value)
    left, right = _same_kind(left, evaluate(node.right, table))
    return COMPARE[node.operator](left, right)


def _same_kind(left: Any, right: Any) -> tuple[Any, Any]:
    """Cast integers to floats if the other side is float. Arrow itself refuses integers that floats cannot hold."""
    left, right = comparable(left), comparable(right)
    if pa.types.is_integer(left.type) and pa.types.is_floating(right.type):
        return pc.cast(left, pa.float64(), safe=False), right
    if pa.types.is_floating(left.type) and pa.types.is_integer(right.type):
        return left, pc.cast(right, pa.float64(), safe=False)
    return left, right


def _compute(node: Compute, table: pa.Table) -> Any:
    left, right = _same_kind(evaluate(node.left, table), evaluate(node.right, table))
    if node.operator == "/":
        # Python's division, so that 1 / 2 is 0.5. Division by zero gives infinity, like with floats, not an error.
        left, right = (pc.cast(side, pa.float64(), safe=False) for side in (left, right))
    return _COMPUTE[node.operator](left, right)


_EVALUATE: dict[type, Callable[..., Any]] = {
    Column: lambda node, table: table.column(node.name),
    Constant: lambda node, table: pa.scalar(node.value),
    Compute: _compute,
    Compare: _compare,
    IsIn: lambda node, table: is_one_of(evaluate(node.operand, table), node.values),
    IsNull: lambda node, table: pc.is_null(evaluate(node.operand, table)),
    IsNan: lambda node, table: pc.is_nan(comparable(evaluate(node.operand, table))),
    Not: lambda node, table: pc.invert(evaluate(node.operand, table)),
    Every: _every,
    Some: _some,
}
