"""Jobs with checkpoints between their steps: rebalanced, published, verified, retried, cleaned."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.api.job import Job
from pipeline.errors import SpecError, StepFailed
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job, list_jobs
from pipeline.jobs.stages import output_rows, stage_states
from pipeline.models.flavors.xgboost_train import predict
from pipeline.report.html.page import report_page
from pipeline.report.rejects import rejects_frame, summarise
from pipeline.report.report import Report
from pipeline.report.verify import rescore_sample, verify
from pipeline.runner import resume, retry, run
from pipeline.service.follow import Follower
from pipeline.service.gc import sweep_job
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import FEATURES, Lake

Make = Callable[..., JobSpec]


@pytest.fixture
def make(lake: Lake, tmp_path: Path, model_path: Path) -> Make:
    def spec(*steps: dict[str, Any], **fields: Any) -> JobSpec:
        score = {"score": {"model": str(model_path), "output": "p", "keep": ["id"]}}
        return JobSpec.build(
            **{
                "name": "staged",
                "source": {"path": str(lake.path)},
                "steps": [*steps, score],
                "sink": {"path": str(tmp_path / "out")},
                **fields,
            }
        )

    return spec


@pytest.fixture
def expected(lake: Lake, model_path: Path) -> pd.DataFrame:
    frame = pd.concat([pq.read_table(file).to_pandas() for file in lake.files], ignore_index=True)
    return frame.assign(p=predict(frame[list(FEATURES)], model=model_path))[["id", "p"]]


def published(folder: Path) -> pd.DataFrame:
    return pq.read_table(folder).to_pandas().sort_values("id", ignore_index=True)


def stages(job: JobDirectory) -> list[JobDirectory]:
    return [state.job for state in stage_states(job) if state.job is not None]


def test_a_skewed_stage_becomes_balanced_partitions(
    make: Make, settings: Settings, tmp_path: Path, expected: pd.DataFrame
) -> None:
    keep = {"map": "steps_for_tests:keep_the_first_file"}
    report = run(make(keep, {"checkpoint": {"partition_bytes": "16 KiB"}}), settings=settings)
    pd.testing.assert_frame_equal(published(tmp_path / "out"), expected[expected["id"] < 3000], check_exact=True)
    job = find_job(settings.directory, "@last")
    first, second = stages(job)
    left = [receipt.rows.output for receipt in first.receipts.all()]
    assert max(left) > 3 * sum(left) / len(left), "the step leaves some partitions without rows"
    rows = [partition.rows for partition in second.plan.partitions]
    assert len(rows) > 4
    assert max(rows) < 1.5 * sum(rows) / len(rows)
    assert (report.rows.input, report.rows.output) == (len(expected), 3000)
    assert [stage.status for stage in report.stages] == ["sealed", "sealed"]
    assert report.stages[1].rows.input == report.stages[0].rows.output == 3000
    assert Report.from_dict(report.to_dict()) == report
    assert "step 2  sealed" in str(report)
    assert "<td>steps 2</td>" in report_page(job, report)
    assert verify(job).ok
    (summary,) = list_jobs(settings.directory)
    assert summary.done == summary.planned == len(left) + len(rows)
    ended = list(Follower(job).poll())
    assert ended[-1].partitions == len(rows)  # type: ignore[union-attr]


def test_a_reject_of_a_later_stage_names_its_input_row(make: Make, settings: Settings, lake: Lake) -> None:
    steps = [{"map": "steps_for_tests:drop_young"}, {"checkpoint": True}, {"map": "steps_for_tests:fail_on_few"}]
    report = run(make(*steps, errors={"max_fraction": 0.1}), settings=settings)
    rejects = rejects_frame(find_job(settings.directory, "@last"))
    assert len(rejects) == report.rows.rejected > 0
    for file, row, number in zip(rejects["_file"], rejects["_row"], rejects["id"], strict=True):
        assert file in set(map(str, lake.files))
        assert pq.read_table(file, columns=["id"])["id"][row].as_py() == number


def test_a_retry_flows_through_later_stages(
    make: Make, settings: Settings, tmp_path: Path, expected: pd.DataFrame
) -> None:
    first = {"map": "steps_for_tests:fail_on_few"}
    last = {"map": "steps_for_tests:fail_on_fewer"}
    spec = make(first, {"checkpoint": True}, last, errors={"max_fraction": 0.1})
    bad = int((expected["id"] % 500 == 13).sum())
    assert run(spec, settings=settings).rows.rejected == bad
    job = find_job(settings.directory, "@last")
    done = {receipt.attempt for stage in stages(job) for receipt in stage.receipts.all()}
    with pytest.raises(SpecError, match="where stages end"):
        retry(
            "@last",
            overrides=["steps.1.checkpoint=null", "steps=[{map: 'steps_for_tests:as_it_is'}]"],
            settings=settings,
        )
    with pytest.raises(SpecError, match="must give the columns"):
        retry("@last", overrides=["steps.0.map=steps_for_tests:add_ratio"], settings=settings)
    # What the first stage recovers, the second rejects in part; nothing that was done is done again.
    repaired = retry("@last", overrides=["steps.0.map=steps_for_tests:as_it_is"], settings=settings)
    few = int((expected["id"] % 1000 == 13).sum())
    assert (repaired.rows.rejected, repaired.rows.output) == (few, len(expected) - few)
    assert verify(job).ok, verify(job)
    ledger = stages(job)[0].ledger()
    ledger.done = [receipt for receipt in ledger.done if receipt.before]  # type: ignore[assignment]
    sample = rescore_sample(stages(job)[0], ledger, rows=100, random=Random(0))
    assert (sample.wrong, sample.rows_in > 0) == ([], True), "the origin of retried rows is compared, too"
    again = retry("@last", overrides=["steps.2.map=steps_for_tests:as_it_is"], settings=settings)
    assert (again.rows.rejected, again.rows.output) == (0, len(expected))
    assert again.status == "SUCCEEDED"
    assert done <= {receipt.attempt for stage in stages(job) for receipt in stage.receipts.all()}
    assert verify(job).ok, verify(job)
    assert [stage.rounds.all()[-1].reason for stage in stages(job)] == ["retry", "retry"]
    pd.testing.assert_frame_equal(published(tmp_path / "out"), expected, check_exact=True)
    assert summarise(job).total == 0
    assert retry("@last", settings=settings).published == again.published


def test_limits_are_decided_before_the_next_stage(make: Make, settings: Settings, tmp_path: Path) -> None:
    spec = make({"map": "steps_for_tests:fail_on_few"}, {"checkpoint": True})
    with pytest.raises(StepFailed) as caught:
        run(spec, settings=settings)
    job = find_job(settings.directory, "@last")
    assert f"rejects {job.id}" in str(caught.value)
    assert len(stages(job)) == 1
    assert job.status() == "FAILED"
    assert not (tmp_path / "out").exists()
    with pytest.raises(SpecError, match="a stage runs as a part of its job"):
        resume(stages(job)[0].root, settings=settings)
    repaired = retry("@last", overrides=["steps.0.map=steps_for_tests:as_it_is"], settings=settings)
    assert (repaired.status, repaired.rows.rejected) == ("SUCCEEDED", 0)
    assert verify(job).ok


def test_a_break_in_the_chain_is_found(make: Make, settings: Settings) -> None:
    run(make({"map": "steps_for_tests:as_it_is"}, {"checkpoint": True}), settings=settings)
    job = find_job(settings.directory, "@last")
    path = Path(stages(job)[0].root) / "manifests/1.json"
    path.write_bytes(path.read_bytes().replace(b'"number": 1', b'"number":  1'))
    failed = {check.name: check.detail for check in verify(JobDirectory.open(job.root)).checks if not check.ok}
    assert list(failed) == ["chain"]
    assert "0: manifest 1 has SHA-256" in failed["chain"]


def test_rows_between_stages_are_removed_on_demand(make: Make, settings: Settings, tmp_path: Path) -> None:
    spec = make({"map": "steps_for_tests:fail_on_few"}, {"checkpoint": True}, errors={"max_fraction": 0.1})
    run(spec, settings=settings)
    job, now = find_job(settings.directory, "@last"), datetime.now(UTC)
    assert not sweep_job(job, now=now).leftovers
    swept = sweep_job(job, now=now, stages=True, delete=True)
    assert {leftover.kind for leftover in swept.leftovers} == {"checkpoint"}
    assert not list(Path(stages(job)[0].root).glob("rounds/0/data/*"))
    proof = verify(job)
    assert proof.ok, proof
    assert "removed by gc --stages" in str(proof)
    repaired = retry("@last", overrides=["steps.0.map=steps_for_tests:as_it_is"], settings=settings)
    assert (repaired.status, repaired.rows.rejected) == ("SUCCEEDED", 0)
    assert len(published(tmp_path / "out")) == repaired.rows.output


def test_children_of_a_fan_out_have_stages(
    make: Make, settings: Settings, tmp_path: Path, expected: pd.DataFrame, lake: Lake
) -> None:
    spec = make(
        {"map": "steps_for_tests:as_it_is"},
        {"checkpoint": True},
        sink={"path": str(tmp_path / "out-${fan_out.value}")},
        fan_out={"by": "segment"},
    )
    report = run(spec, settings=settings)
    assert report.rows.output == len(expected)
    frames = [published(Path(child.output)) for child in report.children]
    found = pd.concat(frames).sort_values("id", ignore_index=True)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    job = find_job(settings.directory, "@last")
    assert all(len(stages(child)) == 2 for child in job.children())
    assert sum(map(output_rows, job.children())) == report.rows.output
    assert verify(job).ok, verify(job)


def test_an_incremental_job_may_have_stages(
    make: Make, settings: Settings, tmp_path: Path, lake: Lake, expected: pd.DataFrame
) -> None:
    spec = make(
        {"map": "steps_for_tests:as_it_is"},
        {"checkpoint": True},
        source={"path": str(lake.path), "incremental": True},
        sink={"path": str(tmp_path / "out"), "mode": "append"},
    )
    assert run(spec, settings=settings).rows.output == len(expected)
    assert run(spec, settings=settings).rows.input == 0
    pd.testing.assert_frame_equal(published(tmp_path / "out"), expected, check_exact=True)


def test_a_lazy_frame_has_the_same_rows(make: Make, settings: Settings, tmp_path: Path, expected: pd.DataFrame) -> None:
    spec = make({"map": "steps_for_tests:as_it_is"}, {"checkpoint": True}, {"filter": "id < 100"})
    (tmp_path / "job.yaml").write_text(spec.to_yaml())
    job = Job.load(tmp_path / "job.yaml", settings=settings)
    frame = job.to_dask().compute().sort_values("id", ignore_index=True)
    pd.testing.assert_frame_equal(frame, expected[expected["id"] < 100], check_exact=True)
