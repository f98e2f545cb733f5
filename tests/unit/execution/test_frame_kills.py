"""A run dies at any moment, several times: the rows are those of pandas, and what was finished is not done again.

A death is an error that no handler of the code under test catches, raised before or after a file or a receipt is
written. `tests/faults/test_dask_steps.py` kills processes.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

import pipeline
from pipeline.storage.local import LocalStore
from pipeline.testing.examples import choose


class Death(BaseException):
    """The process is gone."""


def tables(generator: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = int(generator.integers(50, 400))
    # One key has many of the rows.
    keys = np.where(generator.random(rows) < 0.3, 3, generator.integers(0, 40, rows))
    left = pd.DataFrame({"key": keys, "x": np.arange(rows)})
    right = pd.DataFrame({"key": np.arange(0, 45, 2), "y": np.arange(23)})
    return left, right


def made(left: pd.DataFrame, right: pd.DataFrame, parts: int, folder: Path) -> tuple[dd.DataFrame, pd.DataFrame]:
    """Return a lazy join with a groupby, and its rows by pandas."""
    frame = dd.from_pandas(left, npartitions=parts).merge(dd.from_pandas(right, npartitions=2), on="key")
    sums = frame.groupby("key").agg({"x": "sum"}).reset_index().rename(columns={"x": "total"})
    frame = frame.merge(sums, on="key")
    expected = left.merge(right, on="key")
    totals = expected.groupby("key").agg(total=("x", "sum")).reset_index()
    return frame.map_partitions(noted, str(folder), meta=frame._meta), expected.merge(totals, on="key")


def noted(part: pd.DataFrame, folder: str) -> pd.DataFrame:
    if len(part):
        with open(Path(folder) / "computed", "a") as file:
            file.write(f"{part['x'].min()}\n")
    return part


def computed(folder: Path) -> Counter[str]:
    file = folder / "computed"
    return Counter(file.read_text().split() if file.exists() else ())


@pytest.mark.parametrize("seed", range(choose(6, of=200)))
def test_a_run_that_dies_at_any_moment(tmp_path, monkeypatch, seed):
    generator = random.Random(seed)
    frame, expected = made(*tables(np.random.default_rng(seed)), generator.randint(2, 9), tmp_path)
    put = LocalStore.put_if_absent
    countdown = [0]

    def dies(self, name, data):
        is_before = generator.random() < 0.5
        countdown[0] -= 1
        if countdown[0] == 0 and is_before:
            raise Death
        found = put(self, name, data)
        if countdown[0] == 0:
            raise Death
        return found

    monkeypatch.setattr(LocalStore, "put_if_absent", dies)
    runs = 0
    with dask.config.set(scheduler="synchronous"):
        while True:
            runs += 1
            countdown[0] = generator.randint(1, 6) if runs <= 3 else -1
            before = {path.stem for path in tmp_path.glob("kept/*/receipts/*.json")}
            calls = sum(computed(tmp_path).values())
            try:
                kept = pipeline.checkpoint(frame, tmp_path / "kept")
                break
            except Death:
                after = {path.stem for path in tmp_path.glob("kept/*/receipts/*.json")}
                assert before <= after
        left = frame.npartitions - len(before)
        assert sum(computed(tmp_path).values()) - calls <= left + 1, "what is left, and one that is compared"
        rows = kept.compute().sort_values(["x"]).reset_index(drop=True)
    expected = expected.sort_values("x").reset_index(drop=True)
    pd.testing.assert_frame_equal(rows[list(expected.columns)], expected, check_dtype=False)
    assert not list(tmp_path.glob("kept/*/differs.json"))
