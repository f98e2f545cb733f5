"""Run a plain Dask DataFrame as its users do: ``read_parquet``, ``map_partitions``, ``to_parquet``.

DASK_PLACE is threads or processes.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
from distributed import Client, LocalCluster

from benchmarks.peers.common import CORES, arguments, features, load, nested_schema

IS_THREADED = os.environ.get("DASK_PLACE", "threads") == "threads"


@cache
def model_of(path: str) -> Any:
    return load(path, threads=1)


def score(frame: pd.DataFrame, path: str) -> pd.DataFrame:
    booster = model_of(path)
    found = booster.inplace_predict(frame[features(booster)].to_numpy(np.float32))
    return frame.assign(prediction=found)


def go() -> None:
    data, model, out = arguments()
    frame = dd.read_parquet(data)
    meta = frame._meta.assign(prediction=np.float32())
    frame.map_partitions(score, str(model), meta=meta).to_parquet(out, write_index=False, schema=nested_schema(data))


if __name__ == "__main__":
    if IS_THREADED:
        with dask.config.set(scheduler="threads", num_workers=CORES):
            go()
    else:
        with LocalCluster(n_workers=CORES, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
            go()
