"""Partial success on real Dask processes: rejected rows are scored again, and the output repaired, row for row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, PipelineError, SpecError, StepFailed
from pipeline.events import Callback, StatusChanged
from pipeline.jobs.listing import find_job
from pipeline.report.report import Report
from pipeline.report.verify import verify
from pipeline.runner import resume, retry, run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.jobs import read_output
from pipeline.testing.oracle import Lake, make_table, oracle, train_model

Make = Callable[..., JobSpec]
BROKEN, REPAIRED = "steps_for_tests:fail_on_few", "steps.0.map=steps_for_tests:as_it_is"


@pytest.fixture
def expected(lake: Lake, model_path: Path) -> pd.DataFrame:
    return oracle(lake.files, model_path)


def unlucky(frame: pd.DataFrame) -> pd.Series[bool]:
    return frame["id"] % 500 == 13


def assert_output(path: Path, expected: pd.DataFrame) -> None:
    """Row for row, whatever the order: rows that came out later are in files of their own."""
    found = read_output(path).sort_by("id")
    pd.testing.assert_frame_equal(found.to_pandas(ignore_metadata=True), expected.sort_values("id", ignore_index=True))


def assert_verified(report: Report) -> None:
    result = verify(find_job("", report.directory), sample=2000, seed=3)
    assert [check for check in result.checks if not check.ok] == []


def test_fixed_step_repairs_the_output(
    make_spec: Make, settings: Settings, tmp_path: Path, expected: pd.DataFrame
) -> None:
    first = run(make_spec(maps=(BROKEN,), errors={"max_fraction": 0.02}), settings=settings)
    assert first.status == "SUCCEEDED_WITH_WARNINGS"
    bad = int(unlucky(expected).sum())
    assert first.rows.rejected == bad
    # Nothing is repaired: nothing is lost either.
    again = retry("@last", settings=settings)
    assert again.status == "SUCCEEDED_WITH_WARNINGS"
    assert again.rows == first.rows
    assert_output(tmp_path / "out", expected[~unlucky(expected)])
    repaired = retry("@last", overrides=[REPAIRED], settings=settings)
    assert repaired.status == "SUCCEEDED"
    assert (repaired.rows.output, repaired.rows.rejected, repaired.published) == (len(expected), 0, 3)
    assert [(one.retried, one.recovered) for one in repaired.rounds] == [(bad, 0), (bad, bad)]
    assert repaired.rounds[1].changes == ("steps[0].map: steps_for_tests:fail_on_few -> steps_for_tests:as_it_is",)
    assert_output(tmp_path / "out", expected)
    assert_verified(repaired)
    assert retry("@last", settings=settings).status == "SUCCEEDED"
    assert resume("@last", settings=settings).published == 3


def test_a_job_that_failed_closed_is_repaired_before_anything_was_published(
    make_spec: Make, settings: Settings, tmp_path: Path, expected: pd.DataFrame
) -> None:
    with pytest.raises(PipelineError, match="too many rows were rejected"):
        run(make_spec(maps=(BROKEN,)), settings=settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(PipelineError, match="too many rows were rejected"):
        retry("@last", settings=settings)
    assert not (tmp_path / "out").exists()
    repaired = retry("@last", overrides=[REPAIRED], settings=settings)
    assert (repaired.status, repaired.published) == ("SUCCEEDED", 1)
    assert_output(tmp_path / "out", expected)
    assert_verified(repaired)


def test_a_retry_that_fails_leaves_the_output_as_it_was(
    make_spec: Make, settings: Settings, tmp_path: Path, expected: pd.DataFrame
) -> None:
    run(make_spec(maps=(BROKEN,), errors={"max_fraction": 0.02}), settings=settings)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(StepFailed):
        retry("@last", overrides=["steps.0.map=steps_for_tests:returns_nothing_on_a_worker"], settings=settings)
    job = find_job(settings.directory, "@last")
    assert job.status() == "FAILED"
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert_output(tmp_path / "out", expected[~unlucky(expected)])
    # What cannot be done is refused before anything happens.
    for wrong in ("sink.path=elsewhere", "source.filter=id > 3", "steps.1.score.output=other", "steps.0.map=no:such"):
        with pytest.raises((SpecError, StepFailed)):
            retry("@last", overrides=[wrong], settings=settings)
    assert len(job.rounds.all()) == 2
    repaired = retry("@last", overrides=[REPAIRED], settings=settings)
    assert repaired.status == "SUCCEEDED"
    assert_output(tmp_path / "out", expected)
    assert_verified(repaired)


def test_rows_out_of_bounds_are_scored_by_a_model_that_is_named(
    make_spec: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path
) -> None:
    other = train_model(tmp_path / "other.ubj", rounds=5)
    spec = make_spec(contract={"age": {"max": 60}}, errors={"max_fraction": 1.0}, sink={"path": str(tmp_path / "out")})
    first = run(spec, settings=settings)
    assert first.rows.rejected > 1000
    repaired = retry("@last", model=str(other), overrides=["contract.age.max=200"], settings=settings)
    assert repaired.status == "SUCCEEDED"
    both = {name: oracle(lake.files, path) for name, path in (("one", model_path), ("other", other))}
    expected = both["one"].copy()
    old = expected["age"] > 60
    expected.loc[old, "prediction"] = both["other"].loc[old, "prediction"]
    assert_output(tmp_path / "out", expected)
    assert_verified(repaired)
    models = {pq.read_schema(path).metadata[b"pipeline.model"] for path in (tmp_path / "out").glob("*.parquet")}
    assert len(models) == 2


@pytest.mark.fault(36)
@pytest.mark.fault(39)
def test_damaged_files_are_quarantined_until_repaired(
    make_spec: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path, expected: pd.DataFrame
) -> None:
    damaged, drifted = lake.files[1], lake.files[3]
    whole = damaged.read_bytes(), drifted.read_bytes()
    damaged.write_bytes(whole[0][:5000])
    pq.write_table(pq.read_table(drifted).drop_columns(["balance"]), drifted)
    with pytest.raises(InputError):
        run(make_spec(), settings=settings)
    with pytest.raises(InputError, match="too many input files"):
        run(make_spec(errors={"files": "quarantine", "max_files": 1}), settings=settings)
    report = run(make_spec(errors={"files": "quarantine"}), settings=settings)
    assert report.status == "SUCCEEDED_WITH_WARNINGS"
    assert [(file.path, file.reason, file.rows) for file in report.quarantined_files] == [
        (str(damaged), "file:CorruptInput", None),
        (str(drifted), "file:SchemaDrift", 40),
    ]
    rest = oracle([lake.files[0], lake.files[2]], model_path)
    assert report.rows.input == len(rest)
    assert_output(tmp_path / "out", rest)
    assert_verified(report)
    damaged.write_bytes(whole[0])
    half = retry("@last", settings=settings)
    assert half.status == "SUCCEEDED_WITH_WARNINGS"
    assert [file.path for file in half.quarantined_files] == [str(drifted)]
    drifted.write_bytes(whole[1])
    repaired = retry("@last", settings=settings)
    assert (repaired.status, repaired.quarantined_files) == ("SUCCEEDED", ())
    assert_output(tmp_path / "out", expected)
    assert_verified(repaired)


def test_a_file_that_turns_out_bad_while_it_is_read_is_out_as_a_whole(
    make_spec: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path, expected: pd.DataFrame
) -> None:
    large = lake.files[0]
    pq.write_table(pq.read_table(large), large, row_group_size=1500, write_page_checksum=True)
    whole = large.read_bytes()
    flipped = bytearray(whole)
    position = len(whole) * 3 // 4
    flipped[position : position + 64] = bytes(byte ^ 255 for byte in flipped[position : position + 64])
    large.write_bytes(bytes(flipped))
    with pytest.raises(InputError):
        run(make_spec(), settings=settings)
    report = run(make_spec(errors={"files": "quarantine"}), settings=settings)
    assert report.status == "SUCCEEDED_WITH_WARNINGS"
    assert [(file.path, file.reason, file.rows) for file in report.quarantined_files] == [
        (str(large), "file:CorruptInput", 12_000)
    ]
    assert [one.reason for one in report.rounds] == ["files quarantined"]
    assert_output(tmp_path / "out", oracle(lake.files[1:], model_path))
    assert_verified(report)
    large.write_bytes(whole)
    repaired = retry("@last", settings=settings)
    assert repaired.status == "SUCCEEDED"
    assert_output(tmp_path / "out", expected)
    assert_verified(repaired)


class Hide(Callback):
    """Takes a file away once the job runs."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_status(self, event: StatusChanged) -> None:
        if event.after == "RUNNING":
            self.file.rename(self.file.with_suffix(".hidden"))


@pytest.mark.fault(40)
def test_a_file_that_vanishes_while_the_job_runs_is_out_until_it_is_back(
    make_spec: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path, expected: pd.DataFrame
) -> None:
    gone = lake.files[2]
    report = run(make_spec(errors={"files": "quarantine"}), settings=settings, callbacks=[Hide(gone)])
    assert report.status == "SUCCEEDED_WITH_WARNINGS"
    assert [(file.path, file.reason) for file in report.quarantined_files] == [(str(gone), "file:InputChanged")]
    assert_output(tmp_path / "out", oracle([file for file in lake.files if file != gone], model_path))
    assert_verified(report)
    gone.with_suffix(".hidden").rename(gone)
    repaired = retry("@last", settings=settings)
    assert repaired.status == "SUCCEEDED"
    assert_output(tmp_path / "out", expected)
    assert_verified(repaired)


@pytest.mark.parametrize("mode", ["append", "overwrite"])
def test_other_modes_are_repaired_too(
    make_spec: Make, settings: Settings, tmp_path: Path, expected: pd.DataFrame, mode: str
) -> None:
    out = tmp_path / "out"
    run(make_spec(maps=("steps_for_tests:as_it_is",)), settings=settings)
    spec = make_spec(maps=(BROKEN,), errors={"max_fraction": 0.02}, sink={"path": str(out), "mode": mode})
    run(spec, settings=settings)
    repaired = retry("@last", overrides=[REPAIRED], settings=settings)
    assert repaired.status == "SUCCEEDED"
    everything = pd.concat([expected, expected]) if mode == "append" else expected
    found = read_output(out).to_pandas(ignore_metadata=True).sort_values("id", ignore_index=True)
    pd.testing.assert_frame_equal(found, everything.sort_values("id", ignore_index=True))
    assert_verified(repaired)


def test_fixed_module_is_reloaded_by_running_workers(
    make_spec: Make, settings: Settings, tmp_path: Path, expected: pd.DataFrame
) -> None:
    settings = replace(settings, import_paths=(str(tmp_path),))
    own_module = tmp_path / f"own_{tmp_path.name}.py"
    name = f"{own_module.stem}:build"
    broken = (
        "def build(frame):\n    if (frame['id'] % 500 == 13).any():\n        raise ValueError('13')\n    return frame\n"
    )
    own_module.write_text(broken)
    run(make_spec(maps=(name,), errors={"max_fraction": 0.02}), settings=settings)
    own_module.write_text("def build(frame):\n    return frame  # repaired\n")
    repaired = retry("@last", settings=settings)
    assert repaired.status == "SUCCEEDED"
    assert_output(tmp_path / "out", expected)


def test_rejects_tell_what_is_left(make_spec: Make, settings: Settings, tmp_path: Path, expected: pd.DataFrame) -> None:
    from pipeline.report.rejects import export, summarise

    run(make_spec(maps=(BROKEN,), errors={"max_fraction": 0.02}), settings=settings)
    job = find_job(settings.directory, "@last")
    wanted = expected[unlucky(expected)]
    assert export(job, str(tmp_path / "left.parquet")).rows == len(wanted)
    left = pq.read_table(tmp_path / "left.parquet")
    assert left.column("id").to_pylist() == wanted["id"].tolist()
    assert left.schema.field("price").type == pa.decimal128(12, 2)
    assert export(job, str(tmp_path / "left.csv"), reason="step:*").rows == len(wanted)
    assert pd.read_csv(tmp_path / "left.csv")["id"].tolist() == wanted["id"].tolist()
    with pytest.raises(PipelineError, match="already"):
        export(job, str(tmp_path / "left.csv"))
    retry("@last", overrides=["steps.0.map=steps_for_tests:fail_on_fewer"], settings=settings)
    some = wanted[wanted["id"] % 1000 == 13]
    summary = summarise(job, examples=1000)
    assert summary.total == len(some)
    (group,) = summary.groups
    assert [example.values["id"] for example in group.examples] == some["id"].tolist()
    files: dict[str, Any] = {}
    for example in group.examples:
        table = files.setdefault(example.file, pq.read_table(example.file, columns=["id"]).column("id"))
        assert table[example.row].as_py() == example.values["id"]
    assert summarise(job, reason="contract:*").total == 0


def test_incremental_job_continues_from_a_repaired_output(
    make_spec: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path
) -> None:
    def spec(limit: int) -> JobSpec:
        return make_spec(
            source={"path": str(lake.path), "incremental": True},
            sink={"path": str(tmp_path / "out"), "mode": "append"},
            contract={"age": {"max": limit}},
            errors={"max_fraction": 1.0},
        )

    run(spec(60), settings=settings)
    repaired = retry("@last", overrides=["contract.age.max=200"], settings=settings)
    assert repaired.status == "SUCCEEDED"
    assert_output(tmp_path / "out", oracle(lake.files, model_path))
    assert_verified(repaired)
    # A file comes, and one changes: what was published of it goes, what was repaired too.
    late = lake.path / "part-009.parquet"
    pq.write_table(make_table(300, seed=5, start=50_000), late)
    pq.write_table(make_table(700, seed=6, start=60_000), lake.files[1])
    report = run(spec(200), settings=settings)
    assert report.status == "SUCCEEDED"
    assert_output(tmp_path / "out", oracle([*lake.files, late], model_path))
    assert run(spec(200), settings=settings).rows.input == 0
    assert_output(tmp_path / "out", oracle([*lake.files, late], model_path))


def test_rejects_of_input_that_a_later_job_rescored_stay_out(
    make_spec: Make, settings: Settings, tmp_path: Path, lake: Lake, model_path: Path
) -> None:
    fields: dict[str, Any] = {
        "source": {"path": str(lake.path), "incremental": True},
        "sink": {"path": str(tmp_path / "out"), "mode": "append"},
        "errors": {"max_fraction": 1.0},
    }
    first = run(make_spec(contract={"age": {"max": 60}}, **fields), settings=settings)
    pq.write_table(make_table(700, seed=6, start=60_000), lake.files[1])
    run(make_spec(contract={"age": {"max": 200}}, **fields), settings=settings)
    before = read_output(tmp_path / "out").sort_by("id")
    with pytest.raises(PipelineError):
        retry(first.job, overrides=["contract.age.max=200"], settings=settings)
    assert read_output(tmp_path / "out").sort_by("id").equals(before)


def test_children_of_a_fan_out_are_retried_one_by_one(make_spec: Make, settings: Settings, tmp_path: Path) -> None:
    for number, key in enumerate("abc"):
        folder = tmp_path / f"hive/key={key}"
        folder.mkdir(parents=True)
        # Only the first two have an id that ends in 13.
        pq.write_table(make_table(60, seed=number, start=60 * number), folder / "x.parquet")
    spec = make_spec(
        maps=("steps_for_tests:fail_on_thirteens",),
        source={"path": str(tmp_path / "hive")},
        fan_out={"by": "key", "max_parallel": 1},
    )
    with pytest.raises(PipelineError, match="2 of 3 children"):
        run(spec, settings=settings)
    with pytest.raises(SpecError, match="child by child"):
        retry("@last", overrides=[REPAIRED], settings=settings)
    assert retry("@last.a", overrides=[REPAIRED], settings=settings).status == "SCORED"
    assert not (tmp_path / "out").exists()
    assert retry("@last.b", overrides=[REPAIRED], settings=settings).status == "SUCCEEDED"
    assert sum(len(pd.read_parquet(file)) for file in (tmp_path / "out").rglob("*.parquet")) == 180
    fields: dict[str, Any] = {"source": {"path": str(tmp_path / "hive")}, "sink": {"path": str(tmp_path / "other")}}
    lenient = make_spec(**fields, fan_out={"by": "key"}, errors={"files": "quarantine"})
    with pytest.raises(SpecError, match="quarantine files"):
        run(lenient, settings=settings)
