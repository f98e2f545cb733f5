"""Measure the total wall time of blocks of code."""

from __future__ import annotations

from time import perf_counter


class Stopwatch:
    """The wall time of all ``with`` blocks of this object; not reentrant.

    >>> with Stopwatch() as watch:
    ...     total = sum(range(10))
    >>> watch.seconds > 0.0
    True
    """

    __slots__ = ("_started_at", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        """Seconds of all blocks that have ended, with or without an error."""
        self._started_at = 0.0

    def __enter__(self) -> Stopwatch:
        self._started_at = perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += perf_counter() - self._started_at
