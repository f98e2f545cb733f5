"""Sums about two columns of scores are the same, whichever rows are in a part and in which order parts come."""

from __future__ import annotations

import json
import random
from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest

from pipeline.common.agreement import Agreement, buckets, compare_scores, merged

NAN, INF = float("nan"), float("inf")


def test_differences_and_decisions_are_counted() -> None:
    found = compare_scores(
        np.array([0.25, 0.75, 0.5, NAN, INF, 0.0]), np.array([0.5, 1.0, 0.5, 0.1, 0.2, NAN]), decision="half", errors=2
    )
    assert (found.rows, found.agreed, found.missing, found.errors) == (3, 2, 3, 2)
    assert (found.mean, found.mean_absolute, found.largest) == (pytest.approx(-1 / 6), pytest.approx(1 / 6), 0.25)


@pytest.mark.parametrize(("decision", "agreed"), [("half", 2), ("zero", 3), ("equal", 1), ("", 0)])
def test_what_agrees_depends_on_the_kind_of_score(decision: str, agreed: int) -> None:
    one, other = np.array([1.0, 0.2, -1.0, 3.0]), np.array([1.0, 0.7, 2.0, 0.6])
    assert compare_scores(one, other, decision=decision).agreed == agreed  # type: ignore[arg-type]


def test_any_cut_and_order_gives_the_same_sums() -> None:
    numbers = np.random.default_rng(5)
    scale = 10.0 ** numbers.integers(-12, 12, 3000)
    one, other = numbers.normal(size=3000) * scale, numbers.normal(size=3000) * scale
    whole = compare_scores(one, other, decision="zero")
    for seed in range(20):
        edges = [0, *sorted(random.Random(seed).sample(range(3000), 6)), 3000]
        parts = [compare_scores(one[a:b], other[a:b], decision="zero") for a, b in pairwise(edges)]
        random.Random(seed).shuffle(parts)
        assert reduce(add, parts) == whole


def test_huge_differences_do_not_overflow() -> None:
    found = compare_scores(np.full(4, 1e200), np.full(4, -1e200), decision="")
    assert found.sum == 4 * int(2e200 * 2**30)
    assert compare_scores(np.array([1e308]), np.array([-1e308]), decision="") == Agreement(missing=1)
    assert found.mean == pytest.approx(2e200)


def test_columns_are_merged_by_name() -> None:
    one, other = Agreement(rows=1), Agreement(rows=2, largest=3.0)
    assert merged({"p": one}, {"p": other, "q": one}) == {"p": Agreement(rows=3, largest=3.0), "q": one}


def test_it_comes_back_from_json() -> None:
    found = Agreement(1, 1, 2**70, 2**71, 0.5, 3, 4)
    assert Agreement.from_dict(found.to_dict()) == found


def test_the_histogram_has_every_compared_row_in_the_buckets_of_both_scores() -> None:
    one, other = np.array([0.0, 0.5, 1.0, 0.99, NAN]), np.array([0.0, 0.03, 0.5, 0.5, 0.1])
    found = compare_scores(one, other, decision="half")
    assert found.histogram == {0: 1, 16 * 32: 1, 31 * 32 + 16: 2}
    twice = found + found
    assert twice.histogram == {0: 2, 16 * 32: 2, 31 * 32 + 16: 4}
    assert Agreement.from_dict(json.loads(json.dumps(twice.to_dict()))) == twice


@pytest.mark.parametrize(
    ("decision", "scores", "expected"),
    [
        ("half", [-0.1, 0.0, 0.031, 0.04, 0.999, 1.0, 7.0], [0, 0, 0, 1, 31, 31, 31]),
        ("equal", [0.0, 3.0, 40.0], [0, 3, 31]),
        ("zero", [0.0, 1.0, -1.0, 4.0, 1e-30, 1e30, -1e30], [16, 24, 8, 25, 17, 31, 1]),
    ],
)
def test_a_bucket_depends_on_the_score_alone(decision: str, scores: list[float], expected: list[int]) -> None:
    assert buckets(np.array(scores), decision).tolist() == expected  # type: ignore[arg-type]
    assert [int(buckets(np.array([score]), decision)[0]) for score in scores] == expected  # type: ignore[arg-type]


def test_a_comparison_stored_before_there_were_histograms_is_read() -> None:
    record = {"rows": 2, "agreed": 1, "sum": 0, "sum_absolute": 0, "largest": 0.0, "missing": 0, "errors": 0}
    assert Agreement.from_dict(record) == Agreement(rows=2, agreed=1)
