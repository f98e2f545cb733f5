"""Write a condition of the language of ``source.filter`` as SQL. Pure."""

from __future__ import annotations

from pipeline.errors import SpecError
from pipeline.sinks.sql.database import quoted, text_literal
from pipeline.sources.filters.nodes import (
    Column,
    Compare,
    Constant,
    Every,
    IsIn,
    IsNull,
    Node,
    Not,
    Some,
    Value,
    column_names,
)
from pipeline.sources.filters.parse import parse_filter

_OPERATORS = {"==": "=", "!=": "<>"}


def predicate_sql(text: str, *, columns: list[str]) -> str:
    """Return the condition ``text`` as SQL.

    :param columns: names of the output's columns.
    :raises SpecError: for a condition that is not understood, for an unknown column, and for arithmetic.
    """
    root = parse_filter(text).root
    unknown = sorted({name for name in column_names(root) if name not in columns})
    if unknown:
        raise SpecError(
            "the condition names columns that the output does not have",
            where="sink.where",
            found=", ".join(unknown),
            expected=f"columns of {', '.join(columns)}",
        )
    return _sql(root, text)


def _sql(node: Node, text: str) -> str:
    match node:
        case Column(name):
            return quoted(name)
        case Constant(value):
            return _literal(value)
        case Compare(operator, left, right):
            return f"({_sql(left, text)} {_OPERATORS.get(operator, operator)} {_sql(right, text)})"
        case IsIn(operand, values):
            return f"({_sql(operand, text)} IN ({', '.join(map(_literal, values))}))"
        case IsNull(operand):
            return f"({_sql(operand, text)} IS NULL)"
        case Not(operand):
            return f"(NOT {_sql(operand, text)})"
        case Every(parts):
            return f"({' AND '.join(_sql(part, text) for part in parts)})"
        case Some(parts):
            return f"({' OR '.join(_sql(part, text) for part in parts)})"
    raise SpecError(
        "the condition cannot be written in SQL",
        where="sink.where",
        found=text,
        expected="comparisons of columns with values, joined by and, or, not",
    )


def _literal(value: Value) -> str:
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    return text_literal(value) if isinstance(value, str) else repr(value)
