"""Thresholds of tests ``value <= threshold``, as thresholds of the engine's ``value < threshold``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.models.trees.tables import Floats


def next_above(thresholds: npt.NDArray[Any], value_type: type[np.float32] | type[np.float64]) -> Floats:
    """Return the smallest value of ``value_type`` above each threshold, infinity where there is none.

    ``value <= threshold`` is ``value < next_above(threshold)`` for every value of that type, unless the threshold is
    infinity.
    """
    with np.errstate(over="ignore"):
        rounded = thresholds.astype(value_type)
        above: Floats = np.where(rounded > thresholds, rounded, np.nextafter(rounded, value_type(np.inf)))
    return above
