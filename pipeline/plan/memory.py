"""Project the memory of a task and the rows of a batch. Pure: figures in, figures out.

The projection is an upper bound for planning, based on measurements on Linux with 64-bit Python 3.11::

    worker = process + model × MODEL_FACTOR [+ ENGINE_BYTES + model × ENGINE_FACTOR] + threads × task
    task   = batches + pages + row group being written

    batches = rows × (3 × row in + 8 × features + 2 × row out [+ 4 × row in, with map steps])
    pages   = min(columns × PAGE_BYTES, 2 × largest row group)
    written = min(rows per written row group, rows of the partition) × row out

``row in`` and ``row out`` are bytes of an uncompressed row. Rows may be wider than the sample of the plan: then a batch
has fewer rows, so that it stays within `batch_bytes`. The factors:

- 3 × row in: at most two batches are read at a time (the one being scored and the next), and joining small pieces
  copies one of them.
- 8 × features: the model gets a float32 matrix, and libraries make at most one copy: 2 × 4 bytes per feature.
- 2 × row out: the scored batch is kept while it is encoded.
- 4 × row in: a map step has its input DataFrame, its result, the result as Arrow, and the comparison of both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

PROCESS_BYTES = 320 << 20
"""A worker after its imports: 240 MiB with dask, pandas, pyarrow and xgboost (measured), plus memory that allocators
keep."""
ENGINE_BYTES = 8 << 20
"""Memory of the tree engine apart from its trees: the library, and a thread's working memory (measured: 2 MiB)."""
ENGINE_FACTOR = 6
"""Trees of the tree engine while they are read / model file: 5.1 to 6.4 for UBJ files of 1.4 to 10 MiB (measured)."""
MODEL_FACTOR = 10
"""Loaded model / model file: an 8.1 MiB xgboost JSON took 80 MiB, as 4.6 MiB of UBJ 9 MiB (measured)."""
PAGE_BYTES = 9 << 18
"""2.25 MiB per column: a page, its dictionary and its read buffer; 28 columns took 60 MiB (measured)."""
USABLE = 0.8
"""Share of a worker's memory limit that its tasks may need. Dask pauses a worker at this share."""
BATCH_SHARE = 0.15
"""Share of a thread's part of the memory limit for batches."""
WRITTEN_SHARE = 0.1
"""Share of a thread's part of the memory limit for a row group being written."""
MIN_BATCH_ROWS = 4096
"""Smallest number of rows of a planned batch."""
CEILING_ROWS = 65_536
"""Largest number of rows of a planned batch. Larger batches were 10 % slower, because they do not stay in the CPU
caches (measured, 28 float32 columns)."""
MOST_BATCH_BYTES = 1 << 28
"""Largest limit for the decoded bytes of a batch whose rows are wider than planned."""
_SPREAD = 1.25
"""Decoded bytes of a batch / its planned bytes, up to which rows count as being as wide as planned."""
GROW_AFTER = 8
"""Batches in a row that must fit before the next one is made larger."""
_LEAST_GROUP_BYTES = 16 << 20
MOST_GROUP_BYTES = 64 << 20
"""Largest number of decoded bytes of a written row group. Larger ones would not make files smaller or faster to
read."""
_CHUNK_BYTES = 64 << 10
"""Decoded bytes of a column of a written row group, up to which wide tables get larger row groups."""
_MOST_GROUP_ROWS = 1 << 20


def row_memory(*, row_bytes_in: int, row_bytes_out: int, features: int, maps: bool = False) -> int:
    """Return the bytes of memory per row of a batch.

    :param row_bytes_in: bytes of an uncompressed row of the columns that are read.
    :param row_bytes_out: bytes of an uncompressed row of the columns that are written.
    :param features: number of columns that the model gets.
    :param maps: True if there are map steps.
    """
    return (7 if maps else 3) * row_bytes_in + 8 * features + 2 * row_bytes_out


def task_memory(
    *, batch_rows: int, row_memory: int, columns: int, largest_group: int, row_bytes_out: int, row_group_rows: int
) -> int:
    """Return the bytes that one task needs in addition to the process and the model.

    :param row_memory: result of `row_memory`.
    :param columns: number of columns that are read.
    :param largest_group: uncompressed bytes of the largest row group that is read.
    :param row_group_rows: rows of a row group that is written.
    """
    pages = min(columns * PAGE_BYTES, 2 * largest_group)
    return batch_rows * row_memory + pages + row_group_rows * row_bytes_out


def shared_memory(model_bytes: int, *, engine: bool = False) -> int:
    """Return the bytes that a worker process needs apart from its tasks: the process, and the model once.

    :param model_bytes: size of the model's file.
    :param engine: True if the worker may start the tree engine.
    """
    trees = ENGINE_BYTES + ENGINE_FACTOR * model_bytes if engine else 0
    return PROCESS_BYTES + trees + MODEL_FACTOR * model_bytes


def projected_memory(*, task: int, model_bytes: int, threads: int = 1, engine: bool = False) -> int:
    """Return the bytes that a worker process needs while each of its threads runs a task.

    :param task: result of `task_memory`.
    """
    return shared_memory(model_bytes, engine=engine) + threads * task


def starting_batch_rows(
    *, row_memory: int, memory: int, threads: int, floor: int = MIN_BATCH_ROWS, ceiling: int = CEILING_ROWS
) -> int:
    """Return the rows of the first batch: the largest power of two within `BATCH_SHARE` of a thread's memory.

    :param row_memory: result of `row_memory`.
    :param memory: memory limit of a worker in bytes; 0 means no limit.
    :param threads: threads per worker.
    :returns: at least ``floor`` and at most ``ceiling``.
    """
    if memory <= 0:
        return max(floor, ceiling)
    fitting = int(BATCH_SHARE * memory / max(threads, 1) / max(row_memory, 1))
    return max(floor, min(ceiling, 1 << max(fitting.bit_length() - 1, 0)))


def batch_bytes(*, batch_rows: int, row_bytes_in: int, row_memory: int, memory: int, threads: int) -> int:
    """Return the limit for the decoded bytes of a batch. It counts where rows are wider than planned.

    A batch may fill `BATCH_SHARE` of a thread's memory, also where fewer rows are planned.

    :param row_bytes_in: planned bytes of an uncompressed row of the columns that are read.
    :param row_memory: result of `row_memory`.
    :param memory: memory limit of a worker in bytes; 0 means no limit.
    :param threads: threads per worker.
    """
    room = MOST_BATCH_BYTES
    if memory > 0:
        room = min(room, int(BATCH_SHARE * memory / max(threads, 1) * row_bytes_in / max(row_memory, 1)))
    return max(1, room, int(_SPREAD * batch_rows * row_bytes_in))


def written_group_bytes(*, columns: int, memory: int, threads: int) -> int:
    """Return the most decoded bytes of a row group of the output. It is held in memory until it is complete.

    :param columns: number of columns that are written.
    :param memory: memory limit of a worker in bytes; 0 means no limit.
    :param threads: threads per worker.
    """
    room = max(_LEAST_GROUP_BYTES, min(MOST_GROUP_BYTES, columns * _CHUNK_BYTES))
    if memory > 0:
        room = min(room, int(WRITTEN_SHARE * memory / max(threads, 1)))
    return max(1, room)


def written_group_rows(*, row_bytes_out: int, batch_rows: int, group_bytes: int) -> int:
    """Return the rows per row group of the output, a batch at least.

    :param group_bytes: result of `written_group_bytes`.
    """
    return max(batch_rows, min(_MOST_GROUP_ROWS, group_bytes // max(row_bytes_out, 1)))


def next_batch_rows(
    current: int, *, outcome: Literal["fitted", "out_of_memory"], floor: int, ceiling: int, successes: int
) -> int:
    """Return the rows of the next batch: half after running out of memory, double after `GROW_AFTER` that fitted.

    :param successes: number of consecutive batches of ``current`` rows that fitted.
    :returns: ``current`` if nothing changes; ``floor`` if ``floor`` rows did not fit: the caller must then give up.
    """
    if outcome == "out_of_memory":
        return max(floor, current // 2)
    if successes >= GROW_AFTER and current < ceiling:
        return min(ceiling, current * 2)
    return current


@dataclass(frozen=True)
class MemoryBatchLimit:
    """The batch size at which a partition starts, learned from the partitions that ended before."""

    rows: int
    planned: int
    """Upper limit of ``rows``."""
    fitted: int = 0
    """Number of consecutive partitions that ended with batches of ``rows`` rows."""

    def remembering(self, rows: int | None) -> MemoryBatchLimit:
        """Return the limit at the start of a job, if an earlier job ended with ``rows`` rows; None: none did."""
        return MemoryBatchLimit(min(self.planned, rows or self.planned), self.planned)

    def after_partition(self, rows: int) -> MemoryBatchLimit:
        """Return the limit for the next partitions, after one ended with batches of ``rows`` rows."""
        if rows < self.rows:
            return replace(self, rows=max(1, rows), fitted=0)
        fitted = self.fitted + 1
        grown = next_batch_rows(self.rows, outcome="fitted", floor=1, ceiling=self.planned, successes=fitted)
        return replace(self, rows=grown, fitted=fitted if grown == self.rows else 0)

    def after_split(self, *, floor: int = 1024) -> MemoryBatchLimit:
        """Return the limit for the next partitions, after one was split because of its memory."""
        floor = min(floor, self.planned)
        rows = next_batch_rows(self.rows, outcome="out_of_memory", floor=floor, ceiling=self.planned, successes=0)
        return replace(self, rows=rows, fitted=0)
