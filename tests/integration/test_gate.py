"""A gate holds back an output that has drifted: readers see the old one until somebody accepts the new one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.api.stored_jobs import publish
from pipeline.driver.prepare import prepare
from pipeline.errors import CorruptInput, GateFailed, PipelineError, SpecError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job
from pipeline.jobs.status import Status
from pipeline.report.gate import accept, read_gate
from pipeline.report.report import Report
from pipeline.report.trend import trend, trend_text
from pipeline.runner import resume, run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import Lake

GATE = {"psi": 0.2, "min_rows": 10, "rows": {"min": 0.5}}


@pytest.fixture
def spec(lake: Lake, model_path: Path, tmp_path: Path) -> JobSpec:
    return spec_of(lake, model_path, tmp_path)


def spec_of(lake: Lake, model_path: Path, folder: Path, filter: str | None = None, **fields: Any) -> JobSpec:
    return JobSpec.build(
        **{
            "name": "gated",
            "source": {"path": str(lake.path), "filter": filter},
            "steps": [{"score": {"model": str(model_path), "output": "p", "keep": ["id"]}}],
            "sink": {"path": str(folder / "out"), "mode": "overwrite"},
            "gate": GATE,
            **fields,
        }
    )


def held_back(spec: JobSpec, settings: Settings) -> JobDirectory:
    with pytest.raises(GateFailed) as caught:
        run(spec, settings=settings)
    assert "nothing was published" in caught.value.message
    assert "age: psi is" in caught.value.found
    return find_job(settings.directory, "@last")


def rows_out(folder: Path) -> int:
    return pq.read_table(folder / "out").num_rows


def test_what_drifted_is_published_once_it_is_accepted(
    spec: JobSpec, lake: Lake, model_path: Path, settings: Settings, tmp_path: Path
) -> None:
    first: Report = run(spec, settings=settings)
    assert first.gate is not None
    assert first.gate.skipped == ("no baseline: no job of this name was published before",)
    job = held_back(spec_of(lake, model_path, tmp_path, filter="age > 60"), settings)
    assert job.status() is Status.FAILED
    assert job.manifests.numbers() == []
    assert rows_out(tmp_path) == first.rows.output
    with pytest.raises(GateFailed):
        resume(job.id, settings=settings)
    accept(job, "older customers only")
    report = resume(job.id, settings=settings)
    assert report.status is Status.SUCCEEDED_WITH_WARNINGS
    assert report.gate is not None
    assert "older customers only" in report.gate.accepted
    assert rows_out(tmp_path) == report.rows.output < first.rows.output
    before, now = trend(settings.directory, "gated")
    assert (before.drift, now.drift_column) == (None, "age")
    assert "age" in trend_text([before, now])
    with pytest.raises(SpecError, match="nothing to accept"):
        accept(find_job(settings.directory, first.job), "why not")


def test_a_warning_publishes(lake: Lake, model_path: Path, settings: Settings, tmp_path: Path) -> None:
    baseline = lake.files[0]
    gate = {"columns": {"age": {"mean": [0, 1]}}, "psi": 5, "baseline": str(baseline), "action": "warn", "min_rows": 9}
    report = run(spec_of(lake, model_path, tmp_path, gate=gate), settings=settings)
    assert report.status is Status.SUCCEEDED_WITH_WARNINGS
    assert any("1 of" in warning and "gate" in warning for warning in report.warnings)
    assert report.gate is not None
    assert report.gate.baseline == str(baseline)
    assert {check.measure for check in report.gate.checks} == {"mean", "psi"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate": {"columns": {"id": {"min": 0}}}}, "a column of the gate has no distribution"),
        ({"gate": {"psi": 0.2}, "report": {"distributions": False}}, "needs distributions"),
        ({"gate": {"psi": 0.2, "baseline": "nowhere-20260101"}}, "baseline of the gate was not found"),
        ({"gate": {"psi": 0.2, "baseline": "no/such/folder"}}, "baseline of the gate was not found"),
    ],
)
def test_a_gate_that_cannot_be_checked_is_refused_before_anything_runs(
    lake: Lake, model_path: Path, settings: Settings, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        prepare(spec_of(lake, model_path, tmp_path, **fields), settings=settings)


def test_files_of_a_baseline_are_looked_at_before_anything_runs(
    lake: Lake, model_path: Path, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    pq.write_table(pa.table({"other": [1.0]}), tmp_path / "other.parquet")
    for name, error in (("bad", CorruptInput), ("other", SpecError)):
        gate = {"psi": 0.2, "baseline": str(tmp_path / f"{name}.parquet")}
        with pytest.raises(error):
            prepare(spec_of(lake, model_path, tmp_path, gate=gate), settings=settings)


def test_training_data_are_a_baseline(lake: Lake, model_path: Path, settings: Settings, tmp_path: Path) -> None:
    registry = pipeline.Registry(tmp_path / "models")
    rows = pq.read_table(lake.path, columns=["age", "balance"], filters=[("age", ">", 60)]).to_pandas()
    registry.register(model_path, name="churn", alias="champion", training=rows)
    settings = replace(settings, registry=registry.root)
    gate = {"psi": 0.2, "baseline": "training"}
    steps = [{"score": {"model": "models:/churn@champion", "output": "p", "keep": ["id"]}}]
    with pytest.raises(GateFailed) as caught:
        run(spec_of(lake, model_path, tmp_path, gate=gate, steps=steps), settings=settings)
    assert "the training data" in caught.value.where
    assert caught.value.found.startswith("age: psi is")
    assert "balance" not in caught.value.found
    for fields, message in (
        ({"gate": gate}, "no distributions of its training data"),
        ({"gate": {**gate, "rows": {"min": 0.5}}, "steps": steps}, "number of rows with that of the training data"),
    ):
        with pytest.raises(SpecError, match=message):
            prepare(spec_of(lake, model_path, tmp_path, **fields), settings=settings)


def test_a_fan_out_that_publishes_together_is_checked_together(
    lake: Lake, model_path: Path, settings: Settings, tmp_path: Path
) -> None:
    fields = {
        "fan_out": {"by": ["1", "2"]},
        "sink": {"path": str(tmp_path / "out/${fan_out.value}")},
        "gate": {"rows": {"at_most": 3}},
    }
    with pytest.raises(GateFailed):
        run(spec_of(lake, model_path, tmp_path, **fields), settings=settings)
    family = find_job(settings.directory, "@last")
    assert not (tmp_path / "out").exists()
    result = read_gate(family)
    assert result is not None
    assert result.failed[0].value == 2 * lake.rows


def test_a_child_that_publishes_itself_is_compared_with_the_child_before(
    lake: Lake, model_path: Path, settings: Settings, tmp_path: Path
) -> None:
    fields = {
        "fan_out": {"by": ["1"], "publish": "each"},
        "sink": {"path": str(tmp_path / "out/${fan_out.value}"), "mode": "overwrite"},
    }
    first = run(spec_of(lake, model_path, tmp_path, **fields), settings=settings)
    with pytest.raises(PipelineError):
        run(spec_of(lake, model_path, tmp_path, filter="age > 60", **fields), settings=settings)
    (child,) = find_job(settings.directory, "@last").children()
    result = read_gate(child)
    assert result is not None
    assert result.baseline == f"{first.job}.{child.id.rpartition('.')[2]}"
    assert "age: psi is" in result.text()


def test_a_job_of_several_stages_is_checked_before_its_root_publishes(
    lake: Lake, model_path: Path, settings: Settings, tmp_path: Path
) -> None:
    steps = [{"filter": "age > 60"}, {"checkpoint": True}, {"score": {"model": str(model_path), "output": "p"}}]
    gate = {"columns": {"age": {"max": 61}}}
    with pytest.raises(GateFailed):
        run(spec_of(lake, model_path, tmp_path, steps=steps, gate=gate), settings=settings)
    job = find_job(settings.directory, "@last")
    assert not (tmp_path / "out").exists()
    assert publish(job.id, accept="known", settings=settings, callbacks=[]).status is Status.SUCCEEDED_WITH_WARNINGS
    assert pq.read_table(tmp_path / "out")["age"].to_numpy().max() > 61
