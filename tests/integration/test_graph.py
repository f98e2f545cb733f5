"""Assumptions of the design: one fused task per partition, small tasks, and the same rows lazily."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cloudpickle
import dask.dataframe as dd
import pandas as pd
import pytest
import xgboost
from distributed import Client

import pipeline
from pipeline.driver.prepare import prepare
from pipeline.errors import OutputConflict, OutputExists
from pipeline.execution import graph
from pipeline.execution.tasks import make_tasks
from pipeline.scoring.frames import scored_meta
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import FEATURES, Lake, oracle

Make = Callable[..., JobSpec]


def test_a_partition_is_one_fused_task(make_spec: Make, settings: Settings, tmp_path: Path) -> None:
    plan = prepare(make_spec(), settings=settings).plan
    recipe = plan.recipe(job="job", directory=str(tmp_path / "job"))
    frame = graph.scored(recipe, plan.partitions, plan.versions, meta=scored_meta(recipe))
    assert frame.npartitions == len(plan.partitions) > 1
    assert len(frame.optimize().__dask_graph__()) == len(plan.partitions)
    tasks = make_tasks(recipe, plan.partitions, plan.versions)
    assert [len(dict(task.dask)) for task in tasks] == [1] * len(plan.partitions)
    again = make_tasks(recipe, plan.partitions, plan.versions)
    assert len({task.key for task in (*tasks, *again)}) == 2 * len(plan.partitions), "Dask runs a key once"


def test_the_model_does_not_travel(make_spec: Make, settings: Settings, model_path: Path, tmp_path: Path) -> None:
    plan = prepare(make_spec(), settings=settings).plan
    recipe = plan.recipe(job="job", directory=str(tmp_path / "job"))
    size = len(cloudpickle.dumps(make_tasks(recipe, plan.partitions[:1], plan.versions)[0]))
    assert model_path.stat().st_size > 10_000
    assert size < 20_000


def test_to_dask_is_lazy_and_equals_the_oracle(
    make_spec: Make, settings: Settings, client: Client, lake: Lake, model_path: Path
) -> None:
    spec = make_spec(maps=("steps_for_tests:add_ratio",), score={"keep": ["id", "ratio"]})
    job = pipeline.Job(settings=settings, **spec.to_dict())
    frame = job.to_dask()
    assert isinstance(frame, dd.DataFrame)
    assert list(frame.columns) == ["id", "ratio", "prediction"]
    import steps_for_tests

    expected = oracle(lake.files, model_path, steps=(steps_for_tests.add_ratio,))[["id", "ratio", "prediction"]]
    computed = frame.compute(scheduler=client.get).reset_index(drop=True)
    pd.testing.assert_frame_equal(computed, expected, check_exact=True)
    mean = float(frame["prediction"].astype("float64").mean().compute(scheduler=client.get))
    assert mean == pytest.approx(float(expected["prediction"].astype("float64").mean()))


def test_to_dask_does_not_look_at_the_sink(make_spec: Make, settings: Settings, tmp_path: Path) -> None:
    """The rows of a job can be read after it has published: nothing is written."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "part.parquet").write_bytes(b"PAR1")
    spec = make_spec()
    job = pipeline.Job(settings=settings, **{**spec.to_dict(), "sink": {"path": str(out)}})
    assert len(job.to_dask().compute(scheduler="sync")) > 0
    with pytest.raises(OutputExists):
        job.plan()


def test_score_adds_a_column_to_any_dask_dataframe(client: Client, lake: Lake, model_path: Path) -> None:
    frame = dd.read_parquet([str(file) for file in lake.files], columns=["id", *FEATURES])
    scored = pipeline.score(frame, str(model_path), output="churn")
    assert scored._meta["churn"].dtype == "float32"
    computed = scored.compute(scheduler=client.get).sort_values("id").reset_index(drop=True)
    expected = oracle(lake.files, model_path, output="churn")[["id", *FEATURES, "churn"]]
    pd.testing.assert_frame_equal(computed, expected, check_exact=True, check_dtype=False)


def test_score_takes_a_pandas_frame(lake: Lake, model_path: Path) -> None:
    expected = oracle(lake.files, model_path)
    scored = pipeline.score(expected.drop(columns="prediction"), str(model_path))
    pd.testing.assert_frame_equal(scored, expected, check_exact=True)


def test_score_takes_a_path_and_a_model_itself(
    lake: Lake, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = oracle(lake.files, model_path)
    frame = expected.drop(columns="prediction")
    booster = xgboost.Booster(model_file=str(model_path))
    for model in (model_path, booster):
        pd.testing.assert_frame_equal(pipeline.score(frame, model), expected, check_exact=True)
    names = ["id", *FEATURES]
    computed = pipeline.score(dd.from_pandas(frame[names], npartitions=2), booster).compute(scheduler="sync")
    pd.testing.assert_frame_equal(computed, expected[[*names, "prediction"]], check_exact=True, check_dtype=False)
    with pytest.raises(ValueError, match="not a model of a supported kind"):
        pipeline.score(frame, object())  # type: ignore[call-overload]


class TestReportFrames:
    def test_only_the_files_of_the_job_are_read(
        self, make_spec: Make, settings: Settings, client: Client, lake: Lake, model_path: Path
    ) -> None:
        spec = make_spec(score={"keep": ["id"]}, sink={"path": str(lake.path.parent / "appended"), "mode": "append"})
        job = pipeline.Job(settings=settings, **spec.to_dict())
        first, second = job.run(callbacks=[]), job.run(callbacks=[])
        assert first.ok
        assert second.ok
        expected = oracle(lake.files, model_path)[["id", "prediction"]]
        for report in (first, second):
            frame = report.frame()
            assert len(frame) == report.rows.output == len(expected)
            pd.testing.assert_frame_equal(frame, expected, check_exact=True)
            lazily = report.to_dask()
            assert isinstance(lazily, dd.DataFrame)
            computed = lazily.compute(scheduler=client.get).reset_index(drop=True)
            pd.testing.assert_frame_equal(computed, expected, check_exact=True)

    def test_output_that_was_replaced_is_refused(self, make_spec: Make, settings: Settings, tmp_path: Path) -> None:
        spec = make_spec(sink={"path": str(tmp_path / "replaced"), "mode": "overwrite"})
        job = pipeline.Job(settings=settings, **spec.to_dict())
        first, second = job.run(callbacks=[]), job.run(callbacks=[])
        assert len(second.frame()) == second.rows.output
        with pytest.raises(OutputConflict, match="was replaced"):
            first.frame()
