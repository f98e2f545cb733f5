"""Find the rows of a text file in blocks of bytes, independently of each other. Only numpy.

A newline ends a row if an even number of quotes lies before it in the file. A block does not know how many that are, so
it counts its rows for both cases, and `assemble` chooses: blocks can be scanned in any order, at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_BYTES = 8 << 20
"""Bytes of a block, and of the row group that its rows become."""
OVERLAP = 256
"""Bytes before a block that its scan sees: enough for a run of escape characters, and for ``\\r\\n``."""
_LF, _CR = 10, 13
_NONE = -1


@dataclass(frozen=True)
class Dialect:
    """The bytes that decide where a row ends."""

    quote: int | None = None
    escape: int | None = None
    delimiter: int | None = None


LINES = Dialect()
"""A row is a line."""


@dataclass(frozen=True)
class Count:
    """The rows of a block, if the number of quotes before it is even, or if it is odd."""

    ends: int
    """Newlines that end a row."""
    empty: int
    """Those of empty lines, which are no rows."""
    last: int
    """Offset in the file after the last newline that ends a row; -1 without one."""
    stray_quote: int
    """Offset of the first quote inside of a cell that does not begin with one; -1 without."""
    bare_return: int
    """Offset of the first carriage return without a newline after it, outside of quotes; -1 without."""


@dataclass(frozen=True)
class Block:
    """The scan of a block of bytes."""

    stop: int
    """Offset of its end in the file."""
    quotes: int
    lines: int
    """All newlines, also those in quotes."""
    even: Count
    odd: Count


@dataclass(frozen=True)
class Group:
    """The adjacent rows that end in one block."""

    rows: int
    bytes: int
    lines: int


class Malformed(Exception):
    """A text whose rows cannot be told apart. The text of the error says what was found, and where."""


def scan_block(data: bytes | np.ndarray, start: int, *, before: int, dialect: Dialect) -> Block:
    """Count the rows of a block for both numbers of quotes before it.

    :param data: ``before`` bytes of the file before ``start``, then the block.
    :param start: offset of the block in the file.
    """
    pad = 2 if before < 2 else 0
    array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    if pad:
        # Before a file there is an empty line, as far as empty lines are concerned.
        array, before = np.concatenate([np.full(2, _LF, np.uint8), array]), before + 2
    block, shift = array[before:], start - before
    newlines = np.flatnonzero(block == _LF) + before
    total = len(newlines)
    quotes = np.empty(0, np.int64)
    if dialect.quote is not None:
        quotes = np.flatnonzero(block == dialect.quote) + before
    if dialect.escape is not None:
        escaped = _escaped(array, dialect.escape)
        quotes, newlines = (found[~escaped[found]] for found in (quotes, newlines))
    returns = _bare_returns(array, before)
    inside = (np.searchsorted(quotes, newlines) & 1).astype(bool) if len(quotes) else np.zeros(len(newlines), bool)
    bare = (np.searchsorted(quotes, returns) & 1).astype(bool)
    stray = _stray(array, quotes, dialect, start=start, before=before)
    counts = (
        _count(array, newlines[inside == odd], shift, stray=_first(quotes[int(odd) :: 2][stray[int(odd) :: 2]], shift),
               bare=_first(returns[bare == odd], shift))
        for odd in (False, True)
    )  # fmt: skip
    return Block(start + len(block), len(quotes), total, *counts)


def _count(array: np.ndarray, ends: np.ndarray, shift: int, *, stray: int, bare: int) -> Count:
    previous = array[ends - 1]
    empty = (previous == _LF) | ((previous == _CR) & (array[ends - 2] == _LF))
    last = int(ends[-1]) + shift + 1 if len(ends) else _NONE
    return Count(len(ends), int(np.count_nonzero(empty)), last, stray, bare)


def _first(found: np.ndarray, shift: int) -> int:
    return int(found[0]) + shift if len(found) else _NONE


def _stray(array: np.ndarray, quotes: np.ndarray, dialect: Dialect, *, start: int, before: int) -> np.ndarray:
    """Return bool [quotes]: True where a quote that begins a cell does not stand at the cell's beginning."""
    if dialect.delimiter is None or not len(quotes):
        return np.zeros(len(quotes), bool)
    previous = array[quotes - 1]
    fine = (previous == dialect.delimiter) | (previous == _LF) | (previous == _CR) | (previous == dialect.quote)
    if start == 0:  # after a byte order mark
        fine |= (quotes - before == 3) & (previous == 0xBF)
    return np.asarray(~fine)


def _escaped(array: np.ndarray, escape: int) -> np.ndarray:
    """Return bool [bytes]: True for bytes after an odd run of escape characters that are no part of a longer run."""
    found = array == escape
    escaped = np.zeros(len(array), bool)
    places = np.flatnonzero(found)
    if not len(places):
        return escaped
    starts = places[np.flatnonzero(np.diff(places, prepend=-2) != 1)]
    ends = places[np.flatnonzero(np.diff(places, append=len(array) + 1) != 1)] + 1
    odd = ends[(ends - starts) % 2 == 1]
    escaped[odd[odd < len(array)]] = True
    return escaped


def _bare_returns(array: np.ndarray, before: int) -> np.ndarray:
    """Return the positions of carriage returns without a newline, from the last byte before the block on."""
    returns = np.flatnonzero(array[before - 1 : -1] == _CR) + before - 1
    return np.asarray(returns[array[returns + 1] != _LF])


def assemble(blocks: Sequence[Block], *, size: int) -> tuple[Group, ...]:
    """Return the rows of a file in groups: each has the rows that end in one block.

    :param blocks: all blocks of the file, in order.
    :param size: length of the file.
    :raises Malformed: for a quote that is not closed, or stands inside of a cell, and for lines that end with a
        carriage return alone.
    """
    groups: list[Group] = []
    odd, start, lines, pending = False, 0, 0, 0
    for block in blocks:
        count = block.odd if odd else block.even
        if count.stray_quote != _NONE:
            raise Malformed(f"a quote inside of a cell without quotes, at byte {count.stray_quote:,}")
        if count.bare_return != _NONE:
            raise Malformed(f"a line that ends with a carriage return alone, at byte {count.bare_return:,}")
        odd ^= bool(block.quotes % 2)
        lines += block.lines
        if count.ends:
            groups.append(Group(count.ends - count.empty, count.last - start, lines - pending))
            start, pending = count.last, lines
    if odd:
        raise Malformed(f"a quote that is not closed, after byte {start:,}")
    if size > start:  # the last row has no newline
        groups.append(Group(1, size - start, 1 + lines - pending))
    return tuple(groups)


def row_stops(data: bytes, dialect: Dialect) -> np.ndarray:
    """Return the offset after each row of ``data``, which begins with a row. Empty lines are no rows.

    A last row without a newline counts, as far as it goes.
    """
    array = np.concatenate([np.full(2, _LF, np.uint8), np.frombuffer(data, np.uint8)])
    newlines = np.flatnonzero(array[2:] == _LF) + 2
    if dialect.quote is not None and dialect.quote in data:
        quotes = np.flatnonzero(array[2:] == dialect.quote) + 2
        if dialect.escape is not None:
            quotes = quotes[~_escaped(array, dialect.escape)[quotes]]
        newlines = newlines[np.searchsorted(quotes, newlines) & 1 == 0]
    if dialect.escape is not None:
        newlines = newlines[~_escaped(array, dialect.escape)[newlines]]
    last = int(newlines[-1]) + 1 if len(newlines) else 2
    previous = array[newlines - 1]
    stops = newlines[~((previous == _LF) | ((previous == _CR) & (array[newlines - 2] == _LF)))] - 1
    return np.append(stops, len(data)) if last < len(array) else stops


def last_row_stop(data: bytes, dialect: Dialect) -> int:
    """Return the offset after the last whole row of ``data``, which begins with a row; 0 if it has none."""
    if dialect.escape is not None:
        stops = row_stops(data, dialect)
        whole = stops if data.endswith(b"\n") and (not len(stops) or stops[-1] == len(data)) else stops[:-1]
        return int(whole[-1]) if len(whole) else 0
    stop = data.rfind(b"\n") + 1
    if dialect.quote is None:
        return stop
    quote = bytes([dialect.quote])
    before = data.count(quote, 0, stop)
    while stop and before % 2:
        earlier = data.rfind(b"\n", 0, stop - 1) + 1
        before -= data.count(quote, earlier, stop)
        stop = earlier
    return stop
