# ruff: noqa: PLR0917 - compiled functions take their arguments by position
"""Compiles one tree into ``select`` operations, from its leaves up.

Every leaf gets a number. Bit k of the number of the leaf that a row reaches is, at a split, bit k as its left subtree
gives it or bit k as its right one does: one ``select`` by the split's test, or none where both are the same constant,
or where left has 0 and right has 1 (then it is the test itself). Numbering decides how many operations are left. In
an even tree "which way at height h" is bit h, and a split of height h costs h - 1 of them; an uneven tree would need
more bits that way than it has leaves for, so its leaves are numbered in order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.models.trees.compiled import compiled

MAX_BITS = 16
"""Bits of a leaf number."""

ZEROS, ONES = 0, 1
"""Rows of bits that are all 0, and all 1."""


@compiled
def order_nodes(left: Any, right: Any, order: Any, height: Any) -> int:
    """Write the nodes that can be reached, parents first, and each one's height; return how many there are."""
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
    """Write each reachable leaf's number and -1 elsewhere; return the bits they take."""
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
    """Return the operations and the most scratch rows in use.

    ``state`` [nodes, bits] holds the rows that make up the leaf number below each node: given for leaves, written for
    splits. Scratch rows start at ``first``; a child's is written over, so that few are in use at a time.
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

    Returns the operations [any, 4], the rows that make up the leaf number [16], each node's leaf number or -1, the
    bits of leaf numbers and the scratch rows used, which start at ``first``.
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
