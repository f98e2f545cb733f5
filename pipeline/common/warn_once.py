"""Show each kind of warning of the users' steps once, instead of for every batch.

Python shows a warning once for each place in the code, but forgets what it has shown whenever a library changes the
filters, as pandas does in most calls. Records of ``logging`` that no handler takes count as warnings, too.
Warnings of an attempt at a partition belong to its output: see `pipeline.common.step_output`.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable
from typing import TextIO

from pipeline.common import step_output

MAX_KINDS = 200
"""Kinds of warnings that are shown: a step may put the number of a row into each text."""
Forward = Callable[[str, str], bool]
"""Called with kind and text of each warning. Returns True if it took the warning."""


class WarnOnce(logging.Handler):
    """Shows the first warning of a kind; takes the place of Python's handler of last resort."""

    def __init__(self, otherwise: logging.Handler | None) -> None:
        super().__init__(logging.WARNING)
        self._otherwise = otherwise
        self._seen: set[str] = set()
        self._seen_lock = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        """Handle a record that no handler of the step's own took."""
        kind = f"{record.name} {record.levelname} {record.msg}"
        text = f"{record.levelname} {record.name}: {record.getMessage()}"
        is_taken = _add_to_output(text, f"{record.filename}:{record.lineno}")
        if not is_taken and self.is_due(kind, text) and self._otherwise is not None:
            self._otherwise.handle(record)

    def is_due(self, kind: str, text: str) -> bool:
        """Return True if this process is to show the warning."""
        return self.is_first(kind)

    def is_first(self, kind: str) -> bool:
        """Record a warning. Return True if it is the first of its kind."""
        with self._seen_lock:
            if kind in self._seen or len(self._seen) >= MAX_KINDS:
                return False
            self._seen.add(kind)
            return True


def install(handler: Callable[[logging.Handler | None], WarnOnce] = WarnOnce) -> None:
    """Handle the warnings of this process with a new ``handler`` from now on; once."""
    if isinstance(logging.lastResort, WarnOnce):
        return
    once = handler(logging.lastResort)
    logging.lastResort = once
    show = warnings.showwarning

    def show_once(  # noqa: PLR0917 (Python's own parameters)
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        kind = f"{category.__name__} {filename}:{lineno} {message}"
        place = f"{os.path.basename(filename)}:{lineno}"
        text = f"{place}: {category.__name__}: {message}"
        if file is None and _add_to_output(text, place):
            return
        if file is not None or once.is_due(kind, text):
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_once


def _add_to_output(text: str, place: str) -> bool:
    """Add a warning to the output of the attempt that gives it. Return False outside of one."""
    output = step_output.current()
    if output is None:
        return False
    output.warn(text, place)
    return True
