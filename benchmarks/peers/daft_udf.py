"""Daft: ``read_parquet``, a batch function of the model's columns, ``write_parquet``."""

from __future__ import annotations

from functools import cache
from typing import Any

import daft
import numpy as np

from benchmarks.peers.common import CORES, arguments, features, load


@cache
def model_of(path: str) -> Any:
    return load(path, threads=CORES)


def main() -> None:
    data, model, out = arguments()
    names = features(load(model, threads=1))
    path = str(model)

    @daft.func.batch(return_dtype=daft.DataType.float32())
    def score(*columns: Any) -> Any:
        out = np.empty((len(columns[0]), len(columns)), np.float32)
        for number, column in enumerate(columns):
            out[:, number] = column.to_arrow().to_numpy(zero_copy_only=False)
        return model_of(path).inplace_predict(out)

    frame = daft.read_parquet(f"{data}/**/*.parquet")
    frame.with_column("prediction", score(*(frame[name] for name in names))).write_parquet(str(out))


if __name__ == "__main__":
    main()
