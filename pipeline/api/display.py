"""Display of jobs in notebooks and terminals."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from pipeline.common.text import html_table
from pipeline.events import Callback, JobEnded
from pipeline.report.progress import PlainProgress, show_progress

__all__ = ["html_table", "show_observers"]


class _Cell(io.StringIO):
    """Output of a notebook cell that shows the last line written to it."""

    def __init__(self, handle: Any) -> None:
        super().__init__()
        self._handle = handle

    def write(self, text: str) -> int:
        line = text.rstrip()
        self._handle.update({"text/plain": line, "text/html": f"<pre>{escape(line)}</pre>"}, raw=True)
        return len(text)


class _CellProgress(PlainProgress):
    """One line that is updated, and at the end shows the status. (Rich would need ipywidgets for this.)"""

    def on_end(self, event: JobEnded) -> None:
        self._write(f"{event.status}  {event.job}")


@contextmanager
def show_observers(callbacks: Sequence[Callback] | None) -> Iterator[Sequence[Callback]]:
    """Yield ``callbacks``, or for None a progress display: one updated line in Jupyter, else as on the command line."""
    if callbacks is not None:
        yield callbacks
        return
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        with show_progress() as observers:
            yield observers
        return
    display: Any = sys.modules["IPython"].display.display
    yield [_CellProgress(stream=_Cell(display({"text/plain": "planning"}, raw=True, display_id=True)))]
