"""Cut the reader's batches into smaller ones that take about half a second each.

An attempt checks between two batches whether it must stop or split its partition, so no batch may take long. One row
may take a thousand times as long as the next, for instance where a step calls a service. Where a step pays for each
call rather than for each row, larger batches keep that cost a small part: two batches of different size show the
cost of a call. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.common.rows import Fragment
from pipeline.sources import SourceBatch

REMAINDER = 1.5
"""The rest of a batch is not cut when it has at most this many times the requested rows."""


def rebatch(
    batches: Iterable[SourceBatch], fragments: Sequence[Fragment], rows: Callable[[], int]
) -> Generator[SourceBatch, None, None]:
    """Cut ``batches`` into batches of ``rows()`` rows; smaller ones are not joined.

    Each batch counts the rows that the filter dropped before its last row, like those of the reader.

    :param fragments: all fragments of the partition.
    :param rows: called before each batch.
    """
    edges = np.cumsum([0, *(fragment.rows for fragment in fragments)])
    offsets = edges[:-1] - np.array([fragment.row_start for fragment in fragments], dtype=np.int64)
    done = 0
    for batch in batches:
        start, remaining, total = 0, batch.filtered, batch.table.num_rows
        while total - start > REMAINDER * (requested := max(1, rows())):
            stop = start + requested
            filtered = np.zeros_like(remaining)
            if remaining.any():
                # Rejects of earlier rounds, whose rows have other numbers, are not filtered.
                end = int(offsets[batch.fragment[stop - 1]] + batch.row[stop - 1]) + 1
                passed = np.diff(np.clip(edges, done, end))
                filtered = passed - np.bincount(batch.fragment[start:stop], minlength=len(remaining))
            yield batch.slice(start, stop, filtered=filtered)
            start, remaining, done = stop, remaining - filtered, done + requested + int(filtered.sum())
        yield batch.slice(start, total, filtered=remaining) if start else batch
        done += total - start + int(remaining.sum())
        # Not kept here while the next one is read: it may be large.
        del batch


SECONDS = 0.5
"""Target time of a batch."""
FIRST_ROWS = 256
"""Rows of the first batch where the cost of rows is unknown."""
MIN_ROWS = 16
"""Minimum rows of a batch, if its partition has that many."""
GROWTH = 4
"""Largest ratio of the rows of two consecutive batches."""
CALL_SHARE = 0.25
"""Largest share of a batch's time for the call itself. Above it the batch gets more rows, however long it takes."""


@dataclass(frozen=True)
class TimedBatchSizer:
    """Choice of the rows of the next batch by the time of the previous batches."""

    rows: int
    ceiling: int
    """Maximum rows of a batch."""
    last: tuple[int, float] | None = None
    """Rows and seconds of the previous batch."""
    call: float = 0.0
    """Estimated seconds of a call, independent of its rows."""
    fastest: float = math.inf
    """Seconds of the fastest batch; a call costs no more."""
    is_fixed: bool = False
    """True: all batches have as many rows, however long they take."""

    @staticmethod
    def start(ceiling: int, *, is_known: bool) -> TimedBatchSizer:
        """Return the sizer for the first batch of a partition.

        :param is_known: True if all rows cost about the same, which holds without map steps.
        """
        return TimedBatchSizer(ceiling if is_known else min(FIRST_ROWS, ceiling), ceiling)

    @staticmethod
    def fixed(rows: int, *, ceiling: int) -> TimedBatchSizer:
        """Return a sizer for batches of ``rows`` rows, at most ``ceiling``: a service answers several at a time."""
        size = max(1, min(rows, ceiling))
        return TimedBatchSizer(size, size, is_fixed=True)

    def after(self, rows: int, seconds: float) -> TimedBatchSizer:
        """Return the sizer after ``rows`` rows took ``seconds``."""
        if self.is_fixed or rows <= 0 or (rows < self.rows and seconds <= SECONDS):
            # The last rows of a batch of the reader say little about the next batch.
            return self
        fastest = min(self.fastest, seconds)
        call = min(
            fastest, self.call if self.last is None else _call_seconds(rows, seconds, *self.last, known=self.call)
        )
        target = rows * SECONDS / seconds if seconds > 0 else math.inf
        if call > 0:
            rest = max(seconds - call, 1e-9)
            target = max(target, call * (1 - CALL_SHARE) / CALL_SHARE * rows / rest)
        most = min(self.ceiling, GROWTH * max(rows, self.rows))
        size = max(1, min(most, max(MIN_ROWS, int(min(target, most)))))
        return TimedBatchSizer(size, self.ceiling, (rows, seconds), call, fastest)


def _call_seconds(rows: int, seconds: float, rows_before: int, seconds_before: float, *, known: float) -> float:
    """Estimate the seconds of a call by the line through two batches of different size."""
    if rows == rows_before:
        return known
    slope = min(max(0.0, (seconds - seconds_before) / (rows - rows_before)), seconds / rows)
    return seconds - slope * rows
