"""Jobs whose steps come in other numbers and orders than map, then score: run, published, verified, retried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.api.job import Job
from pipeline.errors import ModelChanged, SpecError
from pipeline.events import Callback, PartitionEnded
from pipeline.jobs.listing import find_job
from pipeline.models.flavors.xgboost_train import predict
from pipeline.models.registry.file_registry import BuiltInRegistry, VersionMetadata
from pipeline.report.report import Report
from pipeline.report.verify import verify
from pipeline.runner import retry, run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import FEATURES, Lake, make_table, train_model

Make = Callable[..., JobSpec]


@pytest.fixture
def other_path(tmp_path: Path) -> Path:
    return train_model(tmp_path / "other.ubj", rounds=3, max_depth=2)


@pytest.fixture
def make(lake: Lake, tmp_path: Path) -> Make:
    def spec(*steps: dict[str, Any], **fields: Any) -> JobSpec:
        return JobSpec.build(
            **{
                "name": "chain",
                "source": {"path": str(lake.path)},
                "steps": steps,
                "sink": {"path": str(tmp_path / "out")},
                **fields,
            }
        )

    return spec


def table(lake: Lake) -> pd.DataFrame:
    return pd.concat([pq.read_table(file).to_pandas() for file in lake.files], ignore_index=True)


def published(folder: Path) -> pd.DataFrame:
    return pq.read_table(folder).to_pandas()


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert list(found.columns) == list(expected.columns)
    pd.testing.assert_frame_equal(found, expected.reset_index(drop=True), check_exact=True, check_dtype=False)


def test_a_cascade_of_two_models_is_scored_published_and_verified(
    make: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path, other_path: Path
) -> None:
    spec = make(
        {"filter": "age < 70"},
        {"score": {"model": str(model_path), "output": "first"}},
        {"filter": "first < 0.9"},
        {"score": {"model": str(other_path), "output": "second", "where": "first >= 0.1"}},
        {"select": ["id", "first", "second"]},
    )
    report = run(spec, settings=settings)
    frame = table(lake)
    frame = frame[frame["age"] < 70]
    frame = frame.assign(first=predict(frame[list(FEATURES)], model=model_path))
    frame = frame[frame["first"] < 0.9]
    second = pd.Series(predict(frame[list(FEATURES)], model=other_path), index=frame.index)
    frame = frame.assign(second=second.where(frame["first"] >= 0.1))[["id", "first", "second"]]
    assert_same(published(tmp_path / "out"), frame)
    assert (report.rows.output, report.rows.rejected) == (len(frame), 0)
    assert report.rows.input == report.rows.output + report.rows.filtered == lake.rows
    assert report.model.name == f"{model_path.stem}, {other_path.stem}"
    assert verify(find_job(settings.directory, "@last")).ok
    metadata = pq.read_schema(next((tmp_path / "out").glob("*.parquet"))).metadata
    assert b"pipeline.models" in metadata
    assert b"pipeline.model" not in metadata


def test_a_list_of_models_gives_their_weighted_mean(
    make: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path, other_path: Path
) -> None:
    models = [str(model_path), str(other_path)]
    report = run(make({"score": {"model": models, "combine": [3, 1], "output": "p"}}), settings=settings)
    frame = table(lake)
    one, other = (predict(frame[list(FEATURES)], model=path).astype(float) for path in (model_path, other_path))
    assert published(tmp_path / "out")["p"].tolist() == ((3 * one + other) / 4).astype("float32").tolist()
    assert report.model.name == f"{model_path.stem}, {other_path.stem}"
    assert verify(find_job(settings.directory, "@last")).ok


def test_a_challenger_is_compared_and_leaves_the_output_as_it_is(
    make: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path, other_path: Path
) -> None:
    champion = {"score": {"model": str(model_path), "output": "p"}}
    challenger = {"score": {"model": str(other_path), "output": "q", "shadow": "p"}}
    report = run(make(champion, challenger), settings=settings)
    frame = table(lake)
    one, other = (predict(frame[list(FEATURES)], model=path).astype(float) for path in (model_path, other_path))
    found = published(tmp_path / "out")
    assert "q" not in found
    assert found["p"].tolist() == one.tolist()
    (shadow,) = report.shadows
    assert (shadow.column, shadow.other, shadow.rows) == ("q", "p", len(frame))
    assert shadow.agreed == int(((one >= 0.5) == (other >= 0.5)).sum())
    assert shadow.mean == pytest.approx((other - one).mean(), abs=1e-8)
    assert shadow.largest == np.abs(other - one).max()
    assert f"q against p: {int(shadow.agreed / shadow.rows * 10_000) / 100:.2f} % of {len(frame):,} rows" in str(report)
    assert Report.from_dict(report.to_dict()).shadows == report.shadows
    assert verify(find_job(settings.directory, "@last")).ok


def test_a_job_without_a_score_prepares_data(make: Make, settings: Settings, tmp_path: Path, lake: Lake) -> None:
    spec = make(
        {"select": {"customer": "id", "age": "age", "balance": "balance", "visits": "visits"}},
        {"map": "steps_for_tests:add_ratio"},
        {"filter": "age >= 30"},
    )
    report = run(spec, settings=settings)
    frame = table(lake).rename(columns={"id": "customer"})[["customer", "age", "balance", "visits"]]
    frame = frame[frame["age"] >= 30]
    assert_same(published(tmp_path / "out"), frame.assign(ratio=frame["balance"] / (frame["visits"] + 1)))
    assert (report.status, report.model.name, report.engines) == ("SUCCEEDED", "", None)
    assert "model" not in str(report)
    assert verify(find_job(settings.directory, "@last")).ok
    assert retry("@last", settings=settings).status == "SUCCEEDED"


def test_rejected_rows_of_a_chain_come_back_in_a_retry(
    make: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path, other_path: Path
) -> None:
    spec = make(
        {"filter": "id < 4000"},
        {"score": {"model": str(model_path), "output": "first"}},
        {"map": "steps_for_tests:fail_on_few"},
        {"score": {"model": str(other_path), "output": "second"}},
        errors={"max_fraction": 0.1},
    )
    first = run(spec, settings=settings)
    assert first.rows.rejected == 8
    with pytest.raises(SpecError, match="does not say which score step"):
        retry("@last", model=str(model_path), settings=settings)
    with pytest.raises(SpecError, match="filters with which files are read"):
        retry("@last", overrides=["steps.0.filter=id < 5000"], settings=settings)
    with pytest.raises(SpecError, match="must give the columns"):
        retry("@last", overrides=["steps.3.score.output=third"], settings=settings)
    repaired = retry("@last", overrides=["steps.2.map=steps_for_tests:as_it_is"], settings=settings)
    assert (repaired.rows.output, repaired.rows.rejected) == (4000, 0)
    frame = table(lake)
    frame = frame[frame["id"] < 4000]
    scores = {
        "first": predict(frame[list(FEATURES)], model=model_path),
        "second": predict(frame[list(FEATURES)], model=other_path),
    }
    found = published(tmp_path / "out").sort_values("id").reset_index(drop=True)
    assert found["first"].tolist() == scores["first"].tolist()
    assert found["second"].tolist() == scores["second"].tolist()
    assert verify(find_job(settings.directory, "@last")).ok


def test_children_of_a_fan_out_filter_by_their_value(
    make: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path
) -> None:
    spec = make(
        {"select": {"kind": "segment", "id": "id", **{name: name for name in FEATURES}}},
        {"filter": "kind == '${fan_out.value}'"},
        {"score": {"model": str(model_path), "output": "p"}},
        {"select": ["id", "p"]},
        sink={"path": str(tmp_path / "out-${fan_out.value}")},
        fan_out={"by": ["gold", "silver"]},
    )
    run(spec, settings=settings)
    frame = table(lake)
    frame = frame.assign(p=predict(frame[list(FEATURES)], model=model_path))
    for value in ("gold", "silver"):
        assert_same(published(tmp_path / f"out-{value}"), frame[frame["segment"] == value][["id", "p"]])


def test_an_incremental_chain_scores_new_files_only(
    make: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path
) -> None:
    spec = make(
        {"filter": "id >= 0"},
        {"score": {"model": str(model_path), "output": "p"}},
        {"filter": "p >= 0"},
        source={"path": str(lake.path), "incremental": True},
        sink={"path": str(tmp_path / "out"), "mode": "append"},
    )
    assert run(spec, settings=settings).rows.input == lake.rows
    pq.write_table(make_table(70, seed=4, start=1_000_000), lake.path / "part-late.parquet")
    assert run(spec, settings=settings).rows.output == 70
    assert len(published(tmp_path / "out")) == lake.rows + 70


def test_to_dask_runs_the_same_chain(make: Make, settings: Settings, lake: Lake, model_path: Path) -> None:
    spec = make({"filter": "id < 500"}, {"score": {"model": str(model_path), "output": "p"}}, {"select": ["p", "id"]})
    job = Job(name="chain", source=spec.source, steps=spec.steps, sink=spec.sink, settings=settings)
    frame = job.to_dask().compute()
    rows = table(lake)
    rows = rows[rows["id"] < 500]
    assert frame["p"].tolist() == predict(rows[list(FEATURES)], model=model_path).tolist()
    assert list(frame.columns) == ["p", "id"]


class Mover(Callback):
    """Moves an alias once a partition is done."""

    def __init__(self, move: Callable[[], object]) -> None:
        self.move = move
        self.is_done = False

    def on_partition(self, event: PartitionEnded) -> None:
        if not self.is_done:
            self.is_done = True
            self.move()


@pytest.mark.parametrize("policy", ["fail", "restart", "pin"])
def test_each_alias_of_a_chain_is_followed(
    policy: str, make: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path, other_path: Path
) -> None:
    registry = BuiltInRegistry(str(tmp_path / "models"))
    for name, path in (("one", model_path), ("two", model_path), ("two", other_path)):
        registry.register(name, path.read_bytes(), VersionMetadata())
        registry.set_alias(name, "champion", 1)
    settings = replace(settings, registry=registry.root, alias_poll=0.001)
    spec = make(
        {"score": {"model": "models:/one@champion", "output": "p"}},
        {"score": {"model": "models:/two@champion", "output": "q"}},
        on_alias_change=policy,
    )
    mover = Mover(lambda: registry.set_alias("two", "champion", 2))
    if policy == "fail":
        with pytest.raises(ModelChanged, match="alias moved"):
            run(spec, settings=settings, callbacks=[mover])
        return
    report = run(spec, settings=settings, callbacks=[mover])
    frame = table(lake)
    path = other_path if policy == "restart" else model_path
    expected = frame.assign(
        p=predict(frame[list(FEATURES)], model=model_path), q=predict(frame[list(FEATURES)], model=path)
    )
    found = published(tmp_path / "out").sort_values("id", ignore_index=True)
    assert found["p"].tolist() == expected["p"].tolist()
    assert found["q"].tolist() == expected["q"].tolist()
    assert report.model.version == ("1, 2" if policy == "restart" else "1, 1")
    assert verify(find_job(settings.directory, "@last")).ok
