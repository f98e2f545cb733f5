"""`TreeTables` reject inconsistent models, and name the features that the engine cannot score."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ModelError
from pipeline.models.trees import TreeEngine, TreeTables, unsupported
from pipeline.models.trees.tables import MAX_CATEGORY, VECTOR_LEAVES

STUMPS: dict[str, Any] = {
    "start": [0, 3, 6],
    "output": [0, 0],
    "feature": [0, 0, 0, 1, 0, 0],
    "threshold": [0.5, 0, 0, 0, 0, 0],
    "left": [1, -1, -1, 1, -1, -1],
    "right": [2, -1, -1, 2, -1, -1],
    "default_left": [True, False, False, False, False, False],
    "is_category": [False, False, False, True, False, False],
    "category_start": [0, 0, 0, 0, 2, 2, 2],
    "categories": [1, 4],
    "leaf": [[0.0], [1.0], [2.0], [0.0], [10.0], [20.0]],
    "base": [0.5],
    "n_features": 2,
}


def test_tables_are_typed_and_frozen() -> None:
    tables = TreeTables(**STUMPS)
    assert (tables.trees, tables.outputs) == (2, 1)
    assert (tables.threshold.dtype, tables.leaf.dtype, tables.start.dtype) == (np.float32, np.float32, np.int64)
    assert unsupported(tables) == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        tables.n_features = 3
    for copy in (tables, pickle.loads(pickle.dumps(tables))):
        with pytest.raises(ValueError, match="read-only"):
            copy.leaf[0] = 1


def test_stumps_are_scored() -> None:
    matrix = np.array([[0.4, 1], [0.5, 2], [np.nan, np.nan], [np.inf, 4]], np.float32)
    assert TreeEngine(TreeTables(**STUMPS)).margin(matrix).tolist() == [21.5, 12.5, 21.5, 22.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": [0.5]}, "threshold has 1 entries, expected 6"),
        ({"start": [0, 3]}, "start has 2 entries"),
        ({"start": [0, 6, 6]}, "start does not rise"),
        ({"category_start": [0, 0, 0, 0, 3, 3, 3]}, "number of categories"),
        ({"category_start": [0, 2, 0, 0, 2, 2, 2]}, "category_start does not rise"),
        ({"output": [0, 1]}, "an output outside 0 to 0"),
        ({"base": []}, "an output outside"),
        ({"leaf": [[0.0, 1.0]] * 6}, "leaf has the shape"),
        ({"leaf": [[0.0]] * 6, "base": [0, 0], "output": [0, VECTOR_LEAVES]}, "vector leaves"),
        ({"left": [3, -1, -1, 1, -1, -1]}, "a child outside its tree"),
        ({"right": [-1, -1, -1, 2, -1, -1]}, "a child outside its tree"),
        ({"left": [2, -1, -1, 1, -1, -1]}, "reached on two ways"),
        ({"left": [0, -1, -1, 1, -1, -1]}, "reached on two ways"),
        ({"feature": [2, 0, 0, 1, 0, 0]}, "a feature outside 0 to 1"),
    ],
)
def test_inconsistent_tables_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        TreeTables(**STUMPS | change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"threshold": [np.nan, 0, 0, 0, 0, 0]}, "a threshold that is not a number"),
        ({"categories": [1, MAX_CATEGORY]}, f"the category code {MAX_CATEGORY}, not below {MAX_CATEGORY}"),
        ({"categories": [-1, 4]}, "a negative category code in a set"),
    ],
)
def test_what_the_engine_cannot_do_is_named(change: dict[str, Any], reason: str) -> None:
    tables = TreeTables(**STUMPS | change)
    assert unsupported(tables) == (reason,)
    with pytest.raises(ModelError, match=reason):
        TreeEngine(tables)


def chain(splits: int) -> TreeTables:
    """A tree of one long branch, with a threshold of its own for every split."""
    node = np.arange(2 * splits + 1)
    split = (node % 2 == 0) & (node < 2 * splits)
    return TreeTables(
        start=[0, len(node)],
        output=[0],
        feature=np.zeros(len(node)),
        threshold=node,
        left=np.where(split, node + 1, -1),
        right=np.where(split, node + 2, -1),
        default_left=np.zeros(len(node)),
        is_category=np.zeros(len(node)),
        category_start=np.zeros(len(node) + 1),
        categories=[],
        leaf=node[:, None],
        base=[0],
        n_features=1,
    )


def test_too_many_leaves_are_named() -> None:
    assert unsupported(chain((1 << 16) - 1)) == ()
    assert unsupported(chain(1 << 16)) == ("a tree of 65537 leaves, more than 65536",)


def test_too_many_tests_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.models.trees.tables.MAX_TESTS", 99)
    assert unsupported(chain(99)) == ()
    assert unsupported(chain(100)) == ("100 distinct tests, more than 99",)
