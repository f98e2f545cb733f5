"""Agreement of a challenger's scores with those of another column: sums that do not depend on their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pipeline.common.pickling import fast_pickle

Decision = Literal["half", "zero", "equal", ""]
"""Rule for two scores to agree: the same side of 0.5, or of 0; equal labels; none, for scores without a decision."""
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

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            rows=self.rows + other.rows,
            agreed=self.agreed + other.agreed,
            sum=self.sum + other.sum,
            sum_absolute=self.sum_absolute + other.sum_absolute,
            largest=max(self.largest, other.largest),
            missing=self.missing + other.missing,
            errors=self.errors + other.errors,
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
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Agreement:
        """Inverse of `to_dict`."""
        return Agreement(**record)


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
    one, two, difference, units = (values[known] for values in (challenger, other, difference, units))
    same = {"half": (one >= 0.5) == (two >= 0.5), "zero": (one >= 0) == (two >= 0), "equal": one == two}.get(decision)
    return Agreement(
        rows=len(one),
        agreed=0 if same is None else int(np.count_nonzero(same)),
        sum=_exact_sum(units),
        sum_absolute=_exact_sum(np.abs(units)),
        largest=float(np.abs(difference).max(initial=0.0)),
        missing=len(known) - len(one),
        errors=errors,
    )


def _exact_sum(units: np.ndarray) -> int:
    """Return the sum of whole numbers without rounding."""
    if float(np.abs(units).max(initial=0.0)) * max(1, len(units)) < 2.0**62:
        return int(units.astype(np.int64).sum())
    return sum(map(int, units.tolist()))
