"""The expression tree of a row filter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal

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
