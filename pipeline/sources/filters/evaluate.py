"""Compute a filter's expression tree on a table, with Arrow kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.sources.filters.nodes import (
    Column,
    Compare,
    Comparison,
    Compute,
    Constant,
    Every,
    IsIn,
    IsNan,
    IsNull,
    Node,
    Not,
    Some,
    Value,
    typed_scalar,
)

_COMPARE: dict[str, Callable[..., Any]] = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_COMPUTE: dict[str, Callable[..., Any]] = {
    "+": pc.add_checked,
    "-": pc.subtract_checked,
    "*": pc.multiply_checked,
    "/": pc.divide,
}
_FLOORED: dict[Comparison, Comparison] = {"<": "<=", "<=": "<=", ">": ">", ">=": ">"}
"""``integer op fraction`` is ``integer _FLOORED[op] floor(fraction)``."""


def evaluate(node: Node, table: pa.Table) -> Any:
    """Return the value of ``node`` for every row of ``table``: an Arrow array [rows], or one scalar for all rows.

    :raises pyarrow.ArrowException: if there is no kernel for the types, or an integer overflows.
    :raises SpecError: if a literal cannot take the type of its column.
    """
    return _EVALUATE[type(node)](node, table)


def _every(node: Every, table: pa.Table) -> Any:
    found = evaluate(node.parts[0], table)
    for part in node.parts[1:]:
        found = pc.and_kleene(found, evaluate(part, table))
    return found


def _some(node: Some, table: pa.Table) -> Any:
    found = evaluate(node.parts[0], table)
    for part in node.parts[1:]:
        found = pc.or_kleene(found, evaluate(part, table))
    return found


def _compare(node: Compare, table: pa.Table) -> Any:
    left = evaluate(node.left, table)
    if isinstance(node.right, Constant) and not isinstance(node.left, Constant):
        return _compare_constant(node.operator, left, node.right.value)
    left, right = _same_kind(left, evaluate(node.right, table))
    return _COMPARE[node.operator](left, right)


def _compare_constant(operator: Comparison, left: Any, value: Value) -> Any:
    """Compare with a constant. Integers are compared as integers only: as floats, large neighbours would be equal."""
    kind = _plain(left.type)
    if pa.types.is_integer(kind) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not value.is_integer():
            if operator in ("==", "!="):
                return _constant_where_valid(left, operator == "!=")
            operator, value = _FLOORED[operator], math.floor(value)
        value = int(value)
        lowest, highest = (0, 2**64 - 1) if pa.types.is_uint64(kind) else (-(2**63), 2**63 - 1)
        if not lowest <= value <= highest:
            return _constant_where_valid(left, _PYTHON_COMPARE[operator](0, value))
    return _COMPARE[operator](left, typed_scalar(value, left.type))


_PYTHON_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def _constant_where_valid(values: Any, answer: bool) -> Any:
    return pc.if_else(pc.is_valid(values), pa.scalar(answer), pa.scalar(None, pa.bool_()))


def _same_kind(left: Any, right: Any) -> tuple[Any, Any]:
    """Cast integers to floats if the other side is float. Arrow itself refuses integers that floats cannot hold."""
    if pa.types.is_integer(_plain(left.type)) and pa.types.is_floating(_plain(right.type)):
        return pc.cast(left, pa.float64(), safe=False), right
    if pa.types.is_floating(_plain(left.type)) and pa.types.is_integer(_plain(right.type)):
        return left, pc.cast(right, pa.float64(), safe=False)
    return left, right


def _compute(node: Compute, table: pa.Table) -> Any:
    left, right = _same_kind(evaluate(node.left, table), evaluate(node.right, table))
    if node.operator == "/":
        # Python's division, so that 1 / 2 is 0.5. Division by zero gives infinity, like with floats, not an error.
        left, right = (pc.cast(side, pa.float64(), safe=False) for side in (left, right))
    return _COMPUTE[node.operator](left, right)


def _is_in(node: IsIn, table: pa.Table) -> Any:
    operand = evaluate(node.operand, table)
    found: Any = _constant_where_valid(operand, False)
    if len(node.values) <= 8 or not isinstance(operand, (pa.Array, pa.ChunkedArray)):
        for value in node.values:
            found = pc.or_(found, _compare_constant("==", operand, value))
        return found
    kind = _plain(operand.type)
    if not pa.types.is_integer(kind):
        values = pa.array([typed_scalar(value, kind).as_py() for value in node.values])
        if not pa.types.is_decimal(kind) and not pa.types.is_null(kind):
            values = values.cast(kind)
            return pc.if_else(pc.is_valid(operand), pc.is_in(operand, values), pa.scalar(None, pa.bool_()))
    for value in node.values:
        found = pc.or_(found, _compare_constant("==", operand, value))
    return found


def _plain(arrow_type: pa.DataType) -> pa.DataType:
    return arrow_type.value_type if pa.types.is_dictionary(arrow_type) else arrow_type


_EVALUATE: dict[type, Callable[..., Any]] = {
    Column: lambda node, table: table.column(node.name),
    Constant: lambda node, table: pa.scalar(node.value),
    Compute: _compute,
    Compare: _compare,
    IsIn: _is_in,
    IsNull: lambda node, table: pc.is_null(evaluate(node.operand, table)),
    IsNan: lambda node, table: pc.is_nan(evaluate(node.operand, table)),
    Not: lambda node, table: pc.invert(evaluate(node.operand, table)),
    Every: _every,
    Some: _some,
}
