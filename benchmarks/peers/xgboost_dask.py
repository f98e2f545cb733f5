"""Run ``inplace_predict`` of ``xgboost.dask`` on a Dask DataFrame."""

from __future__ import annotations

import dask.dataframe as dd
import numpy as np
from distributed import Client, LocalCluster
from xgboost import dask as dxgb

from benchmarks.peers.common import CORES, arguments, features, load, nested_schema


def main() -> None:
    data, model, out = arguments()
    with (
        LocalCluster(n_workers=CORES, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        booster = load(model, threads=1)
        frame = dd.read_parquet(data)
        found = dxgb.inplace_predict(client, booster, frame[features(booster)])
        frame = frame.assign(prediction=found.astype(np.float32))
        frame.to_parquet(out, write_index=False, schema=nested_schema(data))


if __name__ == "__main__":
    main()
