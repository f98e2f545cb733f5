"""Compile tree tables to the flat program that the kernels run (``docs/design/008-tree-engine.md``).

A *row of bits* holds one bit for each row of a block. Rows of bits are numbered: ``ZEROS``, ``ONES``, ``TRASH`` (for
unused results), then the tests, then scratch for interior nodes, then the ranks.

Each tree is compiled to ``select`` operations, from its leaves up (``native/assemble.c``).

Every leaf has a number. At a split, bit k of the reached leaf's number is bit k of the left or of the right subtree:
one ``select`` by the split's test. No operation is needed in two cases:

- both subtrees have the same constant;
- the left subtree has 0 and the right subtree has 1: bit k is the test itself.

The numbering determines how many operations remain. In an even tree, bit h is the direction at height h, and a split of
height h costs h - 1 operations. In an uneven tree that numbering would need more bits than its leaves require, so its
leaves are numbered in order.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.models.trees.library import Forest, ProgramStruct, address, assemble, measure
from pipeline.models.trees.tables import AS_IT_IS, TRUNCATED, VECTOR_LEAVES, ZERO_IS_MISSING, TreeTables

ZEROS, ONES, TRASH, FIRST_TEST = range(4)
"""Numbers of the rows of bits that are all 0, all 1, and for unused results; tests follow (``native/program.h``)."""

MAX_BITS = 16
"""Bits of a leaf number."""

OCTET = 8
"""Trees whose leaves are added in one pass over the block."""

_OVERREAD = 256
"""Leaves that the kernels may read past those of a tree: they load whole registers."""

Int64 = npt.NDArray[np.int64]
UInt32 = npt.NDArray[np.uint32]
Values = npt.NDArray[np.float32] | npt.NDArray[np.float64]


class Program(NamedTuple):
    """Arrays that the kernels read. E pairs (feature, kind of test), T trees padded to whole octets, O octets.

    The order of the fields is that of ``native/program.h``.
    """

    column: Int64
    """[E] column of the matrix."""
    is_category: npt.NDArray[np.uint8]
    """[E] 1 if ranks are category numbers."""
    reading: npt.NDArray[np.uint8]
    """[E] how values are read: ``AS_IT_IS``, ``ZERO_IS_MISSING`` or ``TRUNCATED``."""
    look_up: Int64
    """[E] start of the pair's thresholds in ``thresholds``, or of its category codes in ``codes``."""
    steps: Int64
    """[E] steps of the search; for categories, the number of codes looked up: all others are in no set."""
    size: Int64
    """[E] thresholds, or categories that are in any set."""
    first: Int64
    """[E] row of bits of rank 0. ``size`` is the rank above all thresholds, ``size + 1`` the rank of missing values."""
    slot: Int64
    """[E + 1] first entry in ``slots``; for categories, first set in ``set_slots``. The next entry is the end."""
    thresholds: Values
    """Sorted thresholds of each pair, with NaN up to a power of two."""
    heap: Values
    """The same as a binary heap: node 1 is the middle, node n has the children 2n and 2n + 1. Node 0 is not used."""
    codes: UInt32
    """Category number of each code."""
    slots: UInt32
    """[thresholds * 2] row of bits of the test where missing values go right, and left; ``TRASH`` where unused."""
    set_slots: UInt32
    """[sets, 2] row of bits of the test of a category set where missing values go right, and left."""
    sets: Int64
    """[sets + 1] start of each set in ``members``."""
    members: UInt32
    """Category numbers of the sets."""
    operations: UInt32
    """[any, 4] target, mask, row where the mask is off, row where it is on: offsets in bytes."""
    operation_start: Int64
    """[T + 1] first operation of each tree."""
    planes: UInt32
    """[T * 16] rows of bits that make up each leaf number, lowest bit first."""
    leaves: Values
    """Leaf values by leaf number, tree after tree, outputs of vector leaves one after another."""
    leaf: Int64
    """[T] start of a tree's leaves in ``leaves``."""
    stride: Int64
    """[T] distance between the leaves of one output and the leaves of the next output."""
    bits: npt.NDArray[np.uint8]
    """[O] bits of the longest leaf number. If one takes more than 8 bits, all trees of the octet have two bytes."""
    outputs: Int64
    """[O, 2] outputs that the octet adds to: the first, and one past the last."""
    base: Values
    """[K] margin before the first tree."""
    rows_of_bits: int
    """Number of rows of bits."""
    first_rank: int
    """Number of the first row of bits of ranks."""

    def to_struct(self) -> ProgramStruct:
        """Return the program for the kernels. Keep this object while they run: it owns the arrays."""
        pointers = [address(array) for array in self[:-2]]
        return ProgramStruct(*pointers, *self[-2:], len(self.column), len(self.bits), len(self.base))


class Tests(NamedTuple):
    """The distinct tests of an ensemble, and the test of each node."""

    row: Int64
    """[N] row of bits of each split node's test; 0 at leaves."""
    distinct: int
    """Number of distinct tests."""
    pairs: dict[str, Any]
    """Arrays of ``Program`` that describe tests; here, ``first`` counts from 0."""
    ranks: int
    """Number of rows of bits for ranks."""


def build_program(tables: TreeTables) -> Program:
    """Compile tables for which ``unsupported`` returns no reason."""
    tests = find_tests(tables)
    scratch_start = FIRST_TEST + tests.distinct
    trees = _compile_trees(tables, tests.row, scratch_start)
    first_rank = scratch_start + trees.pop("scratch")
    pairs = tests.pairs | {"first": tests.pairs["first"] + first_rank}
    return Program(
        **pairs, **trees, base=tables.base.copy(), rows_of_bits=first_rank + tests.ranks, first_rank=first_rank
    )


def find_tests(tables: TreeTables) -> Tests:
    """Number the distinct tests (feature, reading, threshold or set, direction of missing values)."""
    found = _Finder(np.zeros(len(tables.feature), np.int64), dtype=tables.threshold.dtype)
    split = tables.left >= 0
    for category in (False, True):
        for reading in (AS_IT_IS, ZERO_IS_MISSING, TRUNCATED):
            nodes = np.flatnonzero(split & (tables.is_category == category) & (tables.reading == reading))
            nodes = nodes[np.argsort(tables.feature[nodes], kind="stable")]
            features, starts = np.unique(tables.feature[nodes], return_index=True)
            for feature, own in zip(features, np.split(nodes, starts[1:]), strict=False):
                add = found.add_categories if category else found.add_numbers
                add(tables, int(feature), own)
    return found.finish()


class _Finder:
    """Collects the tests of one feature after another."""

    def __init__(self, row: Int64, *, dtype: np.dtype[Any]) -> None:
        self.row = row
        self.dtype = dtype
        self.next_test = FIRST_TEST
        self.ranks = 0
        self.pairs: list[tuple[int, bool, int, int, int, int, int, int]] = []
        self.thresholds: list[Values] = []
        self.heaps: list[Values] = []
        self.codes: list[UInt32] = []
        self.slots: list[UInt32] = []
        self.set_slots: list[UInt32] = []
        self.set_sizes: list[int] = []
        self.members: list[Int64] = []

    def add_numbers(self, tables: TreeTables, feature: int, nodes: Int64) -> None:
        """Add the tests ``value < threshold`` of one feature."""
        values, which = np.unique(tables.threshold[nodes], return_inverse=True)
        steps = len(values).bit_length()
        padded = np.full(1 << steps, np.nan, values.dtype)
        padded[: len(values)] = values
        start, slot = sum(map(len, self.thresholds)), sum(map(len, self.slots))
        self.slots.append(self._number(nodes, which, tables.default_left[nodes], size=len(values)))
        reading = int(tables.reading[nodes[0]])
        self._pair(feature, False, reading, look_up=start, steps=steps, size=len(values), slot=slot)
        self.thresholds.append(padded)
        self.heaps.append(padded[_heap_order(steps)])

    def add_categories(self, tables: TreeTables, feature: int, nodes: Int64) -> None:
        """Add the tests "the code is in the set" of one feature."""
        bounds = tables.category_start
        sets = [tables.categories[bounds[node] : bounds[node + 1]].tobytes() for node in nodes]
        order = {codes: number for number, codes in enumerate(dict.fromkeys(sets))}
        members = [np.frombuffer(codes, np.int32) for codes in order]
        known = np.unique(np.concatenate(members))
        look_up = np.full(int(known[-1]) + 1 if len(known) else 0, len(known), np.uint32)
        look_up[known] = np.arange(len(known), dtype=np.uint32)
        start, slot = sum(map(len, self.codes)), sum(map(len, self.set_slots))
        which = np.array([order[codes] for codes in sets])
        self.set_slots.append(self._number(nodes, which, tables.default_left[nodes], size=len(order)))
        reading = int(tables.reading[nodes[0]])
        self._pair(feature, True, reading, look_up=start, steps=len(look_up), size=len(known), slot=slot)
        self.codes.append(look_up)
        self.set_sizes.extend(map(len, members))
        self.members.extend(np.searchsorted(known, codes) for codes in members)

    def _number(self, nodes: Int64, which: Int64, left: npt.NDArray[np.bool_], *, size: int) -> UInt32:
        slots = np.full((size, 2), TRASH, np.uint32)
        used = np.unique(which * 2 + left)
        slots.ravel()[used] = np.arange(self.next_test, self.next_test + len(used), dtype=np.uint32)
        self.next_test += len(used)
        self.row[nodes] = slots[which, left.astype(np.int64)]
        return slots

    def _pair(
        self, feature: int, category: bool, reading: int, *, look_up: int, steps: int, size: int, slot: int
    ) -> None:
        self.pairs.append((feature, category, reading, look_up, steps, size, self.ranks, slot))
        self.ranks += size + 2

    def finish(self) -> Tests:
        """Return the tests of all features that were added."""
        table = np.array(self.pairs, dtype=np.int64).reshape(-1, 8).T
        column, is_category, reading, look_up, steps, size, first, slot = np.ascontiguousarray(table)
        pairs: dict[str, Any] = {
            "column": column,
            "is_category": is_category.astype(np.uint8),
            "reading": reading.astype(np.uint8),
            "look_up": look_up,
            "steps": steps,
            "size": size,
            "first": first,
            "slot": np.append(slot, len(self.set_sizes)),
            "thresholds": np.concatenate([np.zeros(0, self.dtype), *self.thresholds]),
            "heap": np.concatenate([np.zeros(0, self.dtype), *self.heaps]),
            "codes": np.concatenate([np.zeros(0, np.uint32), *self.codes]),
            "slots": np.concatenate([np.zeros((0, 2), np.uint32), *self.slots]).ravel(),
            "set_slots": np.concatenate([np.zeros((0, 2), np.uint32), *self.set_slots]),
            "sets": np.cumsum([0, *self.set_sizes], dtype=np.int64),
            "members": np.concatenate([np.zeros(0, np.uint32), *self.members]).astype(np.uint32),
        }
        return Tests(row=self.row, distinct=self.next_test - FIRST_TEST, pairs=pairs, ranks=self.ranks)


@functools.cache
def _heap_order(steps: int) -> Int64:
    """Return the sorted number of each node's threshold: level by level, the middles of ever smaller runs."""
    levels = (np.arange(step - 1, (1 << steps) - 1, 2 * step) for step in (1 << steps >> np.arange(1, steps + 1)))
    return np.concatenate([[0], *levels]).astype(np.int64)


def _compile_trees(tables: TreeTables, test: Int64, scratch_start: int) -> dict[str, Any]:
    """Compile all trees; order and pad the trees so that each octet has one set of outputs and one width."""
    nodes = len(tables.left)
    arrays = [address(array) for array in (tables.start, tables.left, tables.right, test)]
    forest = Forest(*arrays, tables.trees, scratch_start)
    sizes, numbers = measure(forest, nodes=nodes)
    counts, bits, scratch = np.append(sizes, np.zeros((1, 3), np.int64), axis=0).T
    order, outputs = _octets(tables, bits[:-1] > 8)
    operations, planes = assemble(forest, order, operations=int(counts.sum()), bits=MAX_BITS, nodes=nodes)
    leaves, starts, stride = _leaves(tables, numbers, bits[:-1])
    return {
        "operations": operations,
        "operation_start": np.cumsum([0, *counts[order]], dtype=np.int64),
        "planes": planes.ravel(),
        "leaves": leaves,
        "leaf": starts[order],
        "stride": stride[order],
        "bits": bits[order].reshape(-1, OCTET).max(axis=1, initial=0).astype(np.uint8),
        "outputs": outputs,
        "scratch": int(scratch.max()),
    }


def _leaves(tables: TreeTables, numbers: npt.NDArray[np.int32], bits: Int64) -> tuple[Values, Int64, Int64]:
    """Return the leaves by leaf number, and each tree's start and stride among them; the last tree is padding.

    Padding trees have one leaf of -0.0: the only number that changes no sum, not even the sum -0.0.
    """
    width = tables.leaf.shape[1]
    largest = np.maximum.reduceat(numbers, tables.start[:-1]) if tables.trees else np.zeros(0, np.int32)
    stride = np.where(bits <= 8, 1 << bits, largest + 1)
    starts = np.cumsum([0, *(stride * width)], dtype=np.int64)
    leaves = np.zeros(starts[-1] + _OVERREAD, tables.leaf.dtype)
    node = np.flatnonzero(numbers >= 0)
    tree = np.repeat(np.arange(tables.trees), np.diff(tables.start))[node]
    for output in range(width):
        leaves[starts[tree] + output * stride[tree] + numbers[node]] = tables.leaf[node, output]
    leaves[starts[-1]] = -0.0
    return leaves, starts, np.append(stride, 0)


def _octets(tables: TreeTables, wide: npt.NDArray[np.bool_]) -> tuple[Int64, Int64]:
    """Return the trees in octets (``tables.trees``: padding), and [octets, 2] outputs.

    Trees of one output keep their order, because the sum is rounded after each tree.
    """
    order: list[int] = []
    octets: list[tuple[int, bool]] = []
    for tree in np.argsort(tables.output, kind="stable").tolist():
        kind = (int(tables.output[tree]), bool(wide[tree]))
        if len(order) % OCTET == 0 or octets[-1] != kind:
            order.extend([tables.trees] * (-len(order) % OCTET))
            octets.append(kind)
        order.append(tree)
    order.extend([tables.trees] * (-len(order) % OCTET))
    spans = [(0, tables.outputs) if output == VECTOR_LEAVES else (output, output + 1) for output, _ in octets]
    return np.array(order, np.int64), np.array(spans, np.int64).reshape(-1, 2)
