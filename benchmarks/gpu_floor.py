"""Measure the floor of a GPU: one process that reads and writes with pyarrow and predicts on the device.

    python -m benchmarks.gpu_floor DATA MODEL OUT THREADS

As ``benchmarks/floor.py``, with xgboost on the device, and a file at a time for each thread. Nothing is compared with
the CPU, checked or recorded. Prints one JSON object. Imports and the context of the device are not counted.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.models.flavors.xgboost_device import open_device

BATCH = 262_144


def main() -> None:
    data, model, out = (Path(argument) for argument in sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    device = open_device()
    device.memory()
    begin = time.perf_counter()
    booster = device.booster(model.read_bytes())

    def predict(matrix: Any) -> Any:
        return booster.inplace_predict(matrix, missing=np.nan, validate_features=False)

    def score_file(path: Path) -> int:
        file = pq.ParquetFile(path)
        names = booster.feature_names
        schema = file.schema_arrow.append(pa.field("prediction", pa.float32()))
        with pq.ParquetWriter(out / path.name, schema, use_dictionary=False) as writer:
            for batch in file.iter_batches(BATCH):
                upload = device.upload(batch.num_rows, len(names))
                for number, name in enumerate(names):
                    upload.host[:, number] = batch.column(name).to_numpy(zero_copy_only=False)
                upload.send(0, len(names))
                scores = upload.score(predict)
                writer.write_batch(pa.record_batch([*batch.columns, pa.array(scores)], schema=schema))
        return int(file.metadata.num_rows)

    with ThreadPoolExecutor(int(sys.argv[4])) as pool:
        rows = sum(pool.map(score_file, sorted(data.glob("*.parquet"))))
    print(json.dumps({"rows": rows, "wall": time.perf_counter() - begin}))


if __name__ == "__main__":
    main()
