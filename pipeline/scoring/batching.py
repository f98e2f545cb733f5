"""Smaller batches out of the reader's, so that each ends soon; every row they stand for is told of with one of them.

How many rows are scored before an attempt looks up: few enough that it takes about half a second. Pure.

Rows may cost what they like: a step may call a service, one row may be a thousand times as dear as the next. Whoever is
asked to stop, or to leave the rest to others, does so between two batches, so that no batch may take for ever. A step
that pays for each call rather than for each row is not to pay more often for it, though: from two batches of different
size follows what a call costs, and that stays a small part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.common.rows import Fragment
from pipeline.sources import SourceBatch

REMAINDER = 1.5
"""What is left of a batch is not cut again when it is no more than so many times what is wanted."""


def rebatch(
    batches: Iterable[SourceBatch], fragments: Sequence[Fragment], rows: Callable[[], int]
) -> Generator[SourceBatch, None, None]:
    """``batches``, cut into batches of ``rows()`` rows, which is asked before each; larger ones are not made.

    Each tells of the rows that the filter dropped before its last row, as those of the reader do.

    :param fragments: of the partition, all of them.
    """
    edges = np.cumsum([0, *(fragment.rows for fragment in fragments)])
    offsets = edges[:-1] - np.array([fragment.row_start for fragment in fragments], dtype=np.int64)
    done = 0
    for batch in batches:
        start, left, total = 0, batch.filtered, batch.table.num_rows
        while total - start > REMAINDER * (wanted := max(1, rows())):
            stop = start + wanted
            filtered = np.zeros_like(left)
            if left.any():
                # Rejects of earlier rounds, whose rows are numbered otherwise, are not filtered.
                end = int(offsets[batch.fragment[stop - 1]] + batch.row[stop - 1]) + 1
                passed = np.diff(np.clip(edges, done, end))
                filtered = passed - np.bincount(batch.fragment[start:stop], minlength=len(left))
            yield batch.slice(start, stop, filtered=filtered)
            start, left, done = stop, left - filtered, done + wanted + int(filtered.sum())
        yield batch.slice(start, total, filtered=left) if start else batch
        done += total - start + int(left.sum())
        # Not kept here while the next one is made: it may be large.
        del batch


SECONDS = 0.5
"""That a batch should take."""
FIRST_ROWS = 256
"""Of the first batch where nothing is known of what rows cost."""
LEAST_ROWS = 16
GROWTH = 4
"""Times as many rows as in the batch before, at most."""
CALL_SHARE = 0.25
"""Of the time of a batch, that the call itself may take; else it gets more rows, whatever it takes."""


@dataclass(frozen=True)
class TimedBatchSizer:
    """The size of the next batch."""

    rows: int
    ceiling: int
    """What it never exceeds."""
    last: tuple[int, float] | None = None
    """Rows and seconds of the batch before."""
    call: float = 0.0
    """Seconds that a call seems to cost, whatever it is given."""
    least: float = math.inf
    """Seconds of the fastest batch; no call costs more than that."""

    @staticmethod
    def start(ceiling: int, *, is_known: bool) -> TimedBatchSizer:
        """For the first batch of a partition.

        :param is_known: rows cost much the same, as they do where only a model scores them.
        """
        return TimedBatchSizer(ceiling if is_known else min(FIRST_ROWS, ceiling), ceiling)

    def after(self, rows: int, seconds: float) -> TimedBatchSizer:
        """When ``rows`` have taken ``seconds``."""
        if rows <= 0 or (rows < self.rows and seconds <= SECONDS):
            # The remainder of what was read says little.
            return self
        least = min(self.least, seconds)
        call = min(least, self.call if self.last is None else _call_seconds(rows, seconds, *self.last, known=self.call))
        wanted = rows * SECONDS / seconds if seconds > 0 else math.inf
        if call > 0:
            rest = max(seconds - call, 1e-9)
            wanted = max(wanted, call * (1 - CALL_SHARE) / CALL_SHARE * rows / rest)
        most = min(self.ceiling, GROWTH * max(rows, self.rows))
        size = max(1, min(most, max(LEAST_ROWS, int(min(wanted, most)))))
        return TimedBatchSizer(size, self.ceiling, (rows, seconds), call, least)


def _call_seconds(rows: int, seconds: float, rows_before: int, seconds_before: float, *, known: float) -> float:
    """What a call costs, by the line through two batches of different size."""
    if rows == rows_before:
        return known
    slope = min(max(0.0, (seconds - seconds_before) / (rows - rows_before)), seconds / rows)
    return seconds - slope * rows
