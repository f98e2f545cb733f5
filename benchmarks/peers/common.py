"""Common parts of the peers' scripts: their arguments, and the input matrix of an Arrow batch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xgboost

BATCH = 131_072
CORES = int(os.environ.get("BENCHMARK_CORES", os.cpu_count() or 1))


def arguments() -> tuple[Path, Path, Path]:
    """Return the folder of the input, the file of the model, and the folder for the output, which is created."""
    data, model, out = (Path(argument) for argument in sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    return data, model, out


def load(model: str | Path, *, threads: int) -> xgboost.Booster:
    booster = xgboost.Booster(model_file=str(model))
    booster.set_param({"nthread": threads})
    return booster


def features(booster: xgboost.Booster) -> list[str]:
    return list(booster.feature_names or [])


def nested_schema(data: Path) -> pa.Schema | str:
    """Return the output's Arrow schema if it has nested columns, which pandas' dtypes do not show; else ``infer``."""
    schema = pq.read_schema(next(data.glob("**/*.parquet"))).append(pa.field("prediction", pa.float32()))
    return schema if any(pa.types.is_nested(field.type) for field in schema) else "infer"


def matrix(table: pa.Table | pa.RecordBatch, names: list[str]) -> np.ndarray:
    """Return float32 [rows, features], with NaN for missing values."""
    out = np.empty((table.num_rows, len(names)), np.float32)
    for number, name in enumerate(names):
        out[:, number] = table.column(name).to_numpy(zero_copy_only=False)
    return out
