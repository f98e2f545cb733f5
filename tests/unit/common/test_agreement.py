"""Sums about two columns of scores are the same, whichever rows are in a part and in which order parts come."""

from __future__ import annotations

import random
from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest

from pipeline.common.agreement import Agreement, compare_scores, merged

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
