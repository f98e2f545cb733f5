"""Rename the columns of a row filter."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from pipeline.common.syntax import parse_expression
from pipeline.sources.filters.parse import parse_filter


def rename_columns(text: str, names: Mapping[str, str]) -> str:
    """Return the filter ``text`` with ``names[column]`` in place of each column; other columns keep their names.

    :raises SpecError: for unsupported syntax.
    """
    if not parse_filter(text).columns.intersection(names):
        return text
    return ast.unparse(_Renaming(names).visit(parse_expression(text.strip())))


class _Renaming(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return _column(self._names.get(node.id, node.id))

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Rename inside a call, and the text of ``column('odd name')``; the name of the function is not a column."""
        if isinstance(node.func, ast.Name) and node.func.id == "column":
            (name,) = node.args
            text = name.value if isinstance(name, ast.Constant) else ""
            return _column(self._names.get(str(text), str(text)))
        node.args = [self.visit(part) for part in node.args]
        return node


def _column(name: str) -> ast.expr:
    return ast.Call(ast.Name("column"), [ast.Constant(name)], [])
