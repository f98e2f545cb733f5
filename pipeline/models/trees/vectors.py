# ruff: noqa: PLR0917 - compiled functions take their arguments by position
"""Operations on whole rows of bits, written as LLVM vectors and used from compiled code.

A row of bits is ``WORDS`` 64-bit words; row r of an array of them starts at word ``r * WORDS``. LLVM's own vectoriser
leaves these operations as scalar code, because what is written may be what is read. As explicit vectors they become
whatever the machine has, from SSE2 to AVX-512, and take a third of the time.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

WORDS = 8
"""64-bit words of one row of bits: one AVX-512 register, or two of AVX2."""

BLOCK = 64 * WORDS
"""Rows of the matrix that are scored together, one bit each."""

_types: Any = importlib.import_module("numba.types")
LANES = 8
"""Values that ``climb`` compares at a time."""

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
    """``bits[target] = bits[on] where bits[mask] else bits[off]``: four row numbers."""

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
    """Write each row's number as a byte: bit k of it is in the row of bits ``planes[plane + k]``.

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

    The test of threshold j goes to the row ``slots[2 * (slot + j)]``, and without the missing values, which are in the
    row ``first + size + 1``, to ``slots[2 * (slot + j) + 1]``.
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
    """Add ``step`` to those of ``LANES`` ranks from ``at`` on where ``table[start + rank] <= value``.

    One step of a binary search. As scalar code LLVM makes a branch of it, which a processor guesses wrong half of the
    time: 10 times slower.
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
    """Make the operation that writes the test "goes right": not ``value < threshold``, of all rows of a block."""

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
                # Eight rows are one byte; the order of the bytes is that of the block (see ``kernel``).
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
