"""Agreement of a challenger's scores with those of another column: sums that do not depend on their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline.common.pickling import fast_pickle

Decision = Literal["half", "zero", "equal", ""]
"""Rule for two scores to agree: the same side of 0.5, or of 0; equal labels; none, for scores without a decision."""
BUCKETS = 32
"""Buckets of a score in the histogram of a comparison."""
UNIT = 1 << 30
"""Differences are summed as integers of 1 / UNIT, so that the sum is the same in any order."""


@fast_pickle
@dataclass(frozen=True, slots=True)
class Agreement:
    """Comparison of two columns of scores over some rows."""

    rows: int = 0
    """Rows whose two scores were compared."""
    agreed: int = 0
    """Rows with the same decision; 0 for scores without one."""
    sum: int = 0
    """Sum of the differences challenger - other, in units of 1 / `UNIT`."""
    sum_absolute: int = 0
    """Sum of the absolute differences, in the same unit."""
    largest: float = 0.0
    """Largest absolute difference."""
    missing: int = 0
    """Rows in which one of the two scores is null or not finite."""
    errors: int = 0
    """Rows that the challenger could not score."""
    histogram: Mapping[int, int] = field(default_factory=dict)
    """Compared rows by `BUCKETS` × bucket of the challenger's score + bucket of the other; see `buckets`."""
    seconds: float = 0.0
    """Seconds of the challenger's predictions."""
    other_seconds: float = 0.0
    """Seconds of the predictions of the other column; 0.0 if no ``score`` step made it."""

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            rows=self.rows + other.rows,
            agreed=self.agreed + other.agreed,
            sum=self.sum + other.sum,
            sum_absolute=self.sum_absolute + other.sum_absolute,
            largest=max(self.largest, other.largest),
            missing=self.missing + other.missing,
            errors=self.errors + other.errors,
            histogram=dict(Counter(self.histogram) + Counter(other.histogram)),
            seconds=self.seconds + other.seconds,
            other_seconds=self.other_seconds + other.other_seconds,
        )

    @property
    def mean(self) -> float:
        """Mean difference challenger - other; 0.0 without rows."""
        return self.sum / UNIT / self.rows if self.rows else 0.0

    @property
    def mean_absolute(self) -> float:
        """Mean absolute difference; 0.0 without rows."""
        return self.sum_absolute / UNIT / self.rows if self.rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {**asdict(self), "histogram": {str(cell): count for cell, count in sorted(self.histogram.items())}}

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Agreement:
        """Inverse of `to_dict`."""
        cells = record.get("histogram", {})
        return Agreement(**{**record, "histogram": {int(cell): count for cell, count in cells.items()}})


def merged(one: Mapping[str, Agreement], other: Mapping[str, Agreement]) -> dict[str, Agreement]:
    """Return the agreements of two parts, by column."""
    return {name: one.get(name, Agreement()) + other.get(name, Agreement()) for name in {**one, **other}}


def compare_scores(challenger: np.ndarray, other: np.ndarray, *, decision: Decision, errors: int = 0) -> Agreement:
    """Compare two scores of each row.

    :param challenger: float64 [rows]; NaN where a score is missing.
    :param other: float64 [rows].
    :param errors: further rows, which the challenger could not score.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        difference = challenger - other
        units = np.rint(difference * UNIT)
    known = np.isfinite(units)
    one, two = challenger, other
    if not known.all():
        one, two, difference, units = (values[known] for values in (challenger, other, difference, units))
    return Agreement(
        rows=len(one),
        agreed=_agreed(one, two, decision),
        sum=_exact_sum(units),
        sum_absolute=_exact_sum(np.abs(units)),
        largest=float(np.abs(difference).max(initial=0.0)),
        missing=len(known) - len(one),
        errors=errors,
        histogram=_histogram(one, two, decision),
    )


def _agreed(one: np.ndarray, two: np.ndarray, decision: Decision) -> int:
    """Return the number of rows with the same decision; 0 for scores without one."""
    if not decision:
        return 0
    limit = {"half": 0.5, "zero": 0.0}.get(decision)
    same = one == two if limit is None else (one >= limit) == (two >= limit)
    return int(np.count_nonzero(same))


def buckets(scores: np.ndarray, decision: Decision) -> np.ndarray:
    """Return the bucket of each score, from 0 to `BUCKETS` - 1, int64 [rows]; it depends on the score alone.

    :param scores: finite float64 [rows].
    :param decision: ``half``: of equal width from 0 to 1. ``equal``: the label, higher ones in the last bucket. Else by
        sign and size: zero is in bucket 16, and each bucket further is four times as far from it, from 2⁻¹⁴ to 2¹⁵.
    """
    if decision == "half":
        found = np.floor(scores * BUCKETS)
    elif decision == "equal":
        found = scores
    else:
        _, exponents = np.frexp(scores)
        levels = np.clip((exponents + 13) >> 1, 0, BUCKETS // 2 - 2) + 1
        found = BUCKETS // 2 + np.sign(scores) * levels
    clipped: np.ndarray = np.clip(found, 0, BUCKETS - 1).astype(np.int64)
    return clipped


def _histogram(challenger: np.ndarray, other: np.ndarray, decision: Decision) -> dict[int, int]:
    counts = np.bincount(buckets(challenger, decision) * BUCKETS + buckets(other, decision))
    cells = np.flatnonzero(counts)
    return dict(zip(cells.tolist(), counts[cells].tolist(), strict=True))


def _exact_sum(units: np.ndarray) -> int:
    """Return the sum of whole numbers without rounding."""
    if max(units.max(initial=0.0), -units.min(initial=0.0)) * max(1, len(units)) < 2.0**62:
        return int(units.astype(np.int64).sum())
    return sum(map(int, units.tolist()))
