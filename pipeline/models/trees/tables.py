"""Tables of a tree ensemble, independent of the training library: plain arrays, frozen, checked."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ModelError

MAX_LEAVES = 1 << 16
"""Maximum of leaves of one tree: leaf numbers are stored in two bytes."""

MAX_CATEGORY = 1 << 20
"""Upper limit (exclusive) of category codes: each code has an entry of 4 bytes in a look-up table."""

MAX_TESTS = 1 << 20
"""Maximum of distinct tests of the ensemble: each takes 64 bytes of working memory in every thread."""

VECTOR_LEAVES = -1
"""``TreeTables.output`` of a tree whose leaves hold one value for every output."""

AS_IT_IS, ZERO_IS_MISSING, TRUNCATED = range(3)
"""``TreeTables.reading``: how a test reads its value (``native/program.h``)."""

ZERO = np.float32(1e-35)
"""Largest absolute value that ``ZERO_IS_MISSING`` takes for zero (LightGBM's ``kZeroThreshold``)."""

_DTYPES: dict[str, type[np.generic]] = {
    "start": np.int64,
    "output": np.int32,
    "feature": np.int32,
    "threshold": np.float32,
    "left": np.int32,
    "right": np.int32,
    "default_left": np.bool_,
    "is_category": np.bool_,
    "category_start": np.int64,
    "categories": np.int32,
    "leaf": np.float32,
    "base": np.float32,
    "reading": np.uint8,
}
"""Types of the arrays. ``TreeTables.value_type`` and ``TreeTables.sum_type`` replace float32."""

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TreeTables:
    """Trees as arrays. T trees, N nodes in all, K outputs; children are numbered from the first node of their tree.

    A row starts at node 0 of a tree. It goes left

    - at a threshold: if ``value < threshold``;
    - at a category node: if the code is *not* in the node's set (negative codes are in no set);
    - with a missing value (NaN): if ``default_left`` is true.

    The margin of an output is ``base`` plus the values of the reached leaves, added in ``sum_type`` in the order of
    the trees.
    """

    start: npt.NDArray[np.int64]
    """[T + 1] first node of each tree, then N."""

    output: npt.NDArray[np.int32]
    """[T] output that a tree adds to, or ``VECTOR_LEAVES``."""

    feature: npt.NDArray[np.int32]
    """[N] column of the matrix; not read at leaves."""

    threshold: Floats
    """[N] threshold of the test, of ``value_type``; not read at leaves and category nodes."""

    left: npt.NDArray[np.int32]
    """[N] child for rows that go left; -1 at leaves."""

    right: npt.NDArray[np.int32]
    """[N] child for rows that go right; -1 at leaves."""

    default_left: npt.NDArray[np.bool_]
    """[N] True if a missing value goes left."""

    is_category: npt.NDArray[np.bool_]
    """[N] True if the node tests membership in a set of category codes."""

    category_start: npt.NDArray[np.int64]
    """[N + 1] start of each node's set in ``categories``."""

    categories: npt.NDArray[np.int32]
    """[any] category codes, node after node."""

    leaf: Floats
    """[N, 1], or [N, K] with vector leaves: value of a leaf, multiplied by the weight of its tree."""

    base: Floats
    """[K] margin before the first tree."""

    n_features: int
    """Columns of the matrix to be scored."""

    reading: npt.NDArray[np.uint8] = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint8))
    """[N] ``AS_IT_IS``; ``ZERO_IS_MISSING``: zeros are tested as missing values; ``TRUNCATED``: the fraction is cut off
    before the test. Default: ``AS_IT_IS`` everywhere."""

    value_type: type[np.float32] | type[np.float64] = np.float32
    """Type of the matrix to be scored and of ``threshold``."""

    sum_type: type[np.float32] | type[np.float64] = np.float32
    """Type of sums, margins, ``leaf`` and ``base``."""

    def __post_init__(self) -> None:
        types = _DTYPES | {"threshold": self.value_type, "leaf": self.sum_type, "base": self.sum_type}
        if len(self.reading) == 0:
            object.__setattr__(self, "reading", np.full(len(self.feature), AS_IT_IS))
        for name, dtype in types.items():
            array = np.ascontiguousarray(getattr(self, name), dtype=dtype)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        for problem in _problems(self):
            raise ModelError("the tree tables are inconsistent", found=problem, next_step="fix the reader")

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
            object.__setattr__(self, name, value)

    @property
    def trees(self) -> int:
        """Number of trees."""
        return len(self.output)

    @property
    def outputs(self) -> int:
        """Number of values of one row's margin."""
        return len(self.base)


def _problems(tables: TreeTables) -> list[str]:
    nodes = len(tables.feature)
    sizes = {name: len(getattr(tables, name)) for name in _DTYPES}
    wanted = dict.fromkeys(("threshold", "left", "right", "default_left", "is_category", "leaf", "reading"), nodes)
    wanted |= {"start": tables.trees + 1, "category_start": nodes + 1}
    found = [
        f"{name} has {sizes[name]} entries, expected {size}" for name, size in wanted.items() if sizes[name] != size
    ]
    if found:
        return found
    if tables.start[0] != 0 or tables.start[-1] != nodes or (np.diff(tables.start) < 1).any():
        return ["start does not rise from 0 to the number of nodes"]
    if tables.category_start[0] != 0 or (np.diff(tables.category_start) < 0).any():
        return ["category_start does not rise from 0"]
    if tables.category_start[-1] != len(tables.categories):
        return ["category_start does not end at the number of categories"]
    if not tables.outputs or (tables.output < VECTOR_LEAVES).any() or (tables.output >= tables.outputs).any():
        return [f"an output outside 0 to {tables.outputs - 1}"]
    if tables.leaf.ndim != 2 or tables.leaf.shape[1] not in {1, tables.outputs}:
        return [f"leaf has the shape {tables.leaf.shape}"]
    if (tables.output == VECTOR_LEAVES).any() and tables.leaf.shape[1] != tables.outputs:
        return ["vector leaves of another length than there are outputs"]
    return _bad_links(tables)


def _bad_links(tables: TreeTables) -> list[str]:
    size = np.repeat(np.diff(tables.start), np.diff(tables.start))
    split = tables.left >= 0
    children = np.stack([tables.left, tables.right])
    if (split != (tables.right >= 0)).any() or (children >= size).any():
        return ["a node with a child outside its tree"]
    if (tables.feature[split] < 0).any() or (tables.feature[split] >= tables.n_features).any():
        return [f"a split on a feature outside 0 to {tables.n_features - 1}"]
    first = np.repeat(tables.start[:-1], np.diff(tables.start))
    # Not np.unique, which is slower and imports numpy.ma.
    parents = np.bincount((children + first)[:, split].ravel(), minlength=len(split))
    if (parents > 1).any() or parents[tables.start[:-1]].any():
        return ["a node that is reached on two ways"]
    return []


def _is_finite(tables: TreeTables) -> bool:
    """Return True if no row can have a margin that is infinite or NaN, whichever leaves the row reaches."""
    values = np.where((tables.left >= 0)[:, None], 0, np.abs(tables.leaf.astype(np.float64)))
    largest = np.maximum.reduceat(values, tables.start[:-1]) if tables.trees else np.zeros((0, 1))
    # Sums are rounded: stay far below the largest number.
    with np.errstate(over="ignore"):
        total = np.abs(tables.base.astype(np.float64)).max() + largest.max(axis=1, initial=0.0).sum()
    return bool(total < np.finfo(tables.sum_type).max / 2)


def _count_tests(tables: TreeTables) -> int:
    """Return the number of distinct tests, at most."""
    split = tables.left >= 0
    kind = (tables.feature.astype(np.int64) * 4 + tables.reading) * 2 + tables.default_left
    bits = tables.threshold.view(np.int32 if tables.value_type is np.float32 else np.int64)
    return int(np.unique(np.stack([kind[split], bits[split]]), axis=1).shape[1])


def unsupported(tables: TreeTables) -> tuple[str, ...]:
    """Return the reasons why ``TreeEngine`` cannot score these tables; empty if it can."""
    reasons = []
    split = tables.left >= 0
    numeric = split & ~tables.is_category
    if np.isnan(tables.threshold[numeric]).any():
        reasons.append("a threshold that is not a number")
    if not _is_finite(tables):
        reasons.append("leaves that are not finite, or whose sum may not be finite")
    leaves = np.add.reduceat(~split, tables.start[:-1], dtype=np.int64) if tables.trees else np.zeros(1, np.int64)
    if leaves.max() > MAX_LEAVES:
        reasons.append(f"a tree of {leaves.max()} leaves, more than {MAX_LEAVES}")
    if len(tables.categories) and tables.categories.max() >= MAX_CATEGORY:
        reasons.append(f"the category code {tables.categories.max()}, not below {MAX_CATEGORY}")
    if len(tables.categories) and tables.categories.min() < 0:
        reasons.append("a negative category code in a set")
    if split.sum() > MAX_TESTS:
        tests = _count_tests(tables)
        if tests > MAX_TESTS:
            reasons.append(f"{tests} distinct tests, more than {MAX_TESTS}")
    return tuple(reasons)


def checked_range(iteration_range: tuple[int, int], *, last: int, unit: str) -> tuple[int, int]:
    """Return [begin, end) with an end of 0 replaced by ``last``.

    :param last: number of rounds of the model.
    :param unit: the library's word for rounds, for the error.
    :raises ModelError: when the range is outside the model.
    """
    begin, end = iteration_range
    end = end or last
    if not 0 <= begin <= end <= last:
        raise ModelError(
            "the iteration range is outside the model",
            found=f"{begin} to {end}",
            expected=f"0 to {last}",
            next_step=f"choose {unit} that the model has",
        )
    return begin, end
