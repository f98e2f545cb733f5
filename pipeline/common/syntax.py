"""Parse Python in any thread."""

from __future__ import annotations

import ast
import threading

_lock = threading.RLock()
"""Until 3.11.8 and 3.12.2 all parses of a process count their depth in one place (python/cpython#106905): if the
garbage collector runs in one and lets another thread parse, one fails with ``SystemError: AST constructor recursion
depth mismatch``."""


def parse_module(source: bytes) -> ast.Module:
    """Return the syntax tree of a module; one thread of the process parses at a time.

    :raises SyntaxError: if ``source`` is not Python.
    :raises ValueError: if ``source`` has null bytes.
    :raises RecursionError: if an expression is nested too deeply.
    """
    with _lock:
        return ast.parse(source)


def parse_expression(text: str) -> ast.Expression:
    """Return the syntax tree of an expression; raises what `parse_module` raises."""
    with _lock:
        return ast.parse(text, mode="eval")
