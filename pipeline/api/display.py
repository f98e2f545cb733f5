"""Display of jobs in notebooks and terminals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pipeline.common.html import html_table
from pipeline.events import Callback
from pipeline.report.notebook_progress import show_job

__all__ = ["html_table", "show_observers"]


@contextmanager
def show_observers(callbacks: Sequence[Callback] | None) -> Iterator[Sequence[Callback]]:
    """Yield ``callbacks``, or for None a progress display: a card in Jupyter, else as on the command line."""
    if callbacks is not None:
        yield callbacks
        return
    with show_job() as observers:
        yield observers
