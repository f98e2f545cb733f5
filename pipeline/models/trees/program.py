# ruff: noqa: PLR0917 - compiled functions take their arguments by position
"""Compile tree tables to the flat program that the kernels run (``docs/design/008-tree-engine.md``).

A *row of bits* holds one bit for each row of a block. Rows of bits are numbered: ``ZEROS``, ``ONES``, ``TRASH`` (for
unused results), ``RUNNING`` (a running "or"), then the tests, then scratch for interior nodes, then the ranks.

Each tree is compiled to ``select`` operations, from its leaves up.

Every leaf has a number. At a split, bit k of the reached leaf's number is bit k of the left or of the right subtree:
one ``select`` by the split's test. No operation is needed in two cases:

- both subtrees have the same constant;
- the left subtree has 0 and the right subtree has 1: bit k is the test itself.

The numbering determines how many operations remain. In an even tree, bit h is the direction at height h, and a split of
height h costs h - 1 operations. In an uneven tree that numbering would need more bits than its leaves require, so its
leaves are numbered in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.models.trees.compiled import compiled
from pipeline.models.trees.tables import VECTOR_LEAVES, TreeTables

TRASH, RUNNING, FIRST_TEST = range(2, 5)

OCTET = 8
"""Trees whose leaves are added in one pass over the block."""

Int64 = npt.NDArray[np.int64]
UInt32 = npt.NDArray[np.uint32]
Float32 = npt.NDArray[np.float32]


class Program(NamedTuple):
    """Arrays that the kernels read. E pairs (feature, kind of test), T trees padded to whole octets, O octets.

    A NamedTuple of arrays, because compiled code accepts this type.
    """

    column: Int64
    """[E] column of the matrix."""
    is_category: npt.NDArray[np.uint8]
    """[E] 1 if ranks are category numbers."""
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
    thresholds: Float32
    """Sorted thresholds of each pair, with NaN up to a power of two less one."""
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
    """[any, 4] target, mask, row where the mask is off, row where it is on."""
    operation: Int64
    """[T + 1] first operation of each tree."""
    planes: UInt32
    """[T * 16] rows of bits that make up each leaf number, lowest bit first."""
    leaves: Float32
    """Leaf values by leaf number, tree after tree, outputs of vector leaves one after another."""
    leaf: Int64
    """[T] start of a tree's leaves in ``leaves``."""
    stride: Int64
    """[T] distance between the leaves of one output and the leaves of the next output."""
    wide: npt.NDArray[np.uint8]
    """[O] 1 if leaf numbers take two bytes."""
    outputs: Int64
    """[O, 2] outputs that the octet adds to: the first, and one past the last."""
    base: Float32
    """[K] margin before the first tree."""
    rows: Int64
    """[1] rows of bits in all."""


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
    scratch = trees.pop("scratch")
    pairs = tests.pairs | {"first": tests.pairs["first"] + scratch_start + scratch}
    rows = np.array([scratch_start + scratch + tests.ranks], np.int64)
    return Program(**pairs, **trees, base=np.array(tables.base), rows=rows)


def find_tests(tables: TreeTables) -> Tests:
    """Number the distinct tests (feature, threshold or set, direction of missing values)."""
    found = _Finder(np.zeros(len(tables.feature), np.int64))
    split = tables.left >= 0
    for category in (False, True):
        nodes = np.flatnonzero(split & (tables.is_category == category))
        nodes = nodes[np.argsort(tables.feature[nodes], kind="stable")]
        features, starts = np.unique(tables.feature[nodes], return_index=True)
        for feature, own in zip(features, np.split(nodes, starts[1:]), strict=False):
            add = found.add_categories if category else found.add_numbers
            add(tables, int(feature), own)
    return found.finish()


class _Finder:
    """Collects the tests of one feature after another."""

    def __init__(self, row: Int64) -> None:
        self.row = row
        self.next_test = FIRST_TEST
        self.ranks = 0
        self.pairs: list[tuple[int, bool, int, int, int, int, int]] = []
        self.thresholds: list[Float32] = []
        self.codes: list[UInt32] = []
        self.slots: list[UInt32] = []
        self.set_slots: list[UInt32] = []
        self.set_sizes: list[int] = []
        self.members: list[Int64] = []

    def add_numbers(self, tables: TreeTables, feature: int, nodes: Int64) -> None:
        """Add the tests ``value < threshold`` of one feature."""
        values, which = np.unique(tables.threshold[nodes], return_inverse=True)
        steps = len(values).bit_length()
        padded = np.full((1 << steps) - 1, np.nan, np.float32)
        padded[: len(values)] = values
        start, slot = sum(map(len, self.thresholds)), sum(map(len, self.slots))
        self.slots.append(self._number(nodes, which, tables.default_left[nodes], size=len(values)))
        self._pair(feature, False, look_up=start, steps=steps, size=len(values), slot=slot)
        self.thresholds.append(padded)

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
        self._pair(feature, True, look_up=start, steps=len(look_up), size=len(known), slot=slot)
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

    def _pair(self, feature: int, category: bool, *, look_up: int, steps: int, size: int, slot: int) -> None:
        self.pairs.append((feature, category, look_up, steps, size, self.ranks, slot))
        self.ranks += size + 2

    def finish(self) -> Tests:
        """Return the tests of all features that were added."""
        table = np.array(self.pairs, dtype=np.int64).reshape(-1, 7).T
        column, is_category, look_up, steps, size, first, slot = np.ascontiguousarray(table)
        pairs: dict[str, Any] = {
            "column": column,
            "is_category": is_category.astype(np.uint8),
            "look_up": look_up,
            "steps": steps,
            "size": size,
            "first": first,
            "slot": np.append(slot, len(self.set_sizes)),
            "thresholds": np.concatenate([np.zeros(0, np.float32), *self.thresholds]),
            "codes": np.concatenate([np.zeros(0, np.uint32), *self.codes]),
            "slots": np.concatenate([np.zeros((0, 2), np.uint32), *self.slots]).ravel(),
            "set_slots": np.concatenate([np.zeros((0, 2), np.uint32), *self.set_slots]),
            "sets": np.cumsum([0, *self.set_sizes], dtype=np.int64),
            "members": np.concatenate([np.zeros(0, np.uint32), *self.members]).astype(np.uint32),
        }
        return Tests(row=self.row, distinct=self.next_test - FIRST_TEST, pairs=pairs, ranks=self.ranks)


def _compile_trees(tables: TreeTables, test: Int64, scratch_start: int) -> dict[str, Any]:
    """Compile all trees; order and pad the trees so that each octet has one set of outputs and one width."""
    assembled = [_assemble(tables, tree, test, scratch_start) for tree in range(tables.trees)]
    wide = np.array([tree.bits > 8 for tree in assembled], np.uint8)
    order, octet_wide, outputs = _octets(tables, wide)
    # Padding trees have one leaf of -0.0: the only number that changes no sum, not even the sum -0.0.
    leaves = [tree.leaves.ravel() for tree in assembled]
    starts = np.cumsum([0, *map(len, leaves)], dtype=np.int64)
    stride = np.array([*(tree.leaves.shape[1] for tree in assembled), 0], np.int64)
    planes = np.stack([*(tree.planes for tree in assembled), np.full(MAX_BITS, ZEROS, np.uint32)])
    empty = np.zeros((0, 4), np.uint32)
    operations = [assembled[tree].operations if tree < tables.trees else empty for tree in order]
    return {
        "operations": np.concatenate([empty, *operations]),
        "operation": np.cumsum([0, *map(len, operations)], dtype=np.int64),
        "planes": planes[order].ravel(),
        "leaves": np.concatenate([*leaves, np.full(1, -0.0, np.float32)]),
        "leaf": starts[order],
        "stride": stride[order],
        "wide": octet_wide,
        "outputs": outputs,
        "scratch": max((tree.scratch for tree in assembled), default=0),
    }


def _octets(tables: TreeTables, wide: npt.NDArray[np.uint8]) -> tuple[Int64, npt.NDArray[np.uint8], Int64]:
    """Return the trees in octets (``tables.trees``: padding), 1 per wide octet, and [octets, 2] outputs.

    Trees of one output keep their order, because the sum is rounded after each tree.
    """
    order: list[int] = []
    octets: list[tuple[int, int]] = []
    for tree in np.argsort(tables.output, kind="stable").tolist():
        kind = (int(tables.output[tree]), int(wide[tree]))
        if len(order) % OCTET == 0 or octets[-1] != kind:
            order.extend([tables.trees] * (-len(order) % OCTET))
            octets.append(kind)
        order.append(tree)
    order.extend([tables.trees] * (-len(order) % OCTET))
    spans = [(0, tables.outputs) if output == VECTOR_LEAVES else (output, output + 1) for output, _ in octets]
    return (
        np.array(order, np.int64),
        np.array([width for _, width in octets], np.uint8),
        np.array(spans, np.int64).reshape(-1, 2),
    )


class _Tree(NamedTuple):
    operations: UInt32
    planes: UInt32
    leaves: Float32
    """[outputs of a leaf, leaf numbers]"""
    bits: int
    scratch: int


def _assemble(tables: TreeTables, tree: int, test: Int64, scratch_start: int) -> _Tree:
    own = slice(int(tables.start[tree]), int(tables.start[tree + 1]))
    operations, planes, numbers, bits, scratch = assemble(tables.left[own], tables.right[own], test[own], scratch_start)
    is_leaf = numbers >= 0
    leaves = np.zeros((tables.leaf.shape[1], 1 << bits if bits <= 8 else int(numbers.max()) + 1), np.float32)
    leaves[:, numbers[is_leaf]] = tables.leaf[own][is_leaf].T
    return _Tree(operations, planes, leaves, int(bits), int(scratch))


MAX_BITS = 16
"""Bits of a leaf number."""

ZEROS, ONES = 0, 1
"""Numbers of the rows of bits that are all 0, and all 1."""


@compiled
def order_nodes(left: Any, right: Any, order: Any, height: Any) -> int:
    """Write the reachable nodes, parents first, and the height of each; return the number of reachable nodes."""
    stack = np.empty(len(left) + 1, np.int64)
    stack[0] = 0
    pending = 1
    count = 0
    while pending > 0:
        pending -= 1
        node = stack[pending]
        order[count] = node
        count += 1
        if left[node] >= 0:
            stack[pending] = right[node]
            stack[pending + 1] = left[node]
            pending += 2
    for i in range(count - 1, -1, -1):
        node = order[i]
        height[node] = 0
        if left[node] >= 0:
            height[node] = 1 + max(height[left[node]], height[right[node]])
    return count


@compiled
def number_leaves(left: Any, right: Any, order: Any, height: Any, numbers: Any) -> Any:
    """Write the number of each reachable leaf, and -1 elsewhere; return the bits of a leaf number."""
    leaves = 0
    for node in order:
        leaves += left[node] < 0
    top = height[0]
    even = top <= 8 or (top <= 16 and (1 << top) <= 4 * leaves)
    base = np.zeros(len(left), np.int64)
    numbers[:] = -1
    following = 0
    for node in order:
        if left[node] < 0:
            numbers[node] = base[node] if even else following
            following += 1
        else:
            base[left[node]] = base[node]
            base[right[node]] = base[node] + ((1 << (height[node] - 1)) if even else 0)
    if even:
        return top
    bits = 0
    while (1 << bits) < leaves:
        bits += 1
    return bits


@compiled
def emit(left: Any, right: Any, test: Any, order: Any, bits: Any, first: Any, state: Any) -> Any:
    """Return the operations and the maximum of scratch rows in use.

    ``state`` [nodes, bits] holds the rows of bits of the leaf number below each node: given for leaves, written for
    splits. Scratch rows start at ``first``. A node overwrites the scratch rows of its children, so few are in use.
    """
    room = len(order) * max(bits, 1)
    operations = np.empty((room, 4), np.uint32)
    free = np.empty(room, np.int64)
    count, spare, used = 0, 0, 0
    for node in order[::-1]:
        for k in range(bits if left[node] >= 0 else 0):
            off, on = state[left[node], k], state[right[node], k]
            if off == on:
                state[node, k] = off
                continue
            if off == ZEROS and on == ONES:
                state[node, k] = test[node]
                continue
            if max(off, on) < first and spare == 0:
                free[0] = first + used
                used += 1
                spare = 1
            for row in (off, on):
                if row >= first:
                    free[spare] = row
                    spare += 1
            spare -= 1
            target = free[spare]
            operations[count, 0], operations[count, 1] = target, test[node]
            operations[count, 2], operations[count, 3] = off, on
            count += 1
            state[node, k] = target
    return operations[:count].copy(), used


@compiled
def assemble(left: Any, right: Any, test: Any, first: Any) -> Any:
    """Compile one tree. ``left``, ``right``: [nodes] children or -1; ``test``: [nodes] row of bits of each test.

    Return

    - the operations [any, 4];
    - the rows of bits of the leaf number [16];
    - each node's leaf number, or -1;
    - the number of bits of leaf numbers;
    - the number of scratch rows, which start at ``first``.
    """
    nodes = len(left)
    order = np.empty(nodes, np.int64)
    height = np.zeros(nodes, np.int64)
    order = order[: order_nodes(left, right, order, height)]
    numbers = np.empty(nodes, np.int64)
    bits = number_leaves(left, right, order, height, numbers)
    state = np.zeros((nodes, max(bits, 1)), np.int64)
    for node in range(nodes):
        for k in range(bits):
            state[node, k] = ONES if (numbers[node] >> k) & 1 else ZEROS
    operations, used = emit(left, right, test, order, bits, first, state)
    planes = np.zeros(MAX_BITS, np.uint32)
    for k in range(bits):
        planes[k] = state[0, k]
    return operations, planes, numbers, bits, used
