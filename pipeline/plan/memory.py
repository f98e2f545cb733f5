"""Projected memory of a task, and how many rows a batch has. Pure: figures in, figures out.

The projection is an upper bound to plan with, made of what was measured on Linux with 64-bit Python 3.11::

    worker = process [+ ENGINE_BYTES] + model × MODEL_FACTOR + threads × task
    task   = batches + pages + row group being written

    batches = rows × (3 × row in + 8 × features + 2 × row out [+ 4 × row in, with map steps])
    pages   = min(columns × PAGE_BYTES, 2 × largest row group)
    written = min(rows per written row group, rows of the partition) × row out

``row in`` and ``row out`` are bytes of an uncompressed row. Read are at most two batches at a time (the one that is
scored, and the next), and joining small pieces copies one of them: three. The model gets a float32 matrix, and
libraries make one copy of it at most: 2 × 4 bytes a feature. The scored batch is held while it is encoded: twice. A
map step has its DataFrame, what it returns, that as Arrow, and the comparison of the two: four.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

PROCESS_BYTES = 320 << 20
"""A worker that has imported what it needs: 240 MiB with dask, pandas, pyarrow and xgboost (measured), and what
allocators keep."""
ENGINE_BYTES = 128 << 20
"""What the tree engine adds to a worker, where it is possible: numba and the kernels, 105 MiB (measured)."""
MODEL_FACTOR = 10
"""Loaded model / its file: an 8.1 MiB xgboost JSON took 80 MiB, as 4.6 MiB of UBJ 9 MiB (measured)."""
PAGE_BYTES = 9 << 18
"""2.25 MiB per column: a page, its dictionary and the buffer it is read through; 28 columns took 60 MiB (measured)."""
USABLE = 0.8
"""Share of a worker's memory limit that a task may need; Dask pauses a worker there."""
BATCH_SHARE = 0.15
"""Share of a thread's part of the memory limit that its batches may take."""
WRITTEN_SHARE = 0.1
"""Share of a thread's part of the memory limit that a row group being written may take."""
MIN_BATCH_ROWS = 4096
"""Rows that a planned batch has at least."""
CEILING_ROWS = 65_536
"""Larger batches were a tenth slower, since they do not stay in the caches (measured, 28 float32 columns)."""
GROW_AFTER = 8
"""Batches that must have fitted before the next one is made larger again."""
_WRITTEN_GROUP_BYTES = 128 << 20
_MOST_GROUP_ROWS = 1 << 20


def row_memory(*, row_bytes_in: int, row_bytes_out: int, features: int, maps: bool = False) -> int:
    """Bytes of memory for each row of a batch.

    :param row_bytes_in: bytes of an uncompressed row of the columns that are read.
    :param row_bytes_out: the same of the columns that are written.
    :param features: columns the model gets.
    :param maps: whether there are map steps.
    """
    return (7 if maps else 3) * row_bytes_in + 8 * features + 2 * row_bytes_out


def task_memory(
    *, batch_rows: int, row_memory: int, columns: int, largest_group: int, row_bytes_out: int, row_group_rows: int
) -> int:
    """Bytes one task needs beside the process and the model.

    :param row_memory: as `row_memory` gives it.
    :param columns: columns that are read.
    :param largest_group: uncompressed bytes of the largest row group that is read.
    :param row_group_rows: rows of a row group that is written.
    """
    pages = min(columns * PAGE_BYTES, 2 * largest_group)
    return batch_rows * row_memory + pages + row_group_rows * row_bytes_out


def shared_memory(model_bytes: int, *, engine: bool = False) -> int:
    """Bytes a worker process needs whatever its tasks do: itself, and the model once.

    :param model_bytes: size of the model's file.
    :param engine: whether it may start the tree engine.
    """
    return PROCESS_BYTES + (ENGINE_BYTES if engine else 0) + MODEL_FACTOR * model_bytes


def projected_memory(*, task: int, model_bytes: int, threads: int = 1, engine: bool = False) -> int:
    """Bytes a worker process needs while each of its threads runs a task.

    :param task: as `task_memory` gives it.
    """
    return shared_memory(model_bytes, engine=engine) + threads * task


def starting_batch_rows(
    *, row_memory: int, memory: int, threads: int, floor: int = MIN_BATCH_ROWS, ceiling: int = CEILING_ROWS
) -> int:
    """Rows of the first batch: the largest power of two whose memory is a modest part of what a thread may have.

    :param row_memory: as `row_memory` gives it.
    :param memory: bytes a worker may have; 0 means no limit.
    :param threads: threads per worker.
    :returns: at least ``floor`` and at most ``ceiling``.
    """
    if memory <= 0:
        return max(floor, ceiling)
    fitting = int(BATCH_SHARE * memory / max(threads, 1) / max(row_memory, 1))
    return max(floor, min(ceiling, 1 << max(fitting.bit_length() - 1, 0)))


def written_group_rows(*, row_bytes_out: int, batch_rows: int, memory: int, threads: int) -> int:
    """Rows per row group of the output, which is held in memory until it is whole.

    :param memory: bytes a worker may have; 0 means no limit.
    :param threads: threads per worker.
    """
    room = _WRITTEN_GROUP_BYTES
    if memory > 0:
        room = min(room, int(WRITTEN_SHARE * memory / max(threads, 1)))
    return max(batch_rows, min(_MOST_GROUP_ROWS, room // max(row_bytes_out, 1)))


def next_batch_rows(
    current: int, *, outcome: Literal["fitted", "out_of_memory"], floor: int, ceiling: int, successes: int
) -> int:
    """Rows of the next batch: half after running out of memory, twice after several that fitted.

    :param successes: batches of ``current`` rows that fitted, one after the other.
    :returns: ``current`` where nothing changes; ``floor`` after ``floor`` rows did not fit, which the caller must
        take for the end.
    """
    if outcome == "out_of_memory":
        return max(floor, current // 2)
    if successes >= GROW_AFTER and current < ceiling:
        return min(ceiling, current * 2)
    return current


@dataclass(frozen=True)
class MemoryBatchLimit:
    """Rows a partition's batches start with, learned from the partitions that ended before it."""

    rows: int
    planned: int
    """What it never exceeds."""
    fitted: int = 0
    """Partitions that ended with batches of ``rows`` rows, one after the other."""

    def after_partition(self, rows: int) -> MemoryBatchLimit:
        """For the next partitions, when the batches of one had ``rows`` rows at its end."""
        if rows < self.rows:
            return replace(self, rows=max(1, rows), fitted=0)
        fitted = self.fitted + 1
        grown = next_batch_rows(self.rows, outcome="fitted", floor=1, ceiling=self.planned, successes=fitted)
        return replace(self, rows=grown, fitted=fitted if grown == self.rows else 0)

    def after_split(self, *, floor: int = 1024) -> MemoryBatchLimit:
        """For the next partitions, when one had to be split for its memory."""
        floor = min(floor, self.planned)
        rows = next_batch_rows(self.rows, outcome="out_of_memory", floor=floor, ceiling=self.planned, successes=0)
        return replace(self, rows=rows, fitted=0)
