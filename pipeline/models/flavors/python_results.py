"""Turn what a model in Python returns into an array with one result a row. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import BadPrediction


def result_values(result: Any, names: tuple[str, ...], *, rows: int) -> np.ndarray:
    """Return a result as an array; rows of a Series or a frame in the order of its index."""
    import pandas as pd

    if isinstance(result, (pa.Array, pa.ChunkedArray)):
        result = pd.Series(result.to_pandas())
    if isinstance(result, (pd.Series, pd.DataFrame)):
        order = pd.RangeIndex(rows)
        if not result.index.equals(order):
            if len(result) != rows or not result.index.sort_values().equals(order):
                raise wrong_result(result, "one result a row, with the index of the frame")
            result = result.reindex(order)
        if isinstance(result, pd.DataFrame) and names:
            if missing := sorted(set(names) - set(map(str, result.columns))):
                raise wrong_result(result, f"the columns {', '.join(missing)}, as declared")
            result = result[list(names)]
        values: np.ndarray = result.to_numpy()
        return values
    found = np.asarray(result)
    if found.dtype == object and found.ndim == 1 and rows and isinstance(found[0], (np.ndarray, list, tuple)):
        return np.stack([np.asarray(row) for row in found])
    return found


def wrong_result(result: Any, expected: str, values: np.ndarray | None = None) -> BadPrediction:
    """Return the error for a result that is not what the model declares."""
    found = type(result).__name__ if values is None else f"{values.dtype} {list(values.shape)}"
    return BadPrediction(
        "the model did not return what it declares",
        found=found,
        expected=expected,
        next_step="fix predict, or what the model declares in outputs",
    )
