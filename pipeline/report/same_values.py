"""Compare columns of two tables: bit by bit, within the tolerance of engines, or within a model's measured noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.plan.recipe import StageRecipe
from pipeline.scoring.arrow import first_difference, one_array


def noise_of(recipe: StageRecipe) -> dict[str, float]:
    """Return the largest difference that was measured between batches, for each output of a model without promise."""
    found: dict[str, float] = {}
    for score in recipe.scores:
        promise = score.model.promise
        if promise is not None and promise.kind == "code" and promise.noise:
            found |= {name: max(promise.noise, found.get(name, 0.0)) for name in score.outputs}
    return found


def differing_columns(
    one: pa.Table,
    other: pa.Table,
    *,
    outputs: Sequence[str] = (),
    tolerance: float = 0.0,
    noise: Mapping[str, float] | None = None,
) -> list[str]:
    """Return the columns in which two tables differ. NaN equals NaN.

    :param outputs: columns with scores; these may differ by the effect of ``tolerance`` on their margins.
    :param noise: largest difference by which columns of models without a promise may differ.
    """
    allowed = noise or {}
    if one.num_rows != other.num_rows:
        return [f"{one.num_rows:,} rows instead of {other.num_rows:,}"]
    if one.column_names != other.column_names:
        return [f"columns {one.column_names} instead of {other.column_names}"]
    differing = [name for name in one.column_names if not same_values(one.column(name), other.column(name))]
    return [
        name
        for name in differing
        if not (name in outputs and _near(one[name], other[name], tolerance))
        and not within_noise(one[name], other[name], allowed.get(name, 0.0))
    ]


def within_noise(one: pa.ChunkedArray, other: pa.ChunkedArray, noise: float) -> bool:
    """True if numbers, or lists of them, differ by no more than ``noise``, with nulls and NaN in the same places."""
    if not noise or one.type != other.type or not one.is_null().equals(other.is_null()):
        return False
    if pa.types.is_fixed_size_list(one.type):
        one, other = (pc.list_flatten(column) for column in (one, other))
    if not pa.types.is_floating(one.type):
        return False
    first, second = (column.drop_null().to_numpy().astype(np.float64) for column in (one, other))
    return len(first) == len(second) and np.allclose(first, second, rtol=0.0, atol=noise, equal_nan=True)


def _near(one: pa.ChunkedArray, other: pa.ChunkedArray, tolerance: float) -> bool:
    """True if scores differ by no more than ``tolerance`` of their margins explains.

    Sigmoid and softmax reduce differences; exp turns them into a factor.
    """
    if not tolerance or one.type != other.type or not pa.types.is_floating(one.type):
        return False
    return np.allclose(one.to_numpy(), other.to_numpy(), rtol=math.expm1(tolerance), atol=tolerance, equal_nan=True)


def same_values(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """True if two columns have the same type and bit-equal values, with NaN and nulls in the same places."""
    if one.type != other.type:
        return False
    if pa.types.is_floating(one.type):
        # In Arrow, NaN is unequal to itself, and 0.0 equals -0.0.
        bits = [np.asarray(column.drop_null().to_numpy()).tobytes() for column in (one, other)]
        return bits[0] == bits[1] and bool(one.is_null().equals(other.is_null()))
    if one.equals(other):
        return True
    # For containers with NaN, and for dictionaries that number the same values differently.
    return len(one) == len(other) and first_difference(one_array(one), one_array(other)) is None
