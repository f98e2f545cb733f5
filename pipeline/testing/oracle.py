"""The oracle that every path must equal: one plain pandas loop over the files, with small real data for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

FEATURES = ("age", "balance", "visits", "tenure")
"""Columns on which `train_model` trains its model."""


@dataclass(frozen=True)
class Lake:
    """A directory of Parquet files."""

    path: Path
    files: tuple[Path, ...]
    """Paths in name order."""

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return sum(pq.read_metadata(file).num_rows for file in self.files)


def make_table(rows: int, *, seed: int, start: int = 0) -> pa.Table:
    """Return a table with the model's features, including nulls, and pass-through columns of many types.

    ``id`` is unique: ``start`` … ``start + rows - 1``.
    """
    random = np.random.default_rng(seed)
    missing = random.random(rows) < 0.1
    stamps = np.datetime64("2026-01-01T00:00:00", "us") + random.integers(0, 10**12, rows).astype("timedelta64[us]")
    return pa.table(
        {
            "id": pa.array(np.arange(start, start + rows), pa.int64()),
            "age": pa.array(random.integers(18, 90, rows), pa.int32()),
            "balance": pa.array(random.normal(1000, 400, rows), pa.float64(), mask=missing),
            "visits": pa.array(random.integers(0, 50, rows), pa.int64(), mask=missing[::-1].copy()),
            "tenure": pa.array(random.random(rows), pa.float32()),
            "name": pa.array([f"customer {i}" if i % 7 else None for i in range(start, start + rows)], pa.string()),
            "tags": pa.array([[f"t{i % 3}"] * (i % 4) for i in range(rows)], pa.list_(pa.string())),
            "price": pa.array([f"{i}.25" for i in range(rows)], pa.string()).cast(pa.decimal128(12, 2)),
            "seen": pa.array(stamps, pa.timestamp("us", tz="Europe/Berlin")),
            "segment": pa.array([("gold", "silver", None)[i % 3] for i in range(rows)]).dictionary_encode(),
        }
    )


def make_lake(
    path: Path, *, rows: Sequence[int] = (12_000, 2_000, 5_000, 40), row_group: int = 1500, seed: int = 7
) -> Lake:
    """Write one file per entry of ``rows``; ids continue from file to file."""
    path.mkdir(parents=True, exist_ok=True)
    files, start = [], 0
    for number, count in enumerate(rows):
        file = path / f"part-{number:03d}.parquet"
        pq.write_table(make_table(count, seed=seed + number, start=start), file, row_group_size=row_group)
        files.append(file)
        start += count
    return Lake(path, tuple(files))


def train_model(path: Path, *, rounds: int = 12, **params: Any) -> Path:
    """Train a small xgboost model on `FEATURES` and save it; a binary one unless ``params`` set another objective."""
    from pipeline.models.flavors.xgboost_train import train

    table = make_table(4000, seed=99)
    frame = table.select(FEATURES).to_pandas()
    target = (frame["age"] > 50) ^ (frame["balance"].fillna(0) > 1100) ^ (frame["tenure"] > 0.6)
    settings = {"objective": "binary:logistic", "max_depth": 4, "eta": 0.4, "seed": 5, **params}
    return train(frame, target.astype("float32"), path=path, params=settings, rounds=rounds)


def oracle(
    files: Sequence[Path],
    model: Path,
    *,
    features: Sequence[str] = FEATURES,
    output: str = "prediction",
    steps: Sequence[Callable[[pd.DataFrame], pd.DataFrame]] = (),
) -> pd.DataFrame:
    """Return every row of ``files`` with its prediction, in order, each file scored as a whole in plain pandas."""
    from pipeline.models.flavors.xgboost_train import predict

    parts: list[pd.DataFrame] = []
    for file in files:
        frame: pd.DataFrame = pq.read_table(file).to_pandas()
        for step in steps:
            frame = step(frame)
        parts.append(frame.assign(**{output: predict(frame[list(features)], model=model)}))
    return pd.concat(parts, ignore_index=True)
