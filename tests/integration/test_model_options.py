"""Jobs with models as users have them: early stopping, and category names that are not ASCII."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xgboost

from pipeline.api.frames import score
from pipeline.driver.prepare import prepare
from pipeline.errors import ModelError, SpecError
from pipeline.plan.describe import plan_summary
from pipeline.report.build import make_report
from pipeline.report.report import summary_text
from pipeline.report.verify import verify
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.inline import plan_inline, publish_inline, score_inline

CITIES = ["Berlin", "München", "Köln", "Ulm"]
ROWS = 600


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, ROWS)
    return pd.DataFrame(
        {
            "id": np.arange(ROWS),
            "city": pd.Categorical.from_codes(codes, CITIES),
            "a": rng.normal(size=ROWS).astype("f4"),
            "y": (codes + rng.normal(size=ROWS) * 2 > 1.5).astype(int),
        }
    )


def train(frame: pd.DataFrame, columns: list[str], path: Path, *, early: int = 6) -> xgboost.Booster:
    """Train with early stopping, so that the best round is not the last one."""
    first, rest = frame[: ROWS // 2], frame[ROWS // 2 :]
    data = [xgboost.DMatrix(part[columns], part["y"], enable_categorical=True) for part in (first, rest)]
    params = {"nthread": 1, "objective": "binary:logistic", "eta": 0.4, "max_depth": 4}
    evals = [(data[1], "check")]
    booster = xgboost.train(params, data[0], 60, evals=evals, early_stopping_rounds=early, verbose_eval=False)
    booster.save_model(path)
    assert booster.best_iteration + 1 < booster.num_boosted_rounds()
    return booster


def job_spec(folder: Path, frame: pd.DataFrame, **options: Any) -> JobSpec:
    (folder / "in").mkdir(exist_ok=True)
    table = pa.table({"id": frame["id"], "city": frame["city"].astype(str).tolist(), "a": frame["a"]})
    pq.write_table(table, folder / "in/0.parquet")
    return JobSpec.build(
        name="options",
        source={"path": str(folder / "in")},
        steps=[{"score": {"model": str(folder / "m.ubj"), "output": "p", **options}}],
        sink={"path": str(folder / "out"), "mode": "overwrite"},
    )


def run_inline(spec: JobSpec, folder: Path, *, job: str) -> tuple[Any, np.ndarray]:
    made = score_inline(plan_inline(spec, directory=folder / "jobs"), directory=folder / "jobs", job=job)
    publish_inline(made)
    published = pq.read_table(next((folder / "out").glob("*.parquet"))).to_pandas().sort_values("id")
    return made, published["p"].to_numpy()


class TestEarlyStopping:
    def test_plan_and_report_say_which_rounds_are_scored(self, tmp_path: Path, frame: pd.DataFrame) -> None:
        booster = train(frame, ["a"], tmp_path / "m.ubj")
        rounds, best = booster.num_boosted_rounds(), booster.best_iteration
        spec = job_spec(tmp_path, frame)
        prepared = prepare(spec, settings=Settings(directory=str(tmp_path / "jobs"), workers=1, threads=1))
        summary = plan_summary(prepared.plan, prepared.limits)
        assert f"all {rounds}; best iteration {best}" in summary.text()
        assert f"all {rounds} rounds are scored, although" in summary.text()
        details = summary.to_dict()
        assert details["model"]["iteration_range"] == [0, rounds]
        assert details["model"]["best_iteration"] == best
        assert len(details["warnings"]) == 1
        made, _ = run_inline(spec, tmp_path, job="all-1")
        report = make_report(made)
        assert any("score.iteration_range: best" in text for text in report.warnings)
        assert report.model.rounds == f"all {rounds}; best iteration {best}"
        assert report.model.rounds in summary_text(report)

    @pytest.mark.parametrize("engine", ["xgboost", "trees"])
    @pytest.mark.parametrize("rounds", ["best", [0, 3]])
    def test_chosen_rounds_are_scored_and_verified(
        self, tmp_path: Path, frame: pd.DataFrame, engine: str, rounds: Any
    ) -> None:
        booster = train(frame, ["a"], tmp_path / "m.ubj")
        spec = job_spec(tmp_path, frame, iteration_range=rounds, engine=engine)
        made, found = run_inline(spec, tmp_path, job="chosen-1")
        bounds = (0, booster.best_iteration + 1) if rounds == "best" else (0, 3)
        wanted = booster.predict(xgboost.DMatrix(frame[["a"]]), iteration_range=bounds)
        assert found.tobytes() == wanted.tobytes()
        assert not any("iteration_range" in text for text in make_report(made).warnings)
        assert verify(made, sample=ROWS).ok
        scored = score(frame[["a"]], tmp_path / "m.ubj", iteration_range=tuple(bounds))
        assert scored["prediction"].to_numpy().tobytes() == wanted.tobytes()

    def test_other_rounds_are_other_work(self, tmp_path: Path, frame: pd.DataFrame) -> None:
        train(frame, ["a"], tmp_path / "m.ubj")
        plans = [
            plan_inline(job_spec(tmp_path, frame, **options), directory=tmp_path / "jobs")
            for options in ({}, {"iteration_range": "best"}, {"iteration_range": [0, 2]})
        ]
        assert len({plan.digest for plan in plans}) == 3
        recipes = [plan.recipe(job="j-1", directory=str(tmp_path)) for plan in plans]
        assert len({recipe.digest for recipe in recipes}) == 3

    @pytest.mark.parametrize("rounds", ["all", [3], [3, 3], [-1, 2], [0, 1, 2], [0.5, 2], True])
    def test_other_values_are_refused_with_the_form(self, tmp_path: Path, frame: pd.DataFrame, rounds: Any) -> None:
        with pytest.raises(SpecError, match="iteration_range"):
            job_spec(tmp_path, frame, iteration_range=rounds)


class TestCategoriesThatAreNotASCII:
    @pytest.mark.fault(103)
    def test_job_has_the_scores_of_predict_or_is_refused(self, tmp_path: Path, frame: pd.DataFrame) -> None:
        booster = train(frame, ["city", "a"], tmp_path / "m.ubj")
        wanted = booster.predict(xgboost.DMatrix(frame[["city", "a"]], enable_categorical=True))
        if tuple(int(part) for part in xgboost.__version__.split(".")[:2]) < (3, 4):
            with pytest.raises(ModelError, match="may have lost names of categories of 'city'"):
                plan_inline(job_spec(tmp_path, frame), directory=tmp_path / "jobs")
            with pytest.raises(ModelError, match="may have lost names of categories of 'city'"):
                score(frame, tmp_path / "m.ubj")
        made, found = run_inline(job_spec(tmp_path, frame, categories={"city": CITIES}), tmp_path, job="named-1")
        assert found.tobytes() == wanted.tobytes()
        assert make_report(made).rows.rejected == 0
        assert verify(made, sample=ROWS).ok
        scored = score(frame.astype({"city": str}), tmp_path / "m.ubj", categories={"city": CITIES})
        assert scored["prediction"].to_numpy().tobytes() == wanted.tobytes()

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ([], "categories"),
            (["a", "a"], "names a category twice: a"),
            (["a", 1], "of two types"),
            ("a", "categories"),
        ],
    )
    def test_other_lists_are_refused_with_the_form(
        self, tmp_path: Path, frame: pd.DataFrame, names: Any, message: str
    ) -> None:
        with pytest.raises(SpecError, match=message):
            job_spec(tmp_path, frame, categories={"city": names})
