"""Cut files into row ranges and pack the ranges into partitions of about equal size. Pure.

A row group is cut only if it is too large by itself, because a reader must decode a row group from its first row.
Partitions, and the ranges inside a partition, are in source order: by file, then by row.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.common.rows import Fragment, InputFile

TARGET_BYTES = 256 << 20
"""Target for the largest number of uncompressed bytes of a partition."""
SMALLEST_ROWS = 4096
"""Smallest number of rows per partition, if there are more partitions than their bytes require."""
PARTITIONS_PER_THREAD = 4
"""Partitions per thread, so that few threads are idle during the last partitions."""
OVERSIZE = 1.5
"""A row group up to this many times the target stays whole."""
_FEWEST_PIECES = 8
"""Largest number of pieces into which a row group is cut for balance, or the number of threads if larger. Each piece
decodes the rows before it too."""
_TOLERANCE = 0.002
"""Relative amount by which the longest partition may exceed the optimum, which saves most of the search."""


@dataclass(frozen=True)
class _Units:
    """Row ranges in source order. All arrays are int64 [units]."""

    file: np.ndarray
    group: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    size: np.ndarray
    """Bytes."""

    @property
    def rows(self) -> np.ndarray:
        """Rows per unit, int64 [units]."""
        return np.asarray(self.stop - self.start)


def pack(
    files: Sequence[InputFile], *, threads: int, target_bytes: int | None = None
) -> tuple[tuple[Fragment, ...], ...]:
    """Return the fragments of each partition.

    The number of partitions keeps each below ``target_bytes`` and gives each thread up to `PARTITIONS_PER_THREAD`
    partitions of at least `SMALLEST_ROWS` rows. No partition exceeds `OVERSIZE` × ``target_bytes``, unless a single
    row does.

    :param threads: threads of all workers together.
    """
    limit = TARGET_BYTES if target_bytes is None else target_bytes
    groups = _wanted_groups(files)
    total_rows, total_bytes = int(groups.rows.sum()), int(groups.size.sum())
    if not total_rows:
        return ()
    balanced = min(PARTITIONS_PER_THREAD * threads, total_rows // SMALLEST_ROWS)
    count = max(math.ceil(total_bytes / limit), balanced, 1)
    most_pieces = max(_FEWEST_PIECES, threads)
    units = _cut(groups, target_rows=total_rows / count, target_bytes=limit, most_pieces=most_pieces)
    return _fragments(files, units, _boundaries(units, count=count, target_bytes=limit))


def _wanted_groups(files: Sequence[InputFile]) -> _Units:
    file: list[int] = []
    group: list[int] = []
    start: list[int] = []
    rows: list[int] = []
    size: list[int] = []
    for number, input_file in enumerate(files):
        position = 0
        for index, row_group in enumerate(input_file.row_groups):
            if row_group.selected and row_group.rows:
                file.append(number)
                group.append(index)
                start.append(position)
                rows.append(row_group.rows)
                size.append(row_group.bytes)
            position += row_group.rows
    first = np.array(start, np.int64)
    return _Units(
        np.array(file, np.int64), np.array(group, np.int64), first, first + np.array(rows, np.int64),
        np.array(size, np.int64),
    )  # fmt: skip


def _cut(groups: _Units, *, target_rows: float, target_bytes: int, most_pieces: int) -> _Units:
    """Return ``groups`` with row groups that are too large cut into pieces of equal rows."""
    by_rows, by_bytes = groups.rows / target_rows, groups.size / target_bytes
    pieces = np.where(by_rows > OVERSIZE, np.minimum(np.round(by_rows), most_pieces), 1)
    pieces = np.maximum(pieces, np.where(by_bytes > OVERSIZE, np.ceil(by_bytes), 1)).astype(np.int64)
    pieces = np.minimum(pieces, groups.rows)
    owner = np.repeat(np.arange(len(pieces)), pieces)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    rows, size, parts = groups.rows[owner], groups.size[owner], pieces[owner]
    low, high = number * rows // parts, (number + 1) * rows // parts
    # Bytes in proportion to rows, rounded so that the pieces add up to the row group.
    part = _share(size, high, rows) - _share(size, low, rows)
    start = groups.start[owner]
    return _Units(groups.file[owner], groups.group[owner], start + low, start + high, part)


def _share(size: np.ndarray, rows: np.ndarray, of: np.ndarray) -> np.ndarray:
    return np.where(rows == of, size, np.floor(size * (rows / of))).astype(np.int64)


def _boundaries(units: _Units, *, count: int, target_bytes: int) -> np.ndarray:
    """Return the index of the first unit of each partition, then the number of units.

    The sequence is divided into ``count`` runs, or more if bytes require it, so that the longest run is as short as
    possible. The length is found by bisection.
    """
    # Lists, because bisecting a list for one value is ten times as fast as with numpy.
    rows = [0, *np.cumsum(units.rows).tolist()]
    size = [0, *np.cumsum(units.size).tolist()]
    total = rows[-1]
    best = _fill(rows, size, most_rows=total, most_bytes=target_bytes)
    count = max(count, len(best) - 1)
    low, high = max(int(units.rows.max()), -(-total // count)), total
    middle = low
    while low <= high:
        boundaries = _fill(rows, size, most_rows=middle, most_bytes=target_bytes)
        if len(boundaries) - 1 <= count:
            best, high = boundaries, middle - max(1, int(_TOLERANCE * middle))
        else:
            low = middle + 1
        middle = (low + high) // 2
    return np.array(best)


def _fill(rows: list[int], size: list[int], *, most_rows: int, most_bytes: int) -> list[int]:
    """Return the boundaries if each partition takes as many units as fit, and at least one."""
    boundaries, begin, last = [0], 0, len(rows) - 1
    while begin < last:
        end = min(
            bisect_right(rows, rows[begin] + most_rows, lo=begin),
            bisect_right(size, size[begin] + most_bytes, lo=begin),
        )
        begin = min(max(end - 1, begin + 1), last)
        boundaries.append(begin)
    return boundaries


def _fragments(files: Sequence[InputFile], units: _Units, boundaries: np.ndarray) -> tuple[tuple[Fragment, ...], ...]:
    """Join adjacent units of the same file and partition into one fragment each."""
    begins = np.ones(len(units.file), bool)
    begins[1:] = (units.file[1:] != units.file[:-1]) | (units.start[1:] != units.stop[:-1])
    begins[boundaries[:-1]] = True
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(begins)) - 1
    sizes = np.add.reduceat(units.size, first)
    fragments = [
        Fragment(
            files[file].path,
            start,
            stop,
            group,
            final + 1,
            size,
            files[file].hive_keys,
            span=files[file].span(group, final + 1),
        )
        for file, start, stop, group, final, size in zip(
            units.file[first].tolist(),
            units.start[first].tolist(),
            units.stop[last].tolist(),
            units.group[first].tolist(),
            units.group[last].tolist(),
            sizes.tolist(),
            strict=True,
        )
    ]
    edges = np.searchsorted(first, boundaries).tolist()
    return tuple(tuple(fragments[low:high]) for low, high in pairwise(edges))
