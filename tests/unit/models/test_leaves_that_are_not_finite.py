"""Models with leaves that are infinite or NaN, or whose sums overflow: xgboost scores them, not the tree engine.

Where margins are NaN, an argmax of xgboost finds another class than one of NumPy, and the bits of NaN depend on the
order of a sum.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xgboost

from pipeline.errors import ModelError
from pipeline.plan.describe import plan_summary, plan_text
from pipeline.plan.plan import Limits
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.inline import plan_inline, score_inline
from pipeline.testing.oracle import FEATURES, make_table, train_model

INF, NAN = float("inf"), float("nan")
ROWS = 3000
REASON = "leaves that are not finite, or whose sum may not be finite"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "binary:logistic": {},
    "reg:squarederror": {},
    "count:poisson": {},
    "multi:softmax": {"num_class": 2},
    "multi:softprob": {"num_class": 2},
}


def model_with_leaves(place: Path, objective: str, leaves: list[float]) -> xgboost.Booster:
    """Train a model, and set the first leaf of each tree to one of ``leaves`` in turn."""
    trained = train_model(place, rounds=4, objective=objective, **OBJECTIVES[objective])
    model = json.loads(xgboost.Booster(model_file=str(trained)).save_raw("json"))
    trees = model["learner"]["gradient_booster"]["model"]["trees"]
    for tree, leaf in zip(trees, itertools.cycle(leaves), strict=False):
        tree["split_conditions"][tree["left_children"].index(-1)] = leaf
    booster = xgboost.Booster(model_file=bytearray(json.dumps(model).encode()))
    booster.save_model(str(place))
    return booster


def spec_of(folder: Path, **score: Any) -> JobSpec:
    return JobSpec.build(
        name="j",
        source={"path": str(folder / "lake")},
        steps=[{"score": {"model": str(folder / "m.ubj"), "keep": [], **score}}],
        sink={"path": str(folder / "out")},
    )


@pytest.mark.parametrize("leaves", [[INF], [-INF], [INF, -INF], [NAN], [3e38]], ids=str)
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_scores_are_those_of_xgboost_and_the_plan_names_the_reason(
    tmp_path: Path, objective: str, leaves: list[float]
) -> None:
    table = make_table(ROWS, seed=1)
    (tmp_path / "lake").mkdir()
    pq.write_table(table, tmp_path / "lake" / "a.parquet")
    booster = model_with_leaves(tmp_path / "m.ubj", objective, leaves)
    plan = plan_inline(spec_of(tmp_path), directory=tmp_path / "jobs")
    assert not plan.can_use_tree_engine
    assert REASON in plan_text(plan_summary(plan, Limits(workers=1, threads=1, memory=0)))
    job = score_inline(plan, directory=tmp_path / "jobs", job="j")
    (receipt,) = job.receipts.all()
    assert receipt.data is not None
    output = pq.read_table(f"{job.root}/rounds/0/{receipt.data.name}")
    scores = np.stack([output[name].to_numpy() for name in output.column_names], axis=1)
    expected = booster.predict(xgboost.DMatrix(table.select(FEATURES).to_pandas())).reshape(scores.shape)
    assert np.array_equal(scores.view(np.uint32), expected.view(np.uint32))
    assert receipt.engine is not None
    assert receipt.engine.rows == {"xgboost": ROWS}


def test_a_request_for_the_tree_engine_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "lake").mkdir()
    pq.write_table(make_table(10, seed=1), tmp_path / "lake" / "a.parquet")
    model_with_leaves(tmp_path / "m.ubj", "binary:logistic", [NAN])
    with pytest.raises(ModelError, match="tree engine cannot score") as caught:
        plan_inline(spec_of(tmp_path, engine="trees"), directory=tmp_path / "jobs")
    assert REASON in (caught.value.found or "")
