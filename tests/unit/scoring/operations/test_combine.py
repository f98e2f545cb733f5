"""Scores of several models become one a row, the same in any batch."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.scoring.operations.combine import combine_scores

ONE, TWO, THREE = (np.array(values, np.float32) for values in ([0.1, 0.5, 0.9], [0.2, 0.5, 0.1], [0.3, 0.8, 0.2]))


@pytest.mark.parametrize(
    ("combine", "weights", "expected"),
    [
        ("mean", (), [0.2, 0.6, 0.4]),
        ("mean", (2.0, 1.0, 1.0), [0.175, 0.575, 0.525]),
        ("mean", (0.0, 0.0, 3.0), [0.3, 0.8, 0.2]),
        ("median", (), [0.2, 0.5, 0.2]),
        ("max", (), [0.3, 0.8, 0.9]),
        ("min", (), [0.1, 0.5, 0.1]),
    ],
)
def test_values_are_combined_in_float64(combine: str, weights: tuple[float, ...], expected: list[float]) -> None:
    found = combine_scores([ONE, TWO, THREE], combine, weights=weights)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-7)


def test_float64_sums_do_not_lose_what_float32_would() -> None:
    big, small = np.array([2**25], np.float32), np.array([1], np.float32)
    assert combine_scores([big, small, -big], "mean").tolist() == [np.float32(1 / 3)]


def test_several_outputs_are_combined_one_by_one() -> None:
    one, two = np.array([[1, 2], [3, 4]], np.float32), np.array([[3, 2], [1, 0]], np.float32)
    assert combine_scores([one, two], "mean").tolist() == [[2, 2], [2, 2]]


def test_a_row_has_the_same_bits_alone() -> None:
    random = np.random.default_rng(3)
    scores = [random.random(500).astype(np.float32) for _ in range(7)]
    for combine in ("mean", "median"):
        whole = combine_scores(scores, combine)
        alone = [combine_scores([one[n : n + 1] for one in scores], combine)[0] for n in range(500)]
        assert whole.tobytes() == np.array(alone).tobytes()


def test_the_most_frequent_label_wins_and_of_several_the_earliest_models() -> None:
    labels = [np.array(values, np.int32) for values in ([1, 1, 0, 2], [1, 0, 0, 1], [0, 0, 2, 0])]
    voted = combine_scores(labels, "vote")
    assert (voted.dtype, voted.tolist()) == (np.int32, [1, 0, 0, 2])
    four = [np.array([value], np.int32) for value in (0, 1, 1, 0)]
    assert combine_scores(four, "vote").tolist() == [0]
