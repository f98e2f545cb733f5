"""Measure the floor: one process that reads and writes with pyarrow and calls ``inplace_predict`` on every core.

    python -m benchmarks.floor DATA MODEL OUT

Prints one JSON object. Imports are not counted; loading the model is.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xgboost

BATCH = 131_072


def matrix(batch: pa.RecordBatch, names: list[str]) -> np.ndarray:
    out = np.empty((batch.num_rows, len(names)), np.float32)
    for number, name in enumerate(names):
        out[:, number] = batch.column(name).to_numpy(zero_copy_only=False)
    return out


def score_file(booster: xgboost.Booster, path: Path, out: Path) -> int:
    file = pq.ParquetFile(path)
    schema = file.schema_arrow.append(pa.field("prediction", pa.float32()))
    # Dictionaries cost CPU and enlarge files of distinct floats; the floor uses them for texts only.
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    with pq.ParquetWriter(out, schema, use_dictionary=texts or False) as writer:
        for batch in file.iter_batches(BATCH):
            scores = booster.inplace_predict(matrix(batch, booster.feature_names))
            writer.write_batch(pa.record_batch([*batch.columns, pa.array(scores)], schema=schema))
    return int(file.metadata.num_rows)


def main() -> None:
    data, model, out = (Path(argument) for argument in sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    before, clock = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    booster = xgboost.Booster(model_file=str(model))
    booster.set_param({"nthread": os.cpu_count()})
    rows = sum(score_file(booster, path, out / path.name) for path in sorted(data.glob("*.parquet")))
    after, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - clock
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"rows": rows, "cpu": cpu, "wall": wall, "peak": after.ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
