"""The ``dask`` step of `benchmarks.tpch`. Amounts are whole cents, and percents whole numbers: sums are exact."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pyarrow as pa

WHOLE = pd.ArrowDtype(pa.int64())


def _lines(part: pd.DataFrame) -> pd.DataFrame:
    cents = (part["l_extendedprice"] * 100).astype(WHOLE)
    percent = (part["l_discount"] * 100).astype(WHOLE)
    return pd.DataFrame(
        {
            "o_orderkey": part["l_orderkey"],
            "lines": (part["l_orderkey"] * 0 + 1).astype(WHOLE),
            "quantity": part["l_quantity"].astype(WHOLE),
            "revenue": cents * (100 - percent),
            "returned": (part["l_returnflag"] == "R").astype(WHOLE),
        }
    )


def customers(df: Any, orders: Any, customer: Any) -> Any:
    """Return a row for each customer with orders: lineitem joined with orders and customer, grouped."""
    lines = df.map_partitions(_lines, meta=_lines(df._meta))
    joined = lines.merge(orders[["o_orderkey", "o_custkey"]], on="o_orderkey")
    sums = joined.groupby("o_custkey", sort=False).agg(
        {"lines": "sum", "quantity": "sum", "revenue": "sum", "returned": "sum"}, split_out=8
    )
    grouped = sums.reset_index().rename(columns={"o_custkey": "c_custkey"})
    return grouped.merge(customer[["c_custkey", "c_nationkey", "c_mktsegment"]], on="c_custkey")
