# ruff: noqa: PLR0917 - compiled functions take their arguments by position
"""Compiled kernels that score one block of rows after another.

A block is ``BLOCK`` rows of the matrix; a *row of bits* holds one bit for each of them, in ``WORDS`` 64-bit words. Bit
``8 * (p // 64) + p % 8`` of word ``p // 8 % 8`` stands for row p of the block: the order in which ``gather_bytes``
leaves the leaf numbers side by side.

All rows of bits are in one array ``bits`` (numbered as in ``program.Program``), so that one operation, ``select``,
does everything: a running "or" turns ranks into tests, an interior node chooses between the leaf numbers of its
children. Indices are unsigned, because numba otherwise adds a check for negative ones to each.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.models.trees.assemble import MAX_BITS, ONES, ZEROS
from pipeline.models.trees.compiled import compiled, external
from pipeline.models.trees.program import OCTET, RUNNING, TRASH
from pipeline.models.trees.vectors import (
    BLOCK,
    LANES,
    WORDS,
    accumulate,
    climb,
    compare_missing_left,
    compare_missing_right,
    gather_bytes,
    select,
)

U = np.uint64
U32 = np.uint32
F = np.float32

_expf = external("expf", kind="float32")
_exp = external("exp", kind="float64")
FEW = 100
"""Thresholds up to which comparing with each of them is faster than ranking (measured)."""

_ROWS = BLOCK
_WORDS = WORDS
_OCTET = OCTET
_ZEROS = U(ZEROS)
_ONES = U(ONES)
_RUNNING = U(RUNNING)


@compiled
def mark(bits: Any, ranks: Any, first: Any, rows: Any) -> None:
    """Set each row's bit in the row of bits ``first + rank``."""
    for p in range(U(rows)):
        word = (U(first) + U(ranks[p])) * U(_WORDS) + ((p >> U(3)) & U(7))
        bits[word] |= U(1) << (((p >> U(6)) << U(3)) | (p & U(7)))


@compiled
def rank_numbers(values: Any, ranks: Any, rows: Any, thresholds: Any, first: Any, steps: Any, size: Any) -> None:
    """Count the thresholds that are <= each value; a missing value gets ``size + 1``.

    A binary search with all rows taking each step together, so that no row waits for its own last step. Behind the
    thresholds stand NaNs up to the next power of two, which compare false.
    """
    ranks[:] = U32(0)
    step = U(1) << U(steps)
    for _ in range(steps):
        step = step >> U(1)
        offset = U(first) + step - U(1)
        for p in range(U(0), U(rows), U(LANES)):
            climb(ranks, values, p, thresholds, offset, step)
    missing = U32(size + 1)
    for p in range(U(rows)):
        ranks[p] = missing if values[p] != values[p] else ranks[p]


@compiled
def rank_categories(values: Any, ranks: Any, rows: Any, codes: Any, first: Any, limit: Any, size: Any) -> None:
    """Look up each category code's number among those in any set; others get ``size``, missing ones ``size + 1``."""
    top = F(limit)
    for p in range(U(rows)):
        value = values[p]
        if np.isnan(value):
            ranks[p] = U32(size + 1)
        elif value < F(0) or value >= top:
            ranks[p] = U32(size)
        else:
            ranks[p] = codes[U(first) + U(np.int32(value))]


@compiled
def compare_numbers(bits: Any, values: Any, thresholds: Any, first: Any, size: Any, slots: Any, slot: Any) -> None:
    """Write the tests of a feature with few thresholds, by comparing every value with every one of them."""
    for j in range(U(size)):
        threshold = thresholds[U(first) + j]
        right = U(slots[U(2) * (U(slot) + j)])
        if right != U(TRASH):
            compare_missing_right(bits, right, values, threshold)
        left = U(slots[U(2) * (U(slot) + j) + U(1)])
        if left != U(TRASH):
            compare_missing_left(bits, left, values, threshold)


@compiled
def test_categories(bits: Any, first: Any, size: Any, slots: Any, sets: Any, members: Any, span: Any) -> None:
    """Turn one feature's categories into tests "is in the set", one for each set and direction of missing values."""
    missing = U(first) + U(size) + U(1)
    for s in range(U(span[0]), U(span[1])):
        select(bits, _RUNNING, _ZEROS, _ZEROS, _ZEROS)
        for i in range(U(sets[s]), U(sets[s + U(1)])):
            select(bits, _RUNNING, U(first) + U(members[i]), _RUNNING, _ONES)
        select(bits, U(slots[s, U(1)]), _ZEROS, _RUNNING, _RUNNING)
        select(bits, U(slots[s, U(0)]), missing, _RUNNING, _ONES)


@compiled
def test_block(
    bits: Any, matrix: Any, origin: Any, strides: Any, rows: Any, program: Any, values: Any, ranks: Any
) -> None:
    """Fill the tests of a block of rows that starts at ``matrix[origin]``."""
    for e in range(len(program.column)):
        start = U(origin) + U(program.column[e]) * U(strides[1])
        for p in range(U(rows)):
            values[p] = matrix[start + p * U(strides[0])]
        first, size = program.first[e], program.size[e]
        if program.is_category[e] == 0 and size <= FEW:
            compare_numbers(bits, values, program.thresholds, program.look_up[e], size, program.slots, program.slot[e])
            continue
        if program.is_category[e]:
            rank_categories(values, ranks, rows, program.codes, program.look_up[e], program.steps[e], size)
            mark(bits, ranks, first, rows)
            span = (program.slot[e], program.slot[e + 1])
            test_categories(bits, first, size, program.set_slots, program.sets, program.members, span)
        else:
            rank_numbers(values, ranks, rows, program.thresholds, program.look_up[e], program.steps[e], size)
            mark(bits, ranks, first, rows)
            accumulate(bits, U(first), U(size), program.slots, U(program.slot[e]))
        for row in range(U(first), U(first + size + 2)):
            select(bits, row, _ZEROS, _ZEROS, _ZEROS)


@compiled
def walk(bits: Any, program: Any, tree: Any, numbers: Any, row: Any, wide: Any) -> None:
    """Evaluate one tree from its leaves up and write the leaf numbers: low bytes, then high ones if ``wide``."""
    operations = program.operations
    for i in range(U(program.operation[tree]), U(program.operation[tree + 1])):
        select(bits, operations[i, U(0)], operations[i, U(1)], operations[i, U(2)], operations[i, U(3)])
    plane = U(tree) * U(MAX_BITS)
    gather_bytes(bits, program.planes, plane, numbers, U(row))
    if wide:
        gather_bytes(bits, program.planes, plane + U(8), numbers, U(row) + U(8 * _OCTET))


@compiled
def add_narrow(sums: Any, leaves: Any, at: Any, bytes_: Any) -> None:
    """Add the leaves of 8 trees, in order, to each row's sum."""
    a, b, c, d = U(at[0]), U(at[1]), U(at[2]), U(at[3])
    e, f, g, h = U(at[4]), U(at[5]), U(at[6]), U(at[7])
    for p in range(U(_ROWS)):
        total = sums[p]
        total += leaves[a + U(bytes_[p])]
        total += leaves[b + U(bytes_[p + U(_ROWS)])]
        total += leaves[c + U(bytes_[p + U(2 * _ROWS)])]
        total += leaves[d + U(bytes_[p + U(3 * _ROWS)])]
        total += leaves[e + U(bytes_[p + U(4 * _ROWS)])]
        total += leaves[f + U(bytes_[p + U(5 * _ROWS)])]
        total += leaves[g + U(bytes_[p + U(6 * _ROWS)])]
        total += leaves[h + U(bytes_[p + U(7 * _ROWS)])]
        sums[p] = total


@compiled
def add_wide(sums: Any, leaves: Any, at: Any, bytes_: Any) -> None:
    """Add the leaves of 8 trees with leaf numbers of two bytes, in order, to each row's sum."""
    for t in range(U(_OCTET)):
        first = U(at[t])
        low = t * U(_ROWS)
        high = low + U(_OCTET * _ROWS)
        for p in range(U(_ROWS)):
            number = U(bytes_[low + p]) | (U(bytes_[high + p]) << U(8))
            sums[p] += leaves[first + number]


@compiled
def walk_octet(bits: Any, program: Any, octet: Any, numbers: Any, sums: Any) -> None:
    """Evaluate 8 trees and add their leaves to the outputs they share."""
    wide = program.wide[octet] != 0
    tree = octet * _OCTET
    for t in range(_OCTET):
        walk(bits, program, tree + t, numbers, t * 8, wide)
    bytes_ = numbers.view(np.uint8)
    at = np.empty(_OCTET, np.int64)
    for k in range(program.outputs[octet, 1] - program.outputs[octet, 0]):
        for t in range(_OCTET):
            at[t] = program.leaf[tree + t] + k * program.stride[tree + t]
        target = sums[program.outputs[octet, 0] + k]
        if wide:
            add_wide(target, program.leaves, at, bytes_)
        else:
            add_narrow(target, program.leaves, at, bytes_)


@compiled
def aligned(words: Any) -> Any:
    """Return zeros that start on a cache line, so that no row of bits lies on two."""
    room = np.zeros(words + 8, np.uint64)
    skip = -(room.ctypes.data // 8) % 8
    return room[skip : skip + words]


@compiled
def score(matrix: Any, strides: Any, rows: Any, program: Any, out: Any) -> None:
    """Write the margins of ``rows`` rows to ``out`` [rows, outputs].

    ``matrix`` is flat; its element (row, column) is at ``row * strides[0] + column * strides[1]``.
    """
    outputs = len(program.base)
    bits = aligned(program.rows[0] * _WORDS)
    for w in range(_WORDS):
        bits[ONES * _WORDS + w] = ~U(0)
    values = np.zeros(_ROWS, np.float32)
    ranks = np.empty(_ROWS, np.uint32)
    numbers = aligned(2 * _OCTET * 64)
    sums = np.empty((outputs, _ROWS), np.float32)
    for begin in range(0, rows, _ROWS):
        size = min(_ROWS, rows - begin)
        test_block(bits, matrix, begin * strides[0], strides, size, program, values, ranks)
        for k in range(outputs):
            sums[k, :] = program.base[k]
        for octet in range(len(program.wide)):
            walk_octet(bits, program, octet, numbers, sums)
        for k in range(outputs):
            for p in range(size):
                out[begin + p, k] = sums[k, p]


@compiled
def sigmoid(values: Any) -> None:
    """Apply xgboost's float32 sigmoid in place (``common::Sigmoid``)."""
    for i in range(len(values)):
        x = min(-values[i], F(88.7)) if values[i] == values[i] else -values[i]
        values[i] = F(1) / (_expf(x) + F(1) + F(1e-16))


@compiled
def exp(values: Any) -> None:
    """Apply the C library's float32 exp in place."""
    for i in range(len(values)):
        values[i] = _expf(values[i])


@compiled
def exp64(values: Any) -> None:
    """Apply the C library's exp of double precision in place, rounded to float32."""
    for i in range(len(values)):
        values[i] = F(_exp(np.float64(values[i])))


@compiled
def softmax(values: Any) -> None:
    """Apply xgboost's softmax to each row of [rows, outputs] in place (``common::Softmax``)."""
    for i in range(values.shape[0]):
        top = values[i, 0]
        for k in range(1, values.shape[1]):
            top = max(top, values[i, k])
        total = 0.0
        for k in range(values.shape[1]):
            values[i, k] = _expf(values[i, k] - top)
            total += np.float64(values[i, k])
        for k in range(values.shape[1]):
            values[i, k] /= F(total)
