"""Distances of distributions, against their formulas on the values themselves."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest

from pipeline.common.sketch import NumberSketch, Sketches, ValueSketch
from pipeline.report.distributions import FLOOR, Distribution, Drift, distributions_of, drift_of, drifts


def number(values: np.ndarray, nulls: int = 0) -> NumberSketch:
    sketch = NumberSketch()
    sketch.add(values, nulls=nulls)
    return sketch


def texts(**counts: int) -> ValueSketch:
    sketch = ValueSketch()
    sketch.add(counts)
    return sketch


def exact_psi(baseline: np.ndarray, now: np.ndarray) -> float:
    """PSI over the deciles of the values themselves."""
    edges = np.quantile(baseline, np.linspace(0, 1, 11))
    edges[0], edges[-1] = -np.inf, np.inf
    # Equal deciles of whole numbers leave cells empty; a share of none has no logarithm.
    one, two = (np.maximum(np.histogram(values, edges)[0] / len(values), FLOOR) for values in (baseline, now))
    return float(np.sum((two - one) * np.log(two / one)))


def drift(baseline: NumberSketch | ValueSketch, now: NumberSketch | ValueSketch) -> Drift:
    found = drift_of("x", baseline, now)
    assert found is not None
    return found


@pytest.mark.parametrize(("shift", "scale"), [(0.2, 1.0), (0.0, 1.3), (1.0, 1.0), (0.05, 1.0)])
@pytest.mark.parametrize("shape", ["normal", "lognormal"])
def test_psi_and_ks_are_those_of_the_values(shape: str, shift: float, scale: float) -> None:
    numbers = np.random.default_rng(1)
    one, two = numbers.normal(size=200_000), shift + scale * numbers.normal(size=200_000)
    if shape == "lognormal":
        one, two = np.exp(one), np.exp(two)
    found = drift(number(one), number(two))
    assert found.psi == pytest.approx(exact_psi(one, two), rel=0.01, abs=2e-4)
    both = np.sort(np.concatenate([one, two]))
    ks = np.abs(np.searchsorted(np.sort(one), both, "right") - np.searchsorted(np.sort(two), both, "right")).max()
    assert found.ks == pytest.approx(ks / len(one), rel=0.01, abs=2e-4)


@pytest.mark.parametrize("shift", [1, 3, 10])
@pytest.mark.parametrize("most", [8, 40, 90, 5000])
def test_psi_of_whole_numbers_is_that_of_the_values(most: int, shift: int) -> None:
    numbers = np.random.default_rng(2)
    one, two = (np.clip(numbers.normal(most / 2 + move, most / 6, 100_000), 0, most).astype(int) for move in (0, shift))
    assert drift(number(one), number(two)).psi == pytest.approx(exact_psi(one, two), rel=0.01, abs=2e-4)


def test_the_same_rows_have_no_distance() -> None:
    values = np.random.default_rng(1).normal(size=1000)
    same = drift(number(values), number(values))
    assert (same.psi, same.js, same.ks) == (0.0, 0.0, 0.0)
    apart = drift(number(values), number(values + 100))
    # All rows are in the last cell, which has a tenth of the baseline.
    assert apart.js == pytest.approx((0.9 + 0.1 * np.log2(0.1 / 0.55) + np.log2(1 / 0.55)) / 2, rel=0.01)
    assert apart.ks == 1.0


def test_missing_values_are_a_cell() -> None:
    values = np.arange(1.0, 1001.0)
    assert drift(number(values), number(values, nulls=500)).psi > 0.25
    assert drift(number(np.empty(0), nulls=10), number(values)).psi > 1


def test_a_value_that_half_of_the_rows_have_is_a_cell() -> None:
    values = np.concatenate([np.zeros(5000), np.arange(5000) + 1.0])
    assert drift(number(values), number(np.concatenate([values, np.zeros(10_000)]))).psi == pytest.approx(
        0.275, rel=0.05
    )


def test_texts_are_compared_by_value() -> None:
    found = drift(texts(a=50, b=50), texts(a=50, b=25, c=25))
    # By hand: b falls from 0.5 to 0.25, and what is new rises from the floor to 0.25.
    assert found.psi == pytest.approx(-0.25 * np.log(0.5) + (0.25 - 1e-4) * np.log(0.25 / 1e-4))
    assert found.new_values == ("c",)
    assert found.ks is None
    many = texts(a=50)
    many.add({}, others=50)
    assert drift(many, texts(a=50, b=50)).new_values == ()  # b may be one of the others


def test_columns_that_cannot_be_compared() -> None:
    assert drift_of("x", NumberSketch(), number(np.ones(2))) is None
    assert drift_of("x", texts(a=1), number(np.ones(2))) is None
    one, two = Sketches(), Sketches()
    one.add(pa.table({"x": [1.0], "old": [1.0]}))
    two.add(pa.table({"new": [1.0], "x": [1.0]}))
    assert [found.column for found in drifts(one, two)] == ["x"]


def test_figures_come_back_from_json() -> None:
    sketches = Sketches()
    sketches.add(pa.table({"plan": ["a", "a", "b"], "p": [1, 3, None], "empty": pa.array([None] * 3, pa.float64())}))
    found = distributions_of(sketches, ["p"])
    assert [one.column for one in found] == ["p", "plan", "empty"]
    assert [Distribution.from_dict(json.loads(json.dumps(asdict(one)))) for one in found] == list(found)
    assert found[0].text() == "p: mean 2, 5 % 1, median 1, 95 % 3, 1 null"
    assert found[1].text() == "plan: a 66.7%, b 33.3%"
