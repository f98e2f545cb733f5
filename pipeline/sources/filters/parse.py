"""Row filters: Python's expression syntax, parsed by `ast`, never evaluated by Python.

::

    country == 'DE' and 18 <= age < 65 and not (plan in ['test', 'demo'] or email is None)

Supported: comparisons, also chained; ``and``, ``or``, ``not``; ``in [...]`` and ``not in [...]``;
``is None``, ``is not None``, ``isnull(x)``, ``notnull(x)``, ``isnan(x)``; ``+ - * /``; numbers, text, True, False;
``column('odd name')`` for a name that is not an identifier.

Text compared with a date, time or timestamp column is read as ISO 8601, to the nanosecond. Numbers are compared
exactly; beside a float column a literal takes the precision of the column. Nulls follow SQL: a comparison with null is
null, and a row is kept only if the whole filter is true.
"""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.common.syntax import parse_expression
from pipeline.errors import SpecError
from pipeline.sources.filters.evaluate import evaluate
from pipeline.sources.filters.nodes import (
    FLIPPED,
    Arithmetic,
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
    column_names,
)
from pipeline.sources.filters.prune import Bounds, may_be_true
from pipeline.sources.types import empty_table

MAX_CHARACTERS = 10_000
"""Longest filter that is parsed. Python's parser needs stack in proportion to the length."""
_SYNTAX = "comparisons, and, or, not, in [...], is None, isnull(x), isnan(x), + - * /, numbers, text, True, False"
_COMPARISONS: dict[type[ast.cmpop], Comparison] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_ARITHMETIC: dict[type[ast.operator], Arithmetic] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


@dataclass(frozen=True)
class Filter:
    """A parsed row filter."""

    text: str
    root: Node
    columns: frozenset[str]
    """Names of the columns in the filter."""

    def check(self, schema: pa.Schema) -> None:
        """Check that the filter can be applied to tables of ``schema``.

        :raises SpecError: for a missing column, and for types that cannot be compared.
        """
        for name in sorted(self.columns - set(schema.names)):
            near = difflib.get_close_matches(name, schema.names, n=1)
            raise SpecError(
                "the filter names a column that the source does not have",
                where="source.filter",
                found=name,
                expected="one of: " + ", ".join(schema.names[:20]) + (", …" if len(schema.names) > 20 else ""),
                next_step=f"did you mean {near[0]}?" if near else "correct the name in source.filter",
            )
        self.mask(empty_table(schema))

    def mask(self, table: pa.Table) -> pa.ChunkedArray | pa.Array:
        """Return a mask of the rows of ``table`` to keep.

        :returns: bool [rows], without nulls.
        :raises SpecError: if Arrow cannot compute the filter, because of types or an integer overflow.
        """
        try:
            result = evaluate(self.root, table)
            if not pa.types.is_boolean(result.type) and not pa.types.is_null(result.type):
                raise pa.ArrowInvalid(f"the result is {result.type}, not a truth value")
            if isinstance(result, pa.Scalar):
                return pa.repeat(pa.scalar(result.as_py() is True), table.num_rows)
            if pa.types.is_null(result.type):
                return pa.repeat(pa.scalar(False), table.num_rows)
        except (pa.ArrowException, ArithmeticError) as error:
            raise SpecError(
                "the filter cannot be computed",
                where="source.filter",
                found=f"{self.text!r}: {error}",
                expected="comparisons between columns and values of the same kind",
                next_step="fix source.filter",
            ) from error
        return pc.fill_null(result, False)

    def may_keep(self, bounds: dict[str, Bounds]) -> bool:
        """True if a row whose columns lie in ``bounds`` could be kept, or if this is unknown."""
        return may_be_true(self.root, bounds)


@lru_cache(maxsize=256)
def parse_filter(text: str) -> Filter:
    """Parse the text of ``source.filter``.

    :raises SpecError: for unsupported syntax, with its position.
    """
    if len(text) > MAX_CHARACTERS:
        raise _not_understood(text, 0, f"{len(text)} characters", expected=f"at most {MAX_CHARACTERS} characters")
    try:
        tree = parse_expression(text.strip())
        root = _Parser(text.strip()).node(tree.body)
    except SyntaxError as error:
        raise _not_understood(text, (error.offset or 1) - 1, error.msg) from error
    except SpecError:
        raise
    except (RecursionError, MemoryError, ValueError) as error:
        raise _not_understood(text, 0, f"{type(error).__name__}: {error}") from error
    return Filter(text, root, frozenset(column_names(root)))


class _Parser:
    """Convert Python's syntax tree to a `Node`. Unsupported syntax is refused."""

    def __init__(self, text: str) -> None:
        self.text = text

    def node(self, tree: ast.AST) -> Node:
        handlers: dict[type[ast.AST], Callable[..., Node]] = {
            ast.Name: lambda name: Column(name.id),
            ast.Constant: self._constant,
            ast.BoolOp: self._bool,
            ast.UnaryOp: self._unary,
            ast.BinOp: self._binary,
            ast.Compare: self._compare,
            ast.Call: self._call,
        }
        handler = handlers.get(type(tree))
        if handler is None:
            raise self._refuse(tree)
        return handler(tree)

    def _refuse(self, tree: ast.AST, *, expected: str = _SYNTAX) -> SpecError:
        position = getattr(tree, "col_offset", 0)
        return _not_understood(self.text, position, ast.unparse(tree), expected=expected)

    def _constant(self, tree: ast.Constant) -> Constant:
        return Constant(self._value(tree))

    def _value(self, tree: ast.expr) -> Value:
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            value = self._value(tree.operand)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return -value
        elif isinstance(tree, ast.Constant) and isinstance(tree.value, (bool, int, float, str)):
            if isinstance(tree.value, float) and not math.isfinite(tree.value):
                raise self._refuse(tree, expected="a finite number")
            return tree.value
        elif isinstance(tree, ast.Constant) and tree.value is None:
            raise self._refuse(tree, expected="'is None' or 'is not None' to look for nulls")
        raise self._refuse(tree, expected="a number, text, True or False")

    def _bool(self, tree: ast.BoolOp) -> Node:
        parts = tuple(self.node(value) for value in tree.values)
        return Every(parts) if isinstance(tree.op, ast.And) else Some(parts)

    def _unary(self, tree: ast.UnaryOp) -> Node:
        if isinstance(tree.op, ast.Not):
            return Not(self.node(tree.operand))
        if not isinstance(tree.op, ast.USub):
            raise self._refuse(tree)
        if isinstance(tree.operand, ast.Constant):
            return Constant(self._value(tree))
        return Compute("-", Constant(0), self.node(tree.operand))

    def _binary(self, tree: ast.BinOp) -> Node:
        operator = _ARITHMETIC.get(type(tree.op))
        if operator is None:
            raise self._refuse(tree)
        return Compute(operator, self.node(tree.left), self.node(tree.right))

    def _compare(self, tree: ast.Compare) -> Node:
        parts = []
        left = tree.left
        for operator, right in zip(tree.ops, tree.comparators, strict=True):
            parts.append(self._comparison(tree, left, operator, right))
            left = right
        return parts[0] if len(parts) == 1 else Every(tuple(parts))

    def _comparison(self, tree: ast.Compare, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Node:
        if isinstance(operator, (ast.In, ast.NotIn)):
            if not isinstance(right, (ast.List, ast.Tuple, ast.Set)):
                raise self._refuse(right, expected="a list of values, such as ['a', 'b']")
            values = tuple(self._value(element) for element in right.elts)
            member: Node = IsIn(self.node(left), values)
            return Not(member) if isinstance(operator, ast.NotIn) else member
        if isinstance(operator, (ast.Is, ast.IsNot)):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._refuse(right, expected="None after 'is'; '==' compares values")
            missing: Node = IsNull(self.node(left))
            return Not(missing) if isinstance(operator, ast.IsNot) else missing
        symbol = _COMPARISONS.get(type(operator))
        if symbol is None:
            raise self._refuse(tree)
        first, second = self.node(left), self.node(right)
        if isinstance(first, Constant) and not isinstance(second, Constant):
            return Compare(FLIPPED[symbol], second, first)
        return Compare(symbol, first, second)

    def _call(self, tree: ast.Call) -> Node:
        name = tree.func.id if isinstance(tree.func, ast.Name) else ""
        if len(tree.args) != 1 or tree.keywords:
            raise self._refuse(tree)
        (argument,) = tree.args
        if name == "column":
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                raise self._refuse(argument, expected="the name of a column as text")
            return Column(argument.value)
        if name == "isnan":
            return IsNan(self.node(argument))
        if name == "isnull":
            return IsNull(self.node(argument))
        if name == "notnull":
            return Not(IsNull(self.node(argument)))
        raise self._refuse(tree)


def _not_understood(text: str, position: int, found: str, *, expected: str = _SYNTAX) -> SpecError:
    return SpecError(
        "the filter is not understood",
        where=f"source.filter, character {position + 1} of {text.strip()[:200]!r}",
        found=found[:200],
        expected=expected,
        next_step="fix source.filter",
    )
