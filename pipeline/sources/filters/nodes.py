"""The expression tree of a row filter, and the conversion of literals to the type of the compared column."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SpecError

Comparison = Literal["==", "!=", "<", "<=", ">", ">="]
Arithmetic = Literal["+", "-", "*", "/"]
Value = bool | int | float | str


@dataclass(frozen=True)
class Column:
    """The values of a column."""

    name: str


@dataclass(frozen=True)
class Constant:
    """A literal."""

    value: Value


@dataclass(frozen=True)
class Compute:
    """Arithmetic on two numbers. The result is null if an operand is null."""

    operator: Arithmetic
    left: Node
    right: Node


@dataclass(frozen=True)
class Compare:
    """Comparison of two values. The result is null if an operand is null. A constant is on the right of a column."""

    operator: Comparison
    left: Node
    right: Node


@dataclass(frozen=True)
class IsIn:
    """True if a value is one of several; null for null."""

    operand: Node
    values: tuple[Value, ...]


@dataclass(frozen=True)
class IsNull:
    """True if a value is null. NaN is not null."""

    operand: Node


@dataclass(frozen=True)
class IsNan:
    """True if a float is NaN; null for null."""

    operand: Node


@dataclass(frozen=True)
class Not:
    """Negation; null for null."""

    operand: Node


@dataclass(frozen=True)
class Every:
    """``and``, with SQL's rule for null."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Some:
    """``or``, with SQL's rule for null."""

    parts: tuple[Node, ...]


Node = Column | Constant | Compute | Compare | IsIn | IsNull | IsNan | Not | Every | Some

FLIPPED: dict[Comparison, Comparison] = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
"""``a op b`` is ``b FLIPPED[op] a``."""
NEGATED: dict[Comparison, Comparison] = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}
"""``not (a op b)`` is ``a NEGATED[op] b`` unless one is NaN."""


def column_names(node: Node) -> Iterator[str]:
    """Yield the names of the columns in ``node``. A name may occur more than once."""
    if isinstance(node, Column):
        yield node.name
    for field in fields(node):
        inside = getattr(node, field.name)
        for part in inside if isinstance(inside, tuple) else (inside,):
            if is_dataclass(part):
                yield from column_names(part)  # type: ignore[arg-type]


@lru_cache(maxsize=4096, typed=True)
def typed_scalar(value: Value, arrow_type: pa.DataType) -> pa.Scalar:
    """Return ``value`` as a scalar that Arrow compares with values of ``arrow_type`` without loss.

    For a date, time or timestamp column, text is converted. Text without an offset is in the column's time zone.

    :raises SpecError: if ``value`` cannot be compared with values of ``arrow_type``.
    """
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    try:
        if isinstance(value, str):
            return _text_scalar(value, arrow_type)
        if pa.types.is_null(arrow_type):
            return pa.scalar(value)
        if isinstance(value, bool) or pa.types.is_boolean(arrow_type):
            if not (isinstance(value, bool) and pa.types.is_boolean(arrow_type)):
                raise TypeError
            return pa.scalar(value)
        if pa.types.is_decimal(arrow_type):
            return pa.scalar(decimal.Decimal(str(value)))
        if pa.types.is_floating(arrow_type):
            return pa.scalar(float(value))
        if pa.types.is_integer(arrow_type):
            return pa.scalar(value, pa.uint64() if pa.types.is_uint64(arrow_type) else pa.int64())
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise _cannot_compare(value, arrow_type, str(error)) from error
    raise _cannot_compare(value, arrow_type, "")


def _text_scalar(value: str, arrow_type: pa.DataType) -> pa.Scalar:
    if pa.types.is_null(arrow_type):
        return pa.scalar(value)
    if _is_text(arrow_type):
        return pa.scalar(value, arrow_type)
    if pa.types.is_timestamp(arrow_type):
        return _timestamp(value, arrow_type)
    if pa.types.is_date(arrow_type):
        return pa.scalar(datetime.date.fromisoformat(value)).cast(arrow_type)
    if pa.types.is_time(arrow_type):
        return pa.scalar(datetime.time.fromisoformat(value)).cast(arrow_type)
    raise TypeError("text")


def _timestamp(value: str, arrow_type: pa.DataType) -> pa.Scalar:
    moment = datetime.datetime.fromisoformat(value)
    if arrow_type.tz is None:
        if moment.tzinfo is not None:
            raise ValueError("the column has no time zone")
        return pa.scalar(moment, pa.timestamp("us")).cast(arrow_type)
    if moment.tzinfo is not None:
        return pa.scalar(moment, pa.timestamp("us", "UTC")).cast(arrow_type)
    naive = pa.array([moment], pa.timestamp("us"))
    return pc.assume_timezone(naive, arrow_type.tz)[0].cast(arrow_type)


def _is_text(arrow_type: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type))


def _cannot_compare(value: Value, arrow_type: pa.DataType, reason: str) -> SpecError:
    wanted: Any = (
        "a date or time in ISO 8601, such as '2026-01-31'"
        if pa.types.is_temporal(arrow_type)
        else f"a literal of the column's type, {arrow_type}"
    )
    return SpecError(
        "the filter compares a column with a value of another type",
        where="source.filter",
        found=f"{value!r} for a column of type {arrow_type}" + (f" ({reason})" if reason else ""),
        expected=wanted,
        next_step="mend the literal in source.filter",
    )
