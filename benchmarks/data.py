"""Data and models for the benchmarks: generated, the same for the same arguments, kept in ``benchmarks/data/``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HOME = Path(__file__).parent / "data"
FEATURES = 28
ROW_GROUP = 125_000


def sizes(kind: str, rows: int) -> list[int]:
    """Rows per file: ``even`` (10 files), ``skewed`` (one file with half the rows), ``tiny`` (500 rows each)."""
    if kind == "even":
        return [rows // 10] * 10
    if kind == "skewed":
        return [rows // 18] * 5 + [rows // 2] + [rows // 18] * 4
    if kind == "tiny":
        return [500] * (rows // 500)
    raise ValueError(f"no data set {kind!r}: even, skewed, tiny")


def names() -> list[str]:
    return [f"f{i:02d}" for i in range(FEATURES)]


def table(rows: int, *, seed: int) -> pa.Table:
    """float32 features, 2 % missing in every fourth column."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((FEATURES, rows), dtype=np.float32)
    columns = []
    for number in range(FEATURES):
        mask = random.random(rows, dtype=np.float32) < 0.02 if number % 4 == 3 else None
        columns.append(pa.array(values[number], mask=mask))
    return pa.table(columns, names=names())


def _pieces(count: int, seed: int) -> Iterator[pa.Table]:
    while count > 0:
        rows = min(count, ROW_GROUP)
        yield table(rows, seed=seed)
        count -= rows
        seed += 1


def make_data(kind: str, rows: int) -> Path:
    """Folder of the data set; made when it is not there."""
    home = HOME / f"{kind}-{rows}"
    if (home / ".done").exists():
        return home
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    for number, count in enumerate(sizes(kind, rows)):
        with pq.ParquetWriter(home / f"part-{number:05d}.parquet", table(0, seed=0).schema) as writer:
            for piece in _pieces(count, 1000 * number):
                writer.write_table(piece)
    (home / ".done").touch()
    return home


def make_model(trees: int, depth: int) -> Path:
    """Binary xgboost model over `names`; made when it is not there."""
    path = HOME / f"model-{trees}x{depth}.ubj"
    if not path.exists():
        from pipeline.flavors.xgboost_train import train

        frame = table(40_000, seed=424_242).to_pandas()
        score = frame["f00"] + frame["f01"] * frame["f02"] - frame["f04"].abs() + frame["f05"] * frame["f06"]
        noise = np.random.default_rng(1).standard_normal(len(frame))
        params = {"objective": "binary:logistic", "max_depth": depth, "eta": 0.1, "nthread": 2, "seed": 3}
        train(frame, (score + noise > 0).astype("float32"), path=path, params=params, rounds=trees)
    return path
