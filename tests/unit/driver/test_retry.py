"""The round of a retry: its rows, step, contract and model, and the rejected changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.driver.retry import RetryRequest, open_retry
from pipeline.errors import OutputConflict, PipelineError, SpecError
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.rounds import Round
from pipeline.jobs.status import Status
from pipeline.models.registry import resolve
from pipeline.plan.plan import Limits
from pipeline.plan.planner import make_plan
from pipeline.scoring.outputs import prediction_schema
from pipeline.scoring.partition import score_partition
from pipeline.scoring.step_plan import plan_frames
from pipeline.settings import Settings
from pipeline.sinks import publish
from pipeline.sources import discover, sample_batch
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.oracle import Lake, make_lake, train_model

SETTINGS = Settings.load(workers=2, threads=1, memory_limit="4 GiB")
STEPS = """
def build(frame):
    if (frame["id"] % 1000 == 13).any():
        raise ValueError("unlucky row")
    return frame.assign(double=frame["age"] * 2)


def repaired(frame):
    return frame.assign(double=frame["age"] * 2)


def without(frame):
    return frame


def needs_more(frame):
    return frame.assign(double=frame["not_there"])


def of_truth(frame):
    return frame.assign(double=frame["age"] * 2, age=frame["age"] > 30)
"""


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return small_lake(tmp_path / "lake")


def small_lake(path: Path) -> Lake:
    """Three files, of which two have unlucky rows."""
    return make_lake(path, rows=(2_100, 300, 1_000), row_group=1500)


def make_job(folder: Path, lake: Lake, model: Path, *, done: int | None = None) -> JobDirectory:
    """A job whose step fails on every id that ends in 013, run by hand and published.

    :param done: how many partitions are done; None: all, and they are published.
    """
    (folder / "repairs.py").write_text(STEPS)
    spec = JobSpec.model_validate(
        {
            "name": "churn",
            "source": {"path": str(lake.path)},
            "steps": [{"map": "repairs:build"}, {"score": {"model": str(model), "keep": ["id", "double"]}}],
            "sink": {"path": str(folder / "out")},
            "errors": {"max_fraction": 1.0},
            "contract": {"age": {"max": 60}},
        }
    )
    version, found = resolve(ModelRef.parse(str(model))), discover(spec.source)
    batch = sample_batch(found, columns=found.schema.names, schema=found.schema)
    plan = make_plan(
        spec,
        model=version,
        discovery=found,
        frame_schemas=plan_frames(spec.maps, batch.table, import_paths=(str(folder),)).schemas,
        predictions=prediction_schema(version, output=spec.score.output_spec),
        limits=Limits(workers=2, threads=2, memory=4 << 30),
    )
    job = JobDirectory.create(
        folder / "jobs", plan, job="churn-1", options=JobOptions(fsync=False, import_paths=(str(folder),))
    )
    job.set_status(Status.RUNNING)
    for partition in plan.partitions[:done]:
        score_partition(job.recipe, partition, plan.versions, worker="w")
    if done is None:
        job.set_status(Status.PUBLISHING)
        publish(job.manifests.commit(job.manifests.prepare(job.ledger())).manifest, job)
        job.set_status(Status.SUCCEEDED_WITH_WARNINGS)
    return job


@pytest.fixture
def job(in_folder: Path, lake: Lake, model_path: Path) -> JobDirectory:
    return make_job(in_folder, lake, model_path)


@pytest.fixture(scope="module")
def unchanged_job(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> JobDirectory:
    """A job for retries that are refused; each checks that it changes nothing."""
    folder = tmp_path_factory.mktemp("unchanged")
    return make_job(folder, small_lake(folder / "lake"), model_path)


def opened(job: JobDirectory, *overrides: str, model: str | None = None) -> Round:
    found = open_retry(job, RetryRequest(model, overrides), epoch=7, settings=SETTINGS)
    assert found is not None
    return found


def run(job: JobDirectory, of: Round) -> None:
    for partition in job.ledger().todo:
        score_partition(job.recipe_of(of), partition, of.plan.versions, worker="w")


def test_without_anything_named_all_is_as_it_was(job: JobDirectory) -> None:
    before = job.ledger().rows
    found = opened(job)
    assert (found.plan.spec, found.plan.model, found.plan.score_rules) == (
        job.plan.spec,
        job.plan.model,
        job.plan.score_rules,
    )
    assert found.record is not None
    assert (found.record.rows, found.record.rejected_rows, found.record.epoch) == (before.rejected, before.rejected, 7)
    assert found.record.changes == ()
    run(job, found)
    assert job.ledger().rows == before
    # What is unfinished continues; what is finished is tried again.
    assert opened(job).number == 2
    assert open_retry(job, RetryRequest(), epoch=8, settings=SETTINGS) is None


def test_a_step_and_a_contract_that_are_named(job: JobDirectory) -> None:
    before = job.ledger()
    unlucky = before.reasons["step:repairs:build:ValueError"]
    found = opened(job, "steps.0.map=repairs:repaired")
    run(job, found)
    assert job.ledger().rows.output == before.rows.output + unlucky
    # The step stays repaired in the next retry.
    last = opened(job, "contract.age.max=200")
    assert [step.map for step in last.plan.spec.maps] == ["repairs:repaired"]
    assert last.record is not None
    assert last.record.changes == ("contract.age.max: 60 -> 200",)
    run(job, last)
    assert job.ledger().rows.rejected == 0


def test_a_model_that_is_named(job: JobDirectory, tmp_path: Path) -> None:
    other = train_model(tmp_path / "other.ubj", rounds=3)
    found = opened(job, model=str(other))
    assert found.plan.model.digest != job.plan.model.digest
    assert found.record is not None
    assert [text.split(":")[0] for text in found.record.changes] == ["steps[1].score.model", "model other"]
    assert found.record.maps == ("repairs:build",)


def test_another_retry_takes_over_what_one_left(job: JobDirectory) -> None:
    first = opened(job)
    second = opened(job, "steps.0.map=repairs:repaired")
    assert second.record is not None
    assert second.record.supersedes == {1: tuple(partition.id for partition in first.plan.partitions)}
    run(job, second)
    assert "step:repairs:build:ValueError" not in job.ledger().reasons


def test_partitions_that_were_not_done_are_done_with_what_is_named(in_folder: Path, model_path: Path) -> None:
    lake = make_lake(in_folder / "lake")
    job = make_job(in_folder, lake, model_path, done=1)
    waiting = [partition.id for partition in job.plan.partitions[1:]]
    assert waiting
    found = opened(job, "steps.0.map=repairs:repaired", "contract.age.max=200")
    assert found.record is not None
    assert found.record.supersedes == {0: tuple(waiting)}
    assert found.record.rows > found.record.rejected_rows > 0
    run(job, found)
    ledger = job.ledger()
    assert (ledger.rows.output, ledger.rows.rejected, ledger.rows.input) == (lake.rows, 0, lake.rows)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sink.path=elsewhere", "a retry cannot change this field"),
        ("source.filter=id > 3", "a retry cannot change this field"),
        ("name=other", "a retry cannot change this field"),
        ("steps.1.score.output=other", "a retry must give the columns that the output has"),
        ("steps.1.score.keep=[id]", "a retry must give the columns that the output has"),
        ("contract.nope.max=3", "nope"),
        ("steps.0.map=repairs:without", "'double'"),
        ("steps.0.map=repairs:needs_more", "fails on every row"),
        ("steps.0.map=repairs:gone", "no function 'gone'"),
        ("errors.max_fraction=2", "max_fraction"),
        ("steps.1.score.model=gone.ubj", "gone.ubj"),
    ],
)
def test_invalid_retry_is_refused_without_a_change(
    unchanged_job: JobDirectory, monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    job = unchanged_job
    monkeypatch.chdir(Path(job.root).parents[1])
    before = sorted(path for path in Path(job.root).rglob("*") if path.is_file())
    with pytest.raises(PipelineError, match=said):
        opened(job, override)
    assert sorted(path for path in Path(job.root).rglob("*") if path.is_file()) == before


def test_a_contract_that_a_changed_step_makes_incomparable_is_refused(job: JobDirectory) -> None:
    """The retry was opened, and every worker failed."""
    with pytest.raises(SpecError, match="cannot be compared") as caught:
        opened(job, "steps.0.map=repairs:of_truth", "contract.age.allowed=[20, 30]")
    assert caught.value.where == "contract.age"
    assert job.ledger().last.number == 0


def test_a_limit_that_is_raised_decides_anew(job: JobDirectory) -> None:
    found = opened(job, "errors.max_fraction=0.5")
    assert found.plan.score_rules == job.plan.score_rules
    assert job.ledger().last.plan.spec.errors.max_fraction == 0.5


def test_an_output_that_was_overwritten_cannot_be_repaired(
    job: JobDirectory, tmp_path: Path, lake: Lake, model_path: Path
) -> None:
    other = replace(job.plan, spec=JobSpec.load(job.plan.spec.to_yaml(), overrides=["sink.mode=overwrite"]))
    second = JobDirectory.create(
        tmp_path / "jobs2", other, job="churn-2", options=JobOptions(import_paths=(str(tmp_path),))
    )
    for partition in other.partitions:
        score_partition(second.recipe, partition, other.versions, worker="w")
    publish(second.manifests.commit(second.manifests.prepare(second.ledger())).manifest, second)
    with pytest.raises(OutputConflict, match="cannot repair the output"):
        opened(job)
    assert len(job.rounds.all()) == 1


def test_job_without_rejects_has_nothing_to_retry(job: JobDirectory) -> None:
    run(job, opened(job, "steps.0.map=repairs:repaired", "contract.age.max=200"))
    assert open_retry(job, RetryRequest(None, ("contract.age.max=300",)), epoch=9, settings=SETTINGS) is None


def test_the_columns_that_there_are_are_named(unchanged_job: JobDirectory) -> None:
    with pytest.raises(SpecError) as caught:
        opened(unchanged_job, "contract.nope.max=3")
    assert "a retry has only the columns that the job read (id, age" in caught.value.next_step
