"""Decide from the bounds of columns whether a filter can keep any row. If in doubt, rows are kept.

Arrow's own pruning is not used, because statistics ignore NaN. If a column lies between 1 and 3 except for a NaN,
``not (x < 5)`` and ``x != 2`` are true for the row with NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import SpecError
from pipeline.sources.filters.literals import typed_literal
from pipeline.sources.filters.nodes import (
    NEGATED,
    Column,
    Compare,
    Comparison,
    Constant,
    Every,
    IsIn,
    IsNull,
    Node,
    Not,
    Some,
    Value,
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The known bounds of one column in some rows."""

    type: pa.DataType
    """Arrow type of the column. Literals are converted to it."""
    low: Any = None
    """No value is lower. None: unknown."""
    high: Any = None
    """No value is higher. None: unknown."""
    nulls: bool = True
    """True if some values may be null."""
    only_nulls: bool = False
    """True if all values are null."""

    @property
    def is_known(self) -> bool:
        """True if both bounds are known."""
        return self.low is not None and self.high is not None

    @property
    def is_exact(self) -> bool:
        """True if the bounds are values of the column: text bounds may be shortened, and bounds ignore NaN."""
        return isinstance(self.low, (bool, int)) and isinstance(self.high, (bool, int))


def may_be_true(node: Node, bounds: dict[str, Bounds]) -> bool:
    """True if ``node`` can be true for a row within ``bounds``."""
    return _may(node, bounds, wanted=True)


def _may(node: Node, bounds: dict[str, Bounds], *, wanted: bool) -> bool:
    """True if the value of ``node`` can be ``wanted``. Null is neither True nor False."""
    match node:
        case Not(operand):
            return _may(operand, bounds, wanted=not wanted)
        case Every(parts) | Some(parts):
            results = [_may(part, bounds, wanted=wanted) for part in parts]
            return all(results) if isinstance(node, Every) is wanted else any(results)
        case Constant(value):
            return value is wanted
        case Column(name):
            return name not in bounds or _may_compare("==", bounds[name], wanted)
        case IsNull(Column(name)) if name in bounds:
            return bounds[name].nulls if wanted else not bounds[name].only_nulls
        case Compare(operator, Column(name), Constant(value)) if name in bounds:
            return _may_compare(operator if wanted else NEGATED[operator], bounds[name], value, negated=not wanted)
        case IsIn(Column(name), values) if name in bounds:
            tests = [_may_compare("==" if wanted else "!=", bounds[name], value) for value in values]
            return any(tests) if wanted else all(tests) and not bounds[name].only_nulls
    return True


def _may_compare(operator: Comparison, bounds: Bounds, value: Value, *, negated: bool = False) -> bool:
    """True if ``x operator value`` can be true.

    :param negated: True if the comparison replaces the negation of its opposite, which is true for NaN.
    """
    if bounds.only_nulls:
        return False
    if not bounds.is_known or (pa.types.is_floating(bounds.type) and (negated or operator == "!=")):
        return True
    try:
        typed = typed_literal(value, bounds.type)
        operator, answer = typed.decide(operator)
        if answer is not None:
            return answer
        return typed.scalar is None or _overlaps(operator, bounds, typed.scalar.as_py())
    except (TypeError, ValueError, OverflowError, KeyError, SpecError):
        return True


def _overlaps(operator: Comparison, bounds: Bounds, value: Any) -> bool:
    match operator:
        case "==":
            return bool(bounds.low <= value <= bounds.high)
        case "!=":
            return not (bounds.is_exact and bounds.low == value == bounds.high)
        case "<":
            return bool(bounds.low < value)
        case "<=":
            return bool(bounds.low <= value)
        case ">":
            return bool(bounds.high > value)
        case ">=":
            return bool(bounds.high >= value)
