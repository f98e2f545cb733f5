"""Generate data and models for the benchmarks, from the arguments alone; they are kept in ``benchmarks/data/``."""

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
WIDE = 2000


def sizes(kind: str, rows: int) -> list[int]:
    """Return the rows per file.

    ``even``, ``mixed`` and ``wide``: 10 files; ``skewed``: one file with half the rows; ``tiny``: 500 rows each.
    """
    if kind in ("even", "mixed", "wide"):
        return [rows // 10] * 10
    if kind == "skewed":
        return [rows // 18] * 5 + [rows // 2] + [rows // 18] * 4
    if kind == "tiny":
        return [500] * (rows // 500)
    raise ValueError(f"no data set {kind!r}: even, skewed, tiny, mixed, wide")


def names(count: int = FEATURES) -> list[str]:
    return [f"f{i:02d}" for i in range(count)]


def table(rows: int, *, seed: int, kind: str = "even") -> pa.Table:
    """Return float32 features (28; 2,000 for ``wide``), 2 % missing in every fourth column.

    ``mixed`` adds texts, dates and nested columns, which pass through.
    """
    random = np.random.default_rng(seed)
    width = WIDE if kind == "wide" else FEATURES
    values = random.standard_normal((width, rows), dtype=np.float32)
    columns = []
    for number in range(width):
        mask = random.random(rows, dtype=np.float32) < 0.02 if number % 4 == 3 else None
        columns.append(pa.array(values[number], mask=mask))
    made = pa.table(columns, names=names(width))
    return _passing(made, random) if kind == "mixed" else made


def _passing(made: pa.Table, random: np.random.Generator) -> pa.Table:
    rows = made.num_rows
    numbers = random.integers(0, 1_000_000, rows)
    made = made.append_column("city", pa.array(np.char.add("city ", (numbers % 5000).astype(str)), pa.string()))
    made = made.append_column("note", pa.array(np.char.add("customer since a while, number ", numbers.astype(str))))
    made = made.append_column("day", pa.array((numbers % 20_000).astype(np.int32)).cast(pa.date32()))
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * 3)
    made = made.append_column("last_three", pa.ListArray.from_arrays(offsets, pa.array(random.random(3 * rows))))
    pair = pa.StructArray.from_arrays([pa.array(numbers), pa.array(numbers % 7 == 0)], names=["number", "is_new"])
    return made.append_column("account", pair)


def _pieces(count: int, seed: int, kind: str) -> Iterator[pa.Table]:
    most = ROW_GROUP // 40 if kind == "wide" else ROW_GROUP
    while count > 0:
        rows = min(count, most)
        yield table(rows, seed=seed, kind=kind)
        count -= rows
        seed += 1


def make_data(kind: str, rows: int) -> Path:
    """Return the folder of the data set; make it if it does not exist."""
    home = HOME / f"{kind}-{rows}"
    if (home / ".done").exists():
        return home
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    for number, count in enumerate(sizes(kind, rows)):
        with pq.ParquetWriter(home / f"part-{number:05d}.parquet", table(0, seed=0, kind=kind).schema) as writer:
            for piece in _pieces(count, 1000 * number, kind):
                writer.write_table(piece)
    (home / ".done").touch()
    return home


def make_model(trees: int, depth: int, *, kind: str = "even") -> Path:
    """Return a binary xgboost model over the features of a set; make it if it does not exist."""
    path = HOME / f"model-{trees}x{depth}{'-wide' if kind == 'wide' else ''}.ubj"
    if not path.exists():
        from pipeline.models.flavors.xgboost_train import train

        shape = "wide" if kind == "wide" else "even"
        frame = table(2_000 if kind == "wide" else 40_000, seed=424_242, kind=shape).to_pandas()
        score = frame["f00"] + frame["f01"] * frame["f02"] - frame["f04"].abs() + frame["f05"] * frame["f06"]
        noise = np.random.default_rng(1).standard_normal(len(frame))
        params = {"objective": "binary:logistic", "max_depth": depth, "eta": 0.1, "nthread": 2, "seed": 3}
        train(frame, (score + noise > 0).astype("float32"), path=path, params=params, rounds=trees)
    return path
