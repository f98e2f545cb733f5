"""A stack: the scores of several models are the features of one more, and equal to what libraries give one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xgboost

from pipeline.errors import SpecError
from pipeline.models.flavors.xgboost_train import predict, train
from pipeline.plan.recipe import StackRecipe
from pipeline.plan.step_record import step_from_record, step_to_record
from pipeline.report.build import make_report
from pipeline.report.verify import verify
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.inline import plan_inline, publish_inline, score_inline
from pipeline.testing.oracle import FEATURES, make_table, train_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake of one file, two models below, and one on top of their margins."""
    folder = tmp_path_factory.mktemp("stack")
    pq.write_table(make_table(3000, seed=11), folder / "part.parquet")
    train_model(folder / "one.ubj", rounds=4)
    train_model(folder / "multi.ubj", rounds=2, objective="multi:softprob", num_class=3)
    stacked = below(folder, pq.read_table(folder / "part.parquet").to_pandas(), "margin")
    target = (stacked.iloc[:, 0] > 0) ^ (stacked.iloc[:, 2] > 0.5)
    train(
        stacked, target.astype("float32"), path=folder / "meta.ubj", params={"objective": "binary:logistic"}, rounds=3
    )
    return folder


def below(folder: Path, frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The results of both models below, by xgboost itself."""
    data = xgboost.DMatrix(frame[list(FEATURES)])
    boosters = [xgboost.Booster(model_file=folder / name) for name in ("one.ubj", "multi.ubj")]
    results = [booster.predict(data, output_margin=kind == "margin").reshape(len(frame), -1) for booster in boosters]
    return pd.DataFrame(np.hstack(results), columns=[f"m{number}" for number in range(4)])


def make_spec(folder: Path, out: Path, **score: Any) -> JobSpec:
    models = {"model": [str(folder / "one.ubj"), str(folder / "multi.ubj")], "meta": str(folder / "meta.ubj")}
    step = {**models, "combine": "stack", "meta_input": "margin", "output": "p", "keep": ["id"], **score}
    return JobSpec.build(
        name="stack",
        source={"path": str(folder / "part.parquet")},
        steps=[{"score": step}],
        sink={"path": str(out)},
        errors={"max_fraction": 1.0},
        contract={"balance": {"max": 2000}},
    )


def test_a_job_gives_what_the_library_gives_model_by_model(folder: Path, tmp_path: Path) -> None:
    plan = plan_inline(make_spec(folder, tmp_path / "out"), directory=tmp_path / "jobs")
    assert [version.name for version in plan.models] == ["one", "multi", "meta"]
    job = score_inline(plan, directory=tmp_path / "jobs", job="s-1")
    publish_inline(job)
    frame = pq.read_table(folder / "part.parquet").to_pandas()
    frame = frame[~(frame["balance"] > 2000)].reset_index(drop=True)
    expected = predict(below(folder, frame, "margin"), model=folder / "meta.ubj")
    found = pq.read_table(tmp_path / "out")
    assert found["id"].to_pylist() == frame["id"].tolist()
    assert found["p"].to_numpy().tobytes() == expected.astype(np.float32).tobytes()
    assert verify(job, sample=200, seed=1).ok
    assert make_report(job).rows.rejected == 3000 - len(frame)


def test_conditions_leave_null(folder: Path, tmp_path: Path) -> None:
    plan = plan_inline(make_spec(folder, tmp_path / "out", where="age < 40"), directory=tmp_path / "jobs")
    publish_inline(score_inline(plan, directory=tmp_path / "jobs", job="s-1"))
    found = pq.read_table(tmp_path / "out").to_pandas()
    ages = pq.read_table(folder / "part.parquet").to_pandas().set_index("id")["age"]
    assert (found["p"].isna() == (ages[found["id"]] >= 40).to_numpy()).all()


def test_its_features_are_no_columns_and_it_can_be_stored(folder: Path, tmp_path: Path) -> None:
    (step,) = plan_inline(make_spec(folder, tmp_path / "out"), directory=tmp_path / "jobs").chain
    assert isinstance(step, StackRecipe)
    assert step.members[-1].features == ("model_0_0", "model_1_0", "model_1_1", "model_1_2")
    assert [member.kind for member in step.members] == ["margin", "margin", "prediction"]
    assert step_from_record(step_to_record(step)) == step


def test_another_number_of_features_is_refused(folder: Path, tmp_path: Path) -> None:
    spec = make_spec(folder, tmp_path / "out", model=[str(folder / "one.ubj")])
    with pytest.raises(SpecError, match="another number of features") as caught:
        plan_inline(spec, directory=tmp_path / "jobs")
    assert caught.value.found == "4 features of meta, 1 results a row"


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"model": ["a.ubj"], "combine": "stack"}, "has combine: stack without meta"),
        ({"model": ["a.ubj"], "combine": "mean", "meta": "m.ubj"}, "has meta without combine: stack"),
        ({"model": "a.ubj", "combine": "stack", "meta": "m.ubj"}, "has combine for one model"),
    ],
)
def test_what_is_refused(score: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        JobSpec.build(name="j", source={"path": "in"}, sink={"path": "out"}, steps=[{"score": score}])
    assert message in str(caught.value)


def test_a_map_step_behind_it_is_planned_with_its_scores(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "behind.py").write_text("def half(frame):\n    return frame.assign(h=frame['p'] / 2)[['id', 'h']]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = make_spec(folder, tmp_path / "out", keep=None)
    steps = [*spec.to_dict()["steps"], {"map": "behind:half"}, {"select": ["id", "h"]}]
    spec = JobSpec.build(**{**spec.to_dict(), "steps": steps, "contract": {}})
    plan = plan_inline(spec, directory=tmp_path / "jobs")
    assert pa.ipc.read_schema(pa.py_buffer(plan.output_schema)).field("h").type == pa.float32()
