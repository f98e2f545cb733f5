"""What a filter can still keep of rows of which only the bounds are known. It may err only towards keeping.

Arrow's own pruning is not used, because statistics leave NaN out: where a column lies between 1 and 3 but for a NaN,
``not (x < 5)`` and ``x != 2`` hold for that row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import SpecError
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
    typed_scalar,
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is known of the values of one column in some rows."""

    type: pa.DataType
    """Arrow type of the column, which decides how literals are read."""
    low: Any = None
    """No value is lower. None: unknown."""
    high: Any = None
    """No value is higher. None: unknown."""
    nulls: bool = True
    """Whether some may be null."""
    only_nulls: bool = False
    """Whether all are null."""

    @property
    def is_known(self) -> bool:
        """Whether both bounds are."""
        return self.low is not None and self.high is not None

    @property
    def is_exact(self) -> bool:
        """Whether the bounds are values of the column: text may have been cut short, and NaN is left out."""
        return isinstance(self.low, (bool, int)) and isinstance(self.high, (bool, int))


def may_be_true(node: Node, bounds: dict[str, Bounds]) -> bool:
    """Whether ``node`` can be true for a row within ``bounds``."""
    return _may(node, bounds, wanted=True)


def _may(node: Node, bounds: dict[str, Bounds], *, wanted: bool) -> bool:
    """Whether ``node`` can come out as ``wanted``; null is neither."""
    match node:
        case Not(operand):
            return _may(operand, bounds, wanted=not wanted)
        case Every(parts) | Some(parts):
            found = [_may(part, bounds, wanted=wanted) for part in parts]
            return all(found) if isinstance(node, Every) is wanted else any(found)
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
    """Whether ``x operator value`` can hold.

    :param negated: it stands for the negation of the opposite, which a NaN makes true.
    """
    if bounds.only_nulls:
        return False
    if not bounds.is_known or (pa.types.is_floating(bounds.type) and (negated or operator == "!=")):
        return True
    try:
        # Python compares integers with fractions exactly, as `pipeline.sources.filters.evaluate` takes care to do.
        exact = pa.types.is_integer(bounds.type) and isinstance(value, (int, float)) and not isinstance(value, bool)
        return _overlaps(operator, bounds, value if exact else typed_scalar(value, bounds.type).as_py())
    except (TypeError, SpecError):
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
