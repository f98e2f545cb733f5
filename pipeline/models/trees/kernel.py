# ruff: noqa: PLR0917 - compiled functions take their arguments by position
"""Compiled kernels that score a matrix block by block, with operations on rows of bits written as LLVM vectors.

A block is ``BLOCK`` rows of the matrix. A *row of bits* holds one bit for each of them, in ``WORDS`` 64-bit words. Bit
``8 * (p // 64) + p % 8`` of word ``p // 8 % 8`` stands for row p of the block. In this order ``gather_bytes`` writes
the leaf numbers.

All rows of bits are in one array ``bits``, numbered as in ``program.Program``. Row r starts at word ``r * WORDS``. One
operation, ``select``, does everything: a running "or" turns ranks into tests, and an interior node selects between the
leaf numbers of its children. Indices are unsigned, because numba adds a check for negative values to signed indices.

LLVM's vectoriser leaves these operations as scalar code, because the output may overlap the input. Explicit vectors use
the machine's instructions, from SSE2 to AVX-512, and take a third of the time.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.models.trees.compiled import compiled, external
from pipeline.models.trees.program import MAX_BITS, OCTET, ONES, RUNNING, TRASH, ZEROS

WORDS = 8
"""64-bit words of one row of bits: one AVX-512 register, or two of AVX2."""

BLOCK = 64 * WORDS
"""Rows of the matrix that are scored together; each has one bit."""

_types: Any = importlib.import_module("numba.types")
LANES = 8
"""Values that ``climb`` compares at once."""

_extending: Any = importlib.import_module("numba.extending")
_cgutils: Any = importlib.import_module("numba.core.cgutils")
_ir: Any = importlib.import_module("llvmlite.ir")
_WORD: Any = _ir.IntType(64)
_VECTOR: Any = _ir.VectorType(_WORD, WORDS)
_BYTES: Any = _ir.IntType(8).as_pointer()
_EXCHANGES = (
    # (distance between the planes, bits to shift, bits that stay)
    (4, 32, 0x00000000FFFFFFFF),
    (2, 16, 0x0000FFFF0000FFFF),
    (1, 8, 0x00FF00FF00FF00FF),
)
_TURNS = ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0))


class _Rows:
    """Emits code that reads and writes rows of bits of one array."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        self.builder = builder
        self.first = _cgutils.create_struct_proxy(kind)(context, builder, array).data

    def _place(self, row: Any) -> Any:
        wide = row if row.type == _WORD else self.builder.zext(row, _WORD)
        word = self.builder.gep(self.first, [self.builder.mul(wide, _WORD(WORDS))])
        return self.builder.bitcast(word, _VECTOR.as_pointer())

    def load(self, row: Any) -> Any:
        return self.builder.load(self._place(row), align=8)

    def store(self, row: Any, vector: Any) -> None:
        self.builder.store(vector, self._place(row), align=8)


def _everywhere(number: int) -> Any:
    return _VECTOR([_WORD(number)] * WORDS)


def _select(context: Any, bits: Any, target: Any, mask: Any, off: Any, on: Any) -> tuple[Any, Any]:
    """Compute ``bits[target] = bits[on] where bits[mask] else bits[off]`` for four row numbers."""

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        rows = _Rows(context, builder, signature.args[0], values[0])
        chosen, when_off, when_on = (rows.load(row) for row in values[2:])
        rows.store(values[1], builder.xor(when_off, builder.and_(chosen, builder.xor(when_off, when_on))))
        return context.get_dummy_value()

    return _types.void(bits, target, mask, off, on), generate


def _transpose(builder: Any, planes: list[Any]) -> list[Any]:
    """Turn 8 vectors with one bit of each number into 8 with whole bytes (Hacker's Delight, 2nd ed., section 7-3)."""
    for distance, shift, mask in _EXCHANGES:
        for low in range(8):
            high = low + distance
            if low & distance:
                continue
            moved = builder.xor(builder.lshr(planes[low], _everywhere(shift)), planes[high])
            differ = builder.and_(moved, _everywhere(mask))
            planes[low] = builder.xor(planes[low], builder.shl(differ, _everywhere(shift)))
            planes[high] = builder.xor(planes[high], differ)
    for shift, mask in _TURNS:
        for i, plane in enumerate(planes):
            moved = builder.xor(plane, builder.lshr(plane, _everywhere(shift)))
            differ = builder.and_(moved, _everywhere(mask))
            planes[i] = builder.xor(builder.xor(plane, differ), builder.shl(differ, _everywhere(shift)))
    return planes


def _gather_bytes(context: Any, bits: Any, planes: Any, plane: Any, numbers: Any, row: Any) -> tuple[Any, Any]:
    """Write each row's number as a byte: bit k of the byte is in the row of bits ``planes[plane + k]``.

    The bytes fill the rows ``row`` to ``row + 7`` of ``numbers``, in the order of the block.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        source = _Rows(context, builder, signature.args[0], values[0])
        target = _Rows(context, builder, signature.args[3], values[3])
        first = _cgutils.create_struct_proxy(signature.args[1])(context, builder, values[1]).data
        places = [builder.gep(first, [builder.add(values[2], _WORD(k))]) for k in range(8)]
        found = _transpose(builder, [source.load(builder.load(place)) for place in places])
        for k, vector in enumerate(found):
            target.store(builder.add(values[4], _WORD(k)), vector)
        return context.get_dummy_value()

    return _types.void(bits, planes, plane, numbers, row), generate


def _accumulate(context: Any, bits: Any, first: Any, size: Any, slots: Any, slot: Any) -> tuple[Any, Any]:
    """Turn the rows of bits of ranks ``first`` … into tests "the rank is above", for ``size`` thresholds.

    The test of threshold j is written to the row ``slots[2 * (slot + j)]``. The same test without the missing values
    (row ``first + size + 1``) is written to ``slots[2 * (slot + j) + 1]``.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        rows = _Rows(context, builder, signature.args[0], values[0])
        begin, count, start = values[1], values[2], values[4]
        table = _cgutils.create_struct_proxy(signature.args[3])(context, builder, values[3]).data
        present = builder.not_(rows.load(builder.add(builder.add(begin, count), _WORD(1))))
        above = _cgutils.alloca_once_value(builder, _everywhere(2**64 - 1))
        with _cgutils.for_range(builder, count, intp=_WORD) as loop:
            vector = builder.and_(builder.load(above), builder.not_(rows.load(builder.add(begin, loop.index))))
            builder.store(vector, above)
            entry = builder.shl(builder.add(start, loop.index), _WORD(1))
            rows.store(builder.load(builder.gep(table, [entry])), vector)
            other = builder.load(builder.gep(table, [builder.add(entry, _WORD(1))]))
            rows.store(other, builder.and_(vector, present))
        return context.get_dummy_value()

    return _types.void(bits, first, size, slots, slot), generate


def _climb(context: Any, ranks: Any, values: Any, at: Any, table: Any, start: Any, step: Any) -> tuple[Any, Any]:
    """Add ``step`` to each of ``LANES`` ranks from ``at`` on for which ``table[start + rank] <= value``.

    This is one step of a binary search. LLVM compiles the scalar code to a branch, which a processor mispredicts half
    of the time: 10 times slower.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        number, real = _ir.IntType(32), _ir.FloatType()
        counts, reals = _ir.VectorType(number, LANES), _ir.VectorType(real, LANES)
        bases = [
            _cgutils.create_struct_proxy(signature.args[i])(context, builder, arguments[i]).data for i in (0, 1, 3)
        ]
        place = builder.bitcast(builder.gep(bases[0], [arguments[2]]), counts.as_pointer())
        rank = builder.load(place, align=4)
        value = builder.load(builder.bitcast(builder.gep(bases[1], [arguments[2]]), reals.as_pointer()), align=4)
        reached, stride = reals(_ir.Undefined), counts(_ir.Undefined)
        taken = builder.trunc(arguments[5], number)
        for lane in range(LANES):
            offset = builder.add(arguments[4], builder.zext(builder.extract_element(rank, number(lane)), _WORD))
            reached = builder.insert_element(reached, builder.load(builder.gep(bases[2], [offset])), number(lane))
            stride = builder.insert_element(stride, taken, number(lane))
        further = builder.sext(builder.fcmp_ordered("<=", reached, value), counts)
        builder.store(builder.add(rank, builder.and_(further, stride)), place, align=4)
        return context.get_dummy_value()

    return _types.void(ranks, values, at, table, start, step), generate


def _compare(*, missing_right: bool) -> Any:
    """Make the operation that writes the test "goes right" (not ``value < threshold``) of all rows of a block."""

    def compare(context: Any, bits: Any, row: Any, values: Any, threshold: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            reals = _ir.VectorType(_ir.FloatType(), LANES)
            words, numbers = (
                _cgutils.create_struct_proxy(signature.args[i])(context, builder, arguments[i]).data for i in (0, 2)
            )
            first = builder.bitcast(builder.gep(words, [builder.mul(arguments[1], _WORD(WORDS))]), _BYTES)
            limit = reals(_ir.Undefined)
            for lane in range(LANES):
                limit = builder.insert_element(limit, arguments[3], _ir.IntType(32)(lane))
            test = builder.fcmp_unordered if missing_right else builder.fcmp_ordered
            with _cgutils.for_range(builder, _WORD(BLOCK // LANES), intp=_WORD) as loop:
                place = builder.gep(numbers, [builder.mul(loop.index, _WORD(LANES))])
                value = builder.load(builder.bitcast(place, reals.as_pointer()), align=4)
                # Eight rows are one byte. The bytes are in the order of the block (see the module's docstring).
                byte = builder.add(
                    builder.shl(builder.and_(loop.index, _WORD(7)), _WORD(3)), builder.lshr(loop.index, _WORD(3))
                )
                builder.store(builder.bitcast(test(">=", value, limit), _ir.IntType(8)), builder.gep(first, [byte]))
            return context.get_dummy_value()

        return _types.void(bits, row, values, threshold), generate

    return _extending.intrinsic(compare)


compare_missing_right: Any = _compare(missing_right=True)
compare_missing_left: Any = _compare(missing_right=False)
climb: Any = _extending.intrinsic(_climb)
select: Any = _extending.intrinsic(_select)
gather_bytes: Any = _extending.intrinsic(_gather_bytes)
accumulate: Any = _extending.intrinsic(_accumulate)


U = np.uint64
U32 = np.uint32
F = np.float32

_expf = external("expf", kind="float32")
_exp = external("exp", kind="float64")
FEW = 100
"""Number of thresholds up to which comparing with each threshold is faster than ranking (measured)."""

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

    In this binary search all rows take each step together, so that no row waits for its own last step. After the
    thresholds follow NaNs, which compare false, up to a power of two less one.
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
    """Look up the number of each category code; a code in no set gets ``size``, a missing value ``size + 1``."""
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
    """Write the tests of a feature with few thresholds by comparing every value with every threshold."""
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
    """Turn one feature's categories into tests "is in the set": one test per set and direction of missing values."""
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
    """Return zeros that start at a cache line, so that no row of bits spans two cache lines."""
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
    """Apply the C library's double-precision exp in place, rounded to float32."""
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
