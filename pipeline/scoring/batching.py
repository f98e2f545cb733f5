"""Smaller batches out of the reader's, so that each ends soon; every row they stand for is told of with one of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

import numpy as np

from pipeline.common.rows import Fragment
from pipeline.sources import SourceBatch

REMAINDER = 1.5
"""What is left of a batch is not cut again when it is no more than so many times what is wanted."""


def resized(
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
