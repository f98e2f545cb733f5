"""A job with 200 models by key in a worker of 1 GB: the bits of each model alone, and counted loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import xgboost

from pipeline.driver.retry import RetryRequest, open_retry
from pipeline.errors import TooManyRejects
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.models.cache import forget_models
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.flavors import xgboost_probe
from pipeline.models.process import ProcessFacts, set_process_facts
from pipeline.plan.describe import plan_summary
from pipeline.plan.plan import Limits
from pipeline.report.build import decide_status, make_report
from pipeline.report.verify import verify
from pipeline.scoring import batching
from pipeline.scoring.partition import score_partition
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parts import Errors
from pipeline.testing.inline import plan_inline, publish_inline, score_inline

KEYS = 200
ROWS = 6_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake of two files, and a model for each of its keys."""
    folder, random = tmp_path_factory.mktemp("keyed"), np.random.default_rng(3)
    (folder / "models").mkdir()
    for key in range(KEYS):
        x = random.random((60, 2), dtype=np.float32)
        data = xgboost.DMatrix(x, x[:, 0] * key + x[:, 1], feature_names=["x", "y"])
        xgboost.train({"max_depth": 2, "nthread": 1, "seed": key}, data, 2).save_model(folder / f"models/{key}.ubj")
    for number in range(2):
        keys = random.integers(0, KEYS + 2, ROWS // 2)  # of two keys there is no model
        x, y = random.random((2, ROWS // 2), dtype=np.float32)
        ids = np.arange(ROWS // 2) + number * ROWS // 2
        pq.write_table(pa.table({"id": ids, "key": keys, "x": x, "y": y}), folder / f"part-{number}.parquet")
    return folder


@pytest.fixture(autouse=True)
def fast_probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inspect models in this process: 200 child processes take a minute."""

    def probe(data: bytes, *, where: str) -> dict[str, Any]:
        return xgboost_probe.facts(xgboost.Booster(model_file=bytearray(data)), data)

    monkeypatch.setattr(flavor, "probe", probe)
    forget_models()
    yield
    forget_models()
    set_process_facts(ProcessFacts())


def make_spec(folder: Path, out: Path, **score: Any) -> JobSpec:
    step = {"by": "key", "models": str(folder / "models" / "{}.ubj"), "output": "p", **score}
    return JobSpec.build(
        name="keyed",
        source={"path": str(folder / "part-*.parquet")},
        steps=[{"score": step}],
        sink={"path": str(out)},
        errors={"max_fraction": 1.0},
    )


def oracle(folder: Path) -> pa.Table:
    """Each model alone, on all rows of its key."""
    rows = pq.read_table([folder / "part-0.parquet", folder / "part-1.parquet"])
    parts = []
    for key in range(KEYS):
        part = rows.filter(pc.equal(rows["key"], key))
        matrix = np.column_stack([part["x"], part["y"]])
        booster = xgboost.Booster(model_file=folder / f"models/{key}.ubj")
        data = xgboost.DMatrix(matrix, feature_names=["x", "y"])
        parts.append(part.append_column("p", pa.array(booster.predict(data), pa.float32())))
    return pa.concat_tables(parts).sort_by("id")


@pytest.mark.parametrize("memory", [1 << 30, 1 << 20], ids=["1 GB", "too little"])
def test_200_models_in_a_worker(folder: Path, tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a slow machine there would be more batches, and more loads, to keep each short.
    monkeypatch.setattr(batching, "SECONDS", 600.0)
    set_process_facts(ProcessFacts(memory=memory))
    plan = plan_inline(make_spec(folder, tmp_path / "out"), directory=tmp_path / "jobs")
    job = JobDirectory.open_or_create(tmp_path / "jobs", plan, job="k-1", options=JobOptions(fsync=False))
    (partition,) = plan.partitions
    score_partition(replace(job.recipe, batch_rows=2000), partition, plan.versions)
    publish_inline(job)
    found, expected = pq.read_table(tmp_path / "out").sort_by("id"), oracle(folder)
    assert found.select(expected.column_names).equals(expected)  # bit by bit
    report = make_report(job)
    assert report.reasons == {"no_model": ROWS - len(expected)}
    if memory == 1 << 30:
        assert report.model_loads == KEYS  # in four batches
        verified = verify(job, sample=300, seed=1)
        assert verified.ok
        assert f"and {KEYS - 8} more give the same" in verified.text()
    else:
        # Each further batch finds the models that fit: 20 % of 1 MiB for some 8 KiB each.
        assert KEYS < report.model_loads < 4 * KEYS - 3 * 15


def few(folder: Path) -> dict[str, str]:
    return {str(key): str(folder / "models" / f"{key}.ubj") for key in range(5)}


def test_the_plan_pins_each_file_and_says_what_a_worker_holds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_inline(make_spec(folder, tmp_path / "out"), directory=tmp_path / "jobs")
    assert len(plan.pins) == len({version.digest for version in plan.models}) == KEYS
    assert plan.spec.score.keyed_models["7"] == str(folder / "models" / "7.ubj")
    summary = plan_summary(plan, Limits(1, 1, 1 << 30))
    assert "200 values of key: 0, 1, 10" in summary.text()
    assert "score with 200 models by key" in summary.text()
    assert len(summary.text()) < 4000
    assert summary.warnings == ()
    assert plan.worker_memory(Limits(1, 1, 1 << 30)) < 1 << 30


def test_a_worker_that_cannot_hold_all_is_warned_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.plan.planner.limit_bytes", lambda memory: 100_000)
    plan = plan_inline(make_spec(folder, tmp_path / "out", models=few(folder)), directory=tmp_path / "jobs")
    assert 0 < plan.model_bytes < sum(version.nbytes for version in plan.models)
    (warning,) = plan_summary(plan, Limits(1, 1, 0)).warnings
    assert "they are loaded again for later batches" in warning


def test_a_model_that_comes_later_scores_the_rejected_rows(folder: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for key, path in few(folder).items():
        (models / f"{key}.ubj").symlink_to(path)
    spec = make_spec(folder, tmp_path / "out", models=str(models / "{}.ubj"))
    job = score_inline(plan_inline(spec, directory=tmp_path / "jobs"), directory=tmp_path / "jobs", job="k-1")
    publish_inline(job)
    (models / f"{KEYS}.ubj").symlink_to(folder / "models" / "9.ubj")
    request = RetryRequest(overrides=(f"steps.0.score.models={models}/{{}}.ubj",))
    settings = Settings(directory=str(tmp_path / "jobs"), workers=1, threads=1, fsync=False)
    round_ = open_retry(job, request, epoch=0, settings=settings)
    assert round_ is not None
    assert list(round_.plan.spec.score.keyed_models) == ["0", "1", "2", str(KEYS), "3", "4"]
    recipe = job.recipe_of(round_)
    for partition in round_.plan.partitions:
        score_partition(recipe, partition, round_.plan.versions)
    publish_inline(job)
    rows = pq.read_table([folder / "part-0.parquet", folder / "part-1.parquet"])["key"].to_pylist()
    published = pq.read_table(tmp_path / "out")["key"].to_pylist()
    assert sorted(published) == sorted(key for key in rows if key < 5 or key == KEYS)


def test_rows_without_a_model_fail_a_job_that_allows_no_rejects(folder: Path, tmp_path: Path) -> None:
    spec = make_spec(folder, tmp_path / "out", models=few(folder)).model_copy(update={"errors": Errors()})
    job = score_inline(plan_inline(spec, directory=tmp_path / "jobs"), directory=tmp_path / "jobs", job="k-1")
    with pytest.raises(TooManyRejects, match="too many rows") as caught:
        decide_status(job.ledger(), job=job.id)
    assert "no_model" in caught.value.found


def test_other_rows_get_null_and_a_job_resumes_from_its_stored_plan(folder: Path, tmp_path: Path) -> None:
    spec = make_spec(folder, tmp_path / "out", models=few(folder), other=None)
    plan = plan_inline(spec, directory=tmp_path / "jobs")
    job = score_inline(plan, directory=tmp_path / "jobs", job="k-1")
    assert JobDirectory.open(job.root).plan.digest == plan.digest
    publish_inline(job)
    found = pq.read_table(tmp_path / "out")
    assert found["p"].null_count == sum(key >= 5 for key in found["key"].to_pylist()) > 0
    assert make_report(job).rows.rejected == 0
