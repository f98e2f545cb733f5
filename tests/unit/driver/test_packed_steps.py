"""Jobs whose steps are functions of a notebook: planned, scored, resumed, retried and verified without the notebook."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.dataset as ds
import pytest

import pipeline
from pipeline.common import step_modules, travel
from pipeline.driver.prepare import prepare
from pipeline.driver.retry import RetryRequest, open_retry
from pipeline.driver.step_change import StepMonitor
from pipeline.errors import SpecError, StateCorrupt
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.lease import hold_lease
from pipeline.report.verify import verify
from pipeline.scoring.partition import score_partition
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.inline import publish_inline
from pipeline.testing.oracle import Lake


def forget() -> None:
    """Make this process like another one."""
    travel._known.clear()
    with step_modules._lock:
        step_modules._switch(None)
        step_modules._cache.clear()


def job_of(tmp_path: Path, lake: Lake, model: Path, step: Any, **fields: Any) -> pipeline.Job:
    return pipeline.Job(
        "j",
        source={"path": str(lake.path)},
        steps=[step, pipeline.Score(model=str(model), keep=["id", "flag"])],
        sink={"path": str(tmp_path / "out")},
        settings=Settings(directory=str(tmp_path / "jobs"), workers=1, threads=1, memory_limit="4 GiB"),
        **fields,
    )


def create(job: pipeline.Job) -> JobDirectory:
    plan = prepare(job.spec, settings=job.settings).plan
    options = JobOptions(import_paths=job.settings.import_paths, fsync=False)
    made = JobDirectory.create(job.settings.directory, plan, job="j-1", options=options)
    return JobDirectory.open(made.root, fsync=False)


def score_rest(job: JobDirectory) -> None:
    ledger = job.ledger()
    for partition in ledger.todo:
        score_partition(job.recipe_of(ledger.last), partition, ledger.last.plan.versions)


def flags(job: JobDirectory) -> set[str]:
    published = publish_inline(job)
    files = [f"{published.path}/{file.name}" for file in published.files]
    return set(ds.dataset(files).to_table(columns=["flag"]).column(0).to_pylist())


def test_a_job_goes_on_in_another_process(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    flag = "closure"

    def clean(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(flag=flag)

    made = job_of(tmp_path, lake, model_path, clean)
    assert "clean (by value, " in str(made.plan())
    job = create(made)
    (name,) = (path for path in Path(job.root, "code").iterdir() if path.suffix == ".py")
    assert name.read_text().startswith("def clean(frame")
    forget()
    with hold_lease(job.store, lease_seconds=30) as lease:
        StepMonitor(job, lease, made.settings).apply_policy(job.ledger())
    forget()
    score_rest(job)
    assert flags(job) == {"closure"}
    forget()
    assert verify(job, sample=50).ok


def test_mappings_and_models_of_the_spec_take_functions(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    step = {"map": lambda frame: frame.assign(flag="lambda"), "dtype_backend": "pyarrow"}
    job = create(job_of(tmp_path, lake, model_path, step))
    score_rest(job)
    assert flags(job) == {"lambda"}


def test_a_changed_file_of_the_job_is_never_loaded(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    job = create(job_of(tmp_path, lake, model_path, lambda frame: frame.assign(flag="a")))
    (path,) = (path for path in Path(job.root, "code").iterdir() if path.suffix == ".pickle")
    path.chmod(0o600)
    path.write_bytes(path.read_bytes() + b"x")
    forget()
    with pytest.raises(StateCorrupt, match="not the planned one"):
        score_rest(job)


def test_a_retry_takes_another_function(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    made = job_of(tmp_path, lake, model_path, lambda frame: frame.assign(flag="a"))
    job = create(made)
    first = job.plan.partitions[0]
    score_partition(job.recipe, first, job.plan.versions)
    forget()
    fixed = travel.entrypoint_of(lambda frame: frame.assign(flag="b"))
    with hold_lease(job.store, lease_seconds=30) as lease:
        request = RetryRequest(overrides=(f"steps.0.map={fixed}",))
        assert open_retry(job, request, epoch=lease.epoch, settings=made.settings) is not None
    forget()
    score_rest(job)
    assert flags(job) == {"a", "b"}


def test_a_redefinition_is_logged_and_ignored(
    tmp_path: Path, lake: Lake, model_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job_of(tmp_path, lake, model_path, lambda frame: frame.assign(flag="a"))
    job = create(made)
    monkeypatch.setattr("pipeline.driver.step_change.changed_since", lambda name: "clean is defined differently")
    with hold_lease(job.store, lease_seconds=30) as lease, caplog.at_level(logging.WARNING):
        StepMonitor(job, lease, made.settings).apply_policy(job.ledger())
    assert "clean is defined differently since job j-1 was planned" in caplog.text


def test_a_spec_without_its_function_says_where_it_is(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    made = job_of(tmp_path, lake, model_path, lambda frame: frame.assign(flag="a"))
    forget()
    with pytest.raises(SpecError, match="the function lambda is not here") as caught:
        made.plan()
    assert "resume or retry that job" in caught.value.next_step


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (dict, "is a class"),
        ({"map": 3}, "is invalid"),
    ],
)
def test_other_objects_are_no_steps(step: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        JobSpec.build(
            name="j", source={"path": "x"}, steps=[{"map": step} if step is dict else step], sink={"path": "y"}
        )
