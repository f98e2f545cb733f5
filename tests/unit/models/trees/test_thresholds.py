"""`value <= threshold` is `value < next_above(threshold)`, for values of either precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.trees.thresholds import next_above

NUMBERS = st.floats(allow_nan=False)
SINGLES = st.floats(allow_nan=False, width=32)


@given(
    threshold=NUMBERS.filter(lambda value: value != np.inf), value=SINGLES, step=st.sampled_from([-np.inf, 0, np.inf])
)
@pytest.mark.parametrize("value_type", [np.float32, np.float64])
def test_comparison_is_the_same(value_type: type, threshold: float, value: float, step: float) -> None:
    with np.errstate(over="ignore", under="ignore"):
        near = value_type(threshold)
        values = [value_type(value), near, np.nextafter(near, value_type(step))]
        (above,) = next_above(np.array([threshold]), value_type)
    assert above.dtype == value_type
    for found in values:
        assert (found < above) == (np.float64(found) <= threshold)


@pytest.mark.parametrize("value_type", [np.float32, np.float64])
def test_nothing_is_above_the_largest_number_but_infinity(value_type: type) -> None:
    largest = np.finfo(value_type).max
    assert next_above(np.array([largest, -np.inf, -0.0]), value_type).tolist() == [
        np.inf,
        -largest,
        np.finfo(value_type).smallest_subnormal,
    ]
