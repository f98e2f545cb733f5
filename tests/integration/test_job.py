"""The main job on real Dask processes, against the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import steps_for_tests

from pipeline.errors import InputChanged, OutputExists, PipelineError, PlanMismatch, StepFailed, TooManyRejects
from pipeline.events import Callback, StepMessage
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job
from pipeline.report.live_figures import stored_figures
from pipeline.report.verify import verify
from pipeline.runner import resume, run
from pipeline.service.logs import LogReader
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import Lake, make_lake, make_table, oracle
from pipeline.testing.rewind import rewind

Make = Callable[..., JobSpec]


def published(path: Path) -> pa.Table:
    """All rows of an output, in the order of its files."""
    files = sorted(path.glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


def assert_equals_oracle(out: pa.Table, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(out.to_pandas(), expected, check_exact=True)


def test_every_row_is_scored_once_and_equals_the_oracle(
    make_spec: Make, settings: Settings, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    report = run(make_spec(), settings=settings)
    assert report.status == "SUCCEEDED"
    assert report.rows.to_dict() == {"in": lake.rows, "out": lake.rows, "rejected": 0, "filtered": 0}
    out = published(tmp_path / "out")
    assert_equals_oracle(out, oracle(lake.files, model_path))
    source = pa.concat_tables([pq.read_table(file) for file in lake.files])
    for name in source.column_names:
        assert out.schema.field(name).type == source.schema.field(name).type
        assert out[name].combine_chunks().equals(source[name].combine_chunks())
    assert out.schema.field("prediction").type == pa.float32()
    assert verify(find_job(settings.directory, "@last")).ok


def test_steps_make_columns_and_drop_rows(
    make_spec: Make, settings: Settings, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    maps = ("steps_for_tests:add_ratio", "steps_for_tests:drop_young")
    spec = make_spec(maps=maps, score={"keep": ["id", "ratio", "tags", "seen", "price"], "output": "churn"})
    report = run(spec, settings=settings)
    steps = (steps_for_tests.add_ratio, steps_for_tests.drop_young)
    expected = oracle(lake.files, model_path, steps=steps, output="churn")
    assert report.rows.filtered == lake.rows - len(expected) > 0
    columns = ["id", "ratio", "tags", "seen", "price", "churn"]
    out = published(tmp_path / "out")
    assert out.column_names == columns
    assert_equals_oracle(out, expected[columns])
    assert out.schema.field("price").type == pa.decimal128(12, 2)


@pytest.mark.parametrize("limits", [{}, {"timeout": 60}], ids=["in the worker", "in a process of its own"])
def test_prints_of_steps_are_told_once_and_kept_in_full(
    make_spec: Make, settings: Settings, tmp_path: Path, model_path: Path, limits: dict[str, float]
) -> None:
    class Recorder(Callback):
        def __init__(self) -> None:
            self.told: list[StepMessage] = []

        def on_message(self, event: StepMessage) -> None:
            self.told.append(event)

    step = {"map": "steps_for_tests:add_ratio_aloud", **limits}
    recorder = Recorder()
    steps = [step, {"score": {"model": str(model_path)}}]
    small = make_lake(tmp_path / "small", rows=(300,))
    report = run(make_spec(lake=small, steps=steps), settings=settings, callbacks=[recorder])
    assert sorted(event.kind for event in recorder.told) == ["print", "warning"]
    assert {event.step for event in recorder.told} == {"steps_for_tests:add_ratio_aloud"}
    job = JobDirectory.open(report.directory)
    (receipt,) = job.receipts.all()
    stored = job.store.read(f"logs/partitions/{receipt.partition}-{receipt.attempt}.jsonl")
    assert sum(message.count for message in receipt.messages) == len(stored.splitlines()) >= 2
    assert "300 rows" in " ".join(line.message for line in LogReader(job, partition=receipt.partition).read())
    assert len(stored_figures(job)["messages"]) == 2


def test_a_filter_counts_what_it_drops(
    make_spec: Make, settings: Settings, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    spec = make_spec(source={"path": str(lake.path), "filter": "id >= 1000 and segment == 'gold'"})
    report = run(spec, settings=settings)
    everything = oracle(lake.files, model_path)
    expected = everything[(everything["id"] >= 1000) & (everything["segment"] == "gold")].reset_index(drop=True)
    assert report.rows.output == len(expected)
    assert report.rows.filtered == lake.rows - len(expected)
    assert_equals_oracle(published(tmp_path / "out"), expected)


@pytest.mark.fault(22)
def test_rows_on_which_a_step_raises_are_rejected_with_place_and_reason(
    make_spec: Make, settings: Settings, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    spec = make_spec(maps=("steps_for_tests:fail_on_few",), errors={"max_fraction": 0.02})
    report = run(spec, settings=settings)
    everything = oracle(lake.files, model_path)
    unlucky = everything["id"] % 500 == 13
    assert report.status == "SUCCEEDED_WITH_WARNINGS"
    assert report.rows.rejected == unlucky.sum() > 0
    assert_equals_oracle(published(tmp_path / "out"), everything[~unlucky].reset_index(drop=True))
    job = find_job(settings.directory, "@last")
    rejects = pa.concat_tables(
        [pq.read_table(job.store.url(f"rounds/0/{r.rejects.name}")) for r in job.receipts.all() if r.rejects]
    ).to_pandas()
    assert set(rejects["id"]) == set(everything["id"][unlucky])
    assert set(rejects["_reason"]) == {"step:steps_for_tests:fail_on_few:ValueError"}
    assert rejects["_message"].str.contains("unlucky row").all()
    for file, row, identity in zip(rejects["_file"], rejects["_row"], rejects["id"], strict=True):
        assert pq.read_table(file)["id"][row].as_py() == identity
    assert verify(job).ok


@pytest.mark.fault(24)
def test_malformed_rows_break_the_contract_before_they_are_scored(
    settings: Settings, model_path: Path, tmp_path: Path
) -> None:
    table = make_table(5000, seed=1)
    balance = table["balance"].to_numpy(zero_copy_only=False).copy()
    balance[[3, 700, 4999]] = [np.inf, -np.inf, 1e300]
    age = table["age"].to_numpy().copy()
    age[[10, 11]] = [-5, 400]
    table = table.set_column(2, "balance", pa.array(balance)).set_column(1, "age", pa.array(age))
    (tmp_path / "lake").mkdir()
    pq.write_table(table, tmp_path / "lake" / "a.parquet")
    spec = JobSpec.build(
        name="test",
        source={"path": str(tmp_path / "lake")},
        steps=[{"score": {"model": str(model_path)}}],
        sink={"path": str(tmp_path / "out")},
        errors={"max_fraction": 0.01},
        contract={"age": {"min": 0, "max": 120}},
    )
    report = run(spec, settings=settings)
    assert report.rows.rejected == 5
    assert report.reasons == {"contract:balance:finite": 3, "contract:age:min": 1, "contract:age:max": 1}
    assert set(published(tmp_path / "out")["id"].to_pylist()) == set(range(5000)) - {3, 700, 4999, 10, 11}


def test_too_many_rejects_fail_the_job_and_leave_what_was_published(
    make_spec: Make, settings: Settings, tmp_path: Path
) -> None:
    run(make_spec(), settings=settings)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    spec = make_spec(maps=("steps_for_tests:fail_on_few",), sink={"path": str(tmp_path / "out"), "mode": "overwrite"})
    with pytest.raises(StepFailed, match="too many rows were rejected"):
        run(spec, settings=settings)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    job = find_job(settings.directory, "@last")
    assert job.status() == "FAILED"
    report = job.read_report()
    assert report is not None
    assert report["error"]["kind"] == "StepFailed"
    assert report["error"]["exit_code"] == 5


def test_data_at_fault_is_exit_4(make_spec: Make, settings: Settings) -> None:
    with pytest.raises(TooManyRejects) as caught:
        run(make_spec(contract={"age": {"max": 20}}), settings=settings)
    assert caught.value.exit_code == 4


def test_a_step_that_never_works_is_found_before_anything_runs(
    make_spec: Make, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(StepFailed, match="always_fail") as caught:
        run(make_spec(maps=("steps_for_tests:always_fail",)), settings=settings)
    assert "no_such_column" in str(caught.value)
    assert not (tmp_path / "jobs").exists()


def test_existing_output_is_an_error_in_mode_error_only(
    make_spec: Make, settings: Settings, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    run(make_spec(), settings=settings)
    with pytest.raises(OutputExists) as caught:
        run(make_spec(), settings=settings)
    assert caught.value.exit_code == 6
    run(make_spec(sink={"path": out, "mode": "overwrite"}), settings=settings)
    expected = oracle(lake.files, model_path)
    assert_equals_oracle(published(tmp_path / "out"), expected)
    run(make_spec(sink={"path": out, "mode": "append"}), settings=settings)
    assert sorted(published(tmp_path / "out")["id"].to_pylist()) == sorted([*expected["id"], *expected["id"]])


def count_receipts(job: JobDirectory) -> dict[str, str]:
    return {receipt.partition: receipt.attempt for receipt in job.receipts.all()}


def test_resume_scores_only_what_is_left_and_does_not_open_finished_input(
    make_spec: Make, settings: Settings, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    spec = make_spec()
    run(spec, settings=settings, job_id="first")
    job = find_job(settings.directory, "first")
    done = count_receipts(job)
    (lost,) = rewind(job, receipts=len(done) - 1)
    needed = {fragment.path for part in job.plan.partitions if part.id == lost for fragment in part.fragments}
    hidden = [file for file in lake.files if str(file) not in needed]
    assert hidden
    for file in hidden:
        file.rename(file.with_suffix(".hidden"))
    report = resume("first", settings=settings)
    assert report.status == "SUCCEEDED"
    after = count_receipts(find_job(settings.directory, "first"))
    assert {name for name in done if after[name] != done[name]} == {lost}
    for file in hidden:
        file.with_suffix(".hidden").rename(file)
    assert_equals_oracle(published(tmp_path / "out"), oracle(lake.files, model_path))


def test_a_job_that_succeeded_is_not_run_again(make_spec: Make, settings: Settings, tmp_path: Path) -> None:
    first = run(make_spec(), settings=settings, job_id="once")
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    again = run(make_spec(), settings=settings, job_id="once")
    assert again.status == first.status
    assert again.rows == first.rows
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == files


def test_another_plan_for_the_same_job_is_refused_with_what_differs(make_spec: Make, settings: Settings) -> None:
    run(make_spec(), settings=settings, job_id="mine")
    with pytest.raises(PlanMismatch) as caught:
        run(make_spec(score={"output": "other"}, sink={"path": "elsewhere"}), settings=settings, job_id="mine")
    assert "other" in caught.value.found or "output" in caught.value.found


@pytest.mark.fault(40)
def test_an_input_file_that_changed_since_the_plan_fails_the_job(
    make_spec: Make, settings: Settings, lake: Lake, tmp_path: Path
) -> None:
    from pipeline.driver.prepare import prepare

    prepared = prepare(make_spec(), settings=settings)
    JobDirectory.create(settings.directory, prepared.plan, job="stale")
    pq.write_table(make_table(5000, seed=123), lake.files[2])
    with pytest.raises(InputChanged) as caught:
        resume("stale", settings=settings)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(54)
def test_zero_rows_give_an_output_with_the_schema(settings: Settings, model_path: Path, tmp_path: Path) -> None:
    lake = make_lake(tmp_path / "none", rows=(0, 0))
    spec = JobSpec.build(
        name="none",
        source={"path": str(lake.path)},
        steps=[{"score": {"model": str(model_path)}}],
        sink={"path": str(tmp_path / "out")},
    )
    report = run(spec, settings=settings)
    assert report.status == "SUCCEEDED"
    assert report.rows.to_dict() == {"in": 0, "out": 0, "rejected": 0, "filtered": 0}
    out = published(tmp_path / "out")
    assert out.num_rows == 0
    assert out.schema.field("prediction").type == pa.float32()


@pytest.mark.parametrize(
    "rows", [pytest.param((20_000,), id="one giant file"), pytest.param((3,) * 300, id="300 tiny files")]
)
@pytest.mark.fault(54)
def test_shapes_of_input(rows: tuple[int, ...], settings: Settings, model_path: Path, tmp_path: Path) -> None:
    lake = make_lake(tmp_path / "shape", rows=rows, row_group=50_000)
    spec = JobSpec.build(
        name="shape",
        source={"path": str(lake.path)},
        steps=[{"score": {"model": str(model_path), "keep": ["id"]}}],
        sink={"path": str(tmp_path / "out")},
    )
    run(spec, settings=settings)
    assert_equals_oracle(published(tmp_path / "out"), oracle(lake.files, model_path)[["id", "prediction"]])


def test_hive_keys_are_columns(settings: Settings, model_path: Path, tmp_path: Path) -> None:
    for number, country in enumerate(("DE", "FR", "A%2FB")):
        folder = tmp_path / "lake" / f"country={country}" / f"day={number}"
        folder.mkdir(parents=True)
        pq.write_table(make_table(100, seed=number, start=100 * number), folder / "a.parquet")
    spec = JobSpec.build(
        name="hive",
        source={"path": str(tmp_path / "lake"), "filter": "country != 'FR'"},
        steps=[{"score": {"model": str(model_path), "keep": ["id", "country", "day"]}}],
        sink={"path": str(tmp_path / "out")},
    )
    report = run(spec, settings=settings)
    out = published(tmp_path / "out").to_pandas()
    assert report.rows.to_dict() == {"in": 300, "out": 200, "rejected": 0, "filtered": 100}
    assert set(zip(out["country"], out["day"], strict=True)) == {("DE", 0), ("A/B", 2)}


def test_target_file_size_merges_small_files(make_spec: Make, settings: Settings, lake: Lake, tmp_path: Path) -> None:
    run(make_spec(sink={"path": str(tmp_path / "out"), "target_file_size": "1 GiB"}), settings=settings)
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(files) == 1
    out = pq.read_table(files[0])
    assert out["id"].to_pylist() == list(range(lake.rows))
    assert pc.count(out["prediction"]).as_py() == lake.rows


def test_files_name_the_job_and_the_model(make_spec: Make, settings: Settings, tmp_path: Path) -> None:
    report = run(make_spec(), settings=settings)
    for file in (tmp_path / "out").glob("*.parquet"):
        metadata = {key.decode(): value.decode() for key, value in pq.read_metadata(file).metadata.items()}
        assert report.job in metadata.values() or any(report.job in value for value in metadata.values())
        assert any(report.model.digest in value for value in metadata.values())


def test_the_report_is_written_and_matches_the_events(make_spec: Make, settings: Settings) -> None:
    report = run(make_spec(), settings=settings)
    job = find_job(settings.directory, report.job)
    assert job.read_report() == json.loads(json.dumps(report.to_dict()))
    statuses = [event["after"] for event in job.events.read() if event["event"] == "status"]
    assert statuses == ["PLANNED", "PROVISIONING", "RUNNING", "PUBLISHING", "SUCCEEDED"]


def test_errors_of_workers_arrive_whole(make_spec: Make, settings: Settings, lake: Lake) -> None:
    with pytest.raises(PipelineError) as caught:
        run(make_spec(maps=("steps_for_tests:only_first_rows_work",)), settings=settings)
    assert "only_first_rows_work" in str(caught.value)
