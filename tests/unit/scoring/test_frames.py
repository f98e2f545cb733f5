"""Frames that are scored without a job: the tree engine takes part, and the scores are xgboost's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import xgboost

import pipeline
from pipeline.models import engines
from pipeline.models.engines import Evaluator, forget_selections
from pipeline.scoring import frames
from pipeline.testing.oracle import FEATURES, make_table

ROWS = 9000

Score = Callable[[Path, Path], pd.DataFrame]


@pytest.fixture
def evaluators(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Evaluator]]:
    """The evaluators that score frames."""
    found: list[Evaluator] = []
    get_evaluator = frames.get_evaluator

    def record(score: Any) -> tuple[Evaluator, float]:
        evaluator, seconds = get_evaluator(score)
        found.append(evaluator)
        return evaluator, seconds

    monkeypatch.setattr(frames, "get_evaluator", record)
    monkeypatch.setattr(engines, "START_SECONDS_PER_TREE", 0.0)
    forget_selections()
    yield found
    forget_selections()


def score_pandas(lake: Path, model: Path) -> pd.DataFrame:
    return pipeline.score(pd.read_parquet(lake), str(model), output="p")


def score_dask(lake: Path, model: Path) -> pd.DataFrame:
    collection = dd.from_pandas(pd.read_parquet(lake), npartitions=2)
    return pipeline.score(collection, str(model), output="p").compute(scheduler="synchronous")


def score_job(lake: Path, model: Path) -> pd.DataFrame:
    job = pipeline.Job(
        name="j",
        source={"path": str(lake)},
        steps=[{"score": {"model": str(model), "output": "p"}}],
        sink={"path": str(lake.parent / "out")},
    )
    return job.to_dask().compute(scheduler="synchronous")


@pytest.mark.parametrize("score", [score_pandas, score_dask, score_job])
def test_the_tree_engine_takes_part_and_the_scores_are_of_xgboost(
    tmp_path: Path, model_path: Path, evaluators: list[Evaluator], score: Score
) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    table = make_table(ROWS, seed=2)
    pq.write_table(table, lake / "a.parquet")
    found = score(lake, model_path)["p"].to_numpy()
    booster = xgboost.Booster(model_file=model_path)
    wanted = booster.predict(xgboost.DMatrix(table.select(FEATURES).to_pandas()))
    assert found.astype(np.float32).tobytes() == wanted.tobytes()
    uses = [evaluator.engine_use() for evaluator in evaluators]
    assert sum(use.timed_rows for use in uses) > 0
    assert sum(use.mismatches for use in uses) == 0
    assert all(use.kernels for use in uses)
