"""Polars: scan file by file, score batches of the model's columns, write."""

from __future__ import annotations

import numpy as np
import polars as pl

from benchmarks.peers.common import BATCH, CORES, arguments, features, load


def main() -> None:
    data, model, out = arguments()
    booster = load(model, threads=CORES)
    names = features(booster)
    for path in sorted(data.glob("**/*.parquet")):
        frame = pl.read_parquet(path)
        parts = []
        for start in range(0, frame.height, BATCH):
            part = frame[start : start + BATCH].select(names).cast(pl.Float32).fill_null(float("nan"))
            parts.append(booster.inplace_predict(np.ascontiguousarray(part.to_numpy())))
        scored = frame.with_columns(pl.Series("prediction", np.concatenate(parts), dtype=pl.Float32))
        scored.write_parquet(out / path.name, compression="snappy")


if __name__ == "__main__":
    main()
