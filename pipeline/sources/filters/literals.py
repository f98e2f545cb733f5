"""Convert the literals of filters and contracts to the type of the column that they are compared with.

Values of most types lie on a grid: whole numbers, decimals of a scale, ticks of a clock. A literal between two of them
or beyond all of them is compared exactly, by the value of the type below it.
"""

from __future__ import annotations

import datetime as dt
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SpecError
from pipeline.sources.filters.nodes import Comparison, Value
from pipeline.sources.types import read_type, storage_type

PYTHON_COMPARE: dict[Comparison, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FLOORED: dict[Comparison, Comparison] = {"<": "<=", "<=": "<=", ">": ">", ">=": ">"}
"""``value op literal`` is ``value _FLOORED[op] floor``, for a literal between two values of the type."""
_A_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Ticks of a second."""
_MORE_DIGITS = re.compile(r"[.,]\d{6}(\d+)")
"""Digits of a second beyond microseconds, which Python passes over."""
_EPOCH = dt.datetime(1970, 1, 1)


@dataclass(frozen=True, slots=True)
class TypedLiteral:
    """A literal on the grid of values of a type."""

    scalar: pa.Scalar | None
    """The largest value of the type that is not above the literal; None if there is none, or the type has no values."""
    beyond: int = 0
    """-1: every value of the type is above the literal; 1: every value is below it; else 0."""
    is_exact: bool = True
    """False if the literal lies between ``scalar`` and the next value."""

    def decide(self, comparison: Comparison) -> tuple[Comparison, bool | None]:
        """Return the comparison to make with ``scalar``, and the answer for every value if there is one already."""
        if self.scalar is None:
            return comparison, PYTHON_COMPARE[comparison](0, self.beyond)
        if self.is_exact:
            return comparison, None
        if comparison in ("==", "!="):
            return comparison, comparison == "!="
        return _FLOORED[comparison], None


@lru_cache(maxsize=4096, typed=True)
def typed_literal(value: Value, arrow_type: pa.DataType) -> TypedLiteral:
    """Return ``value`` as a literal of ``arrow_type``. Floats take the precision of the column: 0.1 is a float32 0.1.

    For a date, time or timestamp column, text is converted. Text without an offset is in the column's time zone.

    :raises SpecError: if ``value`` cannot be compared with values of ``arrow_type``.
    """
    kind = read_type(storage_type(arrow_type))
    try:
        if pa.types.is_null(kind):
            return TypedLiteral(None)
        if isinstance(value, str):
            return _text_literal(value, kind)
        return _number_literal(value, kind)
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise _cannot_compare(value, arrow_type, str(error)) from error


def _number_literal(value: bool | int | float, kind: pa.DataType) -> TypedLiteral:
    types = pa.types
    if isinstance(value, bool) or types.is_boolean(kind):
        if not (isinstance(value, bool) and types.is_boolean(kind)):
            raise TypeError
        return TypedLiteral(pa.scalar(value))
    if math.isnan(value):
        raise TypeError("NaN compares with nothing")
    if types.is_floating(kind):
        return TypedLiteral(_float_scalar(float(value), kind))
    if not (types.is_integer(kind) or types.is_decimal(kind)):
        raise TypeError
    if math.isinf(value):
        return TypedLiteral(None, 1 if value > 0 else -1)
    if types.is_decimal(kind):
        return _decimal_literal(Fraction(Decimal(str(value))), kind)
    bits, is_signed = kind.bit_width, types.is_signed_integer(kind)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    return _on_grid(Fraction(value), low, high, lambda whole: pa.scalar(whole, kind))


def _float_scalar(value: float, kind: pa.DataType) -> pa.Scalar:
    """Return ``value`` in the precision of ``kind``; in float64 if it is too large for ``kind``."""
    if pa.types.is_float64(kind):
        return pa.scalar(value + 0.0, kind)
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value) if pa.types.is_float32(kind) else np.float16(value))
    is_too_large = math.isinf(rounded) and not math.isinf(value)
    return pa.scalar(value, pa.float64()) if is_too_large else pa.scalar(rounded + 0.0, pa.float32())


def _decimal_literal(value: Fraction, kind: Any) -> TypedLiteral:
    high = 10**kind.precision - 1
    common = pa.decimal256 if pa.types.is_decimal256(kind) else pa.decimal128

    def scalar(whole: int) -> pa.Scalar:
        digits = tuple(map(int, str(abs(whole))))
        return pa.scalar(Decimal((int(whole < 0), digits, -kind.scale)), common(kind.precision, kind.scale))

    return _on_grid(value * Fraction(10) ** kind.scale, -high, high, scalar)


def _on_grid(exact: Fraction, low: int, high: int, scalar: Callable[[int], pa.Scalar]) -> TypedLiteral:
    floor = math.floor(exact)
    if floor > high or (floor == high and exact > floor):
        return TypedLiteral(None, 1)
    if floor < low:
        return TypedLiteral(None, -1)
    return TypedLiteral(scalar(floor), is_exact=exact == floor)


def _text_literal(value: str, kind: pa.DataType) -> TypedLiteral:
    types = pa.types
    if types.is_string(kind) or types.is_large_string(kind):
        return TypedLiteral(pa.scalar(value, kind))
    if types.is_date(kind):
        return TypedLiteral(pa.scalar(dt.date.fromisoformat(value)).cast(kind))
    if types.is_time(kind):
        since = dt.datetime.combine(_EPOCH, dt.time.fromisoformat(value)) - _EPOCH
        return _ticks(_seconds(since, value), kind)
    if types.is_timestamp(kind):
        return _ticks(_seconds(_instant(value, kind) - _EPOCH, value), kind)
    raise TypeError("text")


def _instant(value: str, kind: Any) -> dt.datetime:
    """Return the time of ``value`` in UTC if ``kind`` has a time zone, else as it stands, without time zone."""
    moment = dt.datetime.fromisoformat(value)
    if kind.tz is None:
        if moment.tzinfo is not None:
            raise ValueError("the column has no time zone")
        return moment
    if moment.tzinfo is not None:
        return moment.astimezone(dt.UTC).replace(tzinfo=None)
    zoned = pc.assume_timezone(pa.scalar(moment, pa.timestamp("us")), kind.tz)
    return zoned.cast(pa.timestamp("us", "UTC")).as_py().replace(tzinfo=None)  # type: ignore[no-any-return]


def _seconds(since: dt.timedelta, text: str) -> Fraction:
    more = _MORE_DIGITS.search(text)
    fraction = Fraction(int(more[1]), 10 ** (6 + len(more[1]))) if more else Fraction(0)
    return Fraction(since // dt.timedelta(microseconds=1), 10**6) + fraction


def _ticks(seconds: Fraction, kind: Any) -> TypedLiteral:
    bits = kind.bit_width
    ints = pa.int32() if bits == 32 else pa.int64()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return _on_grid(seconds * _A_SECOND[kind.unit], low, high, lambda ticks: pa.scalar(ticks, ints).cast(kind))


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
        next_step="fix the literal in source.filter",
    )
