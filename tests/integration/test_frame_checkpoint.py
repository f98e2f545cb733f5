"""A checkpoint of a join on real processes: a worker is killed, and what was finished is not computed again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
from distributed import Client, LocalCluster

import pipeline


def counted(part: pd.DataFrame, folder: str) -> pd.DataFrame:
    """Return the partition, and leave a file for each time it was computed; the process of the fifth dies once."""
    if not len(part):
        return part
    with open(Path(folder) / "computed", "a") as file:
        file.write(f"{part['key'].min()}\n")
    kept = len(list(Path(folder).glob("kept/*/receipts/*")))
    dead = Path(folder) / "dead"
    if kept >= 4 and not dead.exists():
        dead.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return part


def test_a_killed_worker_costs_its_own_partitions(tmp_path):
    left = pd.DataFrame({"key": np.arange(4000), "x": np.arange(4000) % 13})
    right = pd.DataFrame({"key": np.arange(0, 4000, 2), "y": np.arange(2000)})
    joined = dd.from_pandas(left, npartitions=10).merge(dd.from_pandas(right, npartitions=10), on="key")
    expression = joined.map_partitions(counted, str(tmp_path), meta=joined._meta)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        kept = pipeline.checkpoint(expression, tmp_path / "kept")
        assert (tmp_path / "dead").exists()
        assert not client.futures, "no partition stays in memory"
        rows = kept.compute().sort_values("key").reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, left.merge(right, on="key"), check_dtype=False)
    times = pd.Series((tmp_path / "computed").read_text().split()).value_counts()
    assert len(times) == kept.npartitions == 10
    # Those without a receipt may have been in memory, of a worker or of the join; of the four that have one, only the
    # one that is compared after the loss.
    assert (times > 1).sum() <= 10 - 4 + 1
    assert times.max() <= 3
