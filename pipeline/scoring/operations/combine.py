"""Combine the scores of several models for the same rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def combine_scores(scores: Sequence[np.ndarray], combine: str, *, weights: Sequence[float] = ()) -> np.ndarray:
    """Return one score a row, in the dtype of the first model's.

    A row's result depends on its own scores only, so that it has the same bits in any batch.

    :param scores: of each model, [rows] or [rows, outputs].
    :param combine: ``mean``, ``median``, ``max``, ``min``, or ``vote`` for labels.
    :param weights: one for each model, for a weighted ``mean``.
    """
    if combine == "vote":
        return _most_frequent(scores)
    values = [one.astype(np.float64) for one in scores]
    if combine == "mean":
        shares = weights or (1.0,) * len(values)
        total = values[0] * shares[0]
        for value, share in zip(values[1:], shares[1:], strict=True):
            total += value * share
        combined = total / sum(shares)
    elif combine == "median":
        combined = np.median(np.stack(values), axis=0)
    else:
        combined = (np.maximum if combine == "max" else np.minimum).reduce(values)
    result: np.ndarray = combined.astype(scores[0].dtype)
    return result


def _most_frequent(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Return the label that most models gave; of several, the one of the earliest model."""
    stacked = np.stack(labels)
    votes = (stacked[:, None] == stacked[None, :]).sum(axis=1)
    first = votes.argmax(axis=0)
    result: np.ndarray = np.take_along_axis(stacked, first[None], axis=0)[0]
    return result
