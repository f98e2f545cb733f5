"""Steps for the integration tests."""

from __future__ import annotations

import sys
import warnings

import pandas as pd


def add_ratio(frame: pd.DataFrame) -> pd.DataFrame:
    """A column that a step makes."""
    return frame.assign(ratio=frame["balance"] / (frame["visits"] + 1))


def add_ratio_aloud(frame: pd.DataFrame) -> pd.DataFrame:
    """A step that prints and warns."""
    print(len(frame), "rows")
    warnings.warn("an old feature", stacklevel=1)
    return add_ratio(frame)


def drop_young(frame: pd.DataFrame) -> pd.DataFrame:
    """A step that drops rows."""
    return frame[frame["age"] >= 30]


def fail_on_thirteens(frame: pd.DataFrame) -> pd.DataFrame:
    """A step that raises on every id that ends in 13, one in a hundred."""
    if (frame["id"] % 100 == 13).any():
        raise ValueError("unlucky row")
    return frame


def fail_on_few(frame: pd.DataFrame) -> pd.DataFrame:
    """A step that raises on one id in five hundred: each of them takes some 25 calls to find."""
    if (frame["id"] % 500 == 13).any():
        raise ValueError("unlucky row")
    return frame


def always_fail(frame: pd.DataFrame) -> pd.DataFrame:
    """A step that never works."""
    raise KeyError("no_such_column")


def only_first_rows_work(frame: pd.DataFrame) -> pd.DataFrame:
    """A step that works on the sample a plan takes and on few rows after it."""
    if frame["id"].max() >= 1500:
        raise RuntimeError("works on the first rows only")
    return frame


def as_it_is(frame: pd.DataFrame) -> pd.DataFrame:
    """A step that changes nothing: what a repaired one may look like."""
    return frame


def fail_on_fewer(frame: pd.DataFrame) -> pd.DataFrame:
    """Half of `fail_on_few`."""
    if (frame["id"] % 1000 == 13).any():
        raise ValueError("unlucky row")
    return frame


def returns_nothing_on_a_worker(frame: pd.DataFrame) -> pd.DataFrame | None:
    """A step that breaks its contract, but not where it is tried before a job runs."""
    return None if "pipeline.execution.clusters.worker_setup" in sys.modules else frame


def keep_the_first_file(frame: pd.DataFrame) -> pd.DataFrame:
    """A step that leaves rows of small ids only: nearly all partitions end up empty."""
    return frame[frame["id"] < 3000]


def double_price(frame: pd.DataFrame) -> pd.DataFrame:
    """A column that a step makes of what a join has passed on."""
    return frame.assign(twice=frame["price"] * 2)


def refuse_order_13(frame: pd.DataFrame) -> pd.DataFrame:
    """A step that raises on one row."""
    if (frame["order"] == 13).any():
        raise ValueError("unlucky row")
    return frame


def joined(df, customers):
    """A join, as a dask step."""
    return df.merge(customers, on="customer")


def spent(df, customers):
    """A join and a groupby, as a dask step."""
    sums = joined(df, customers).groupby("country").agg({"price": "sum", "order": "count"}).reset_index()
    return sums.rename(columns={"order": "orders"})
