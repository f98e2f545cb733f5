"""Chaos without processes: scripts drawn from a seed, the sample, the row checker, the reader, the command."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli import main
from pipeline.common.rows import Fragment, InputFile, RowGroup
from pipeline.sinks.parquet.layout import SUCCESS
from pipeline.spec.job_spec import JobSpec
from pipeline.testing import chaos as module
from pipeline.testing.chaos import ChaosReport, TrialResult
from pipeline.testing.oracle import FEATURES, Lake
from pipeline.testing.row_check import Reader, RowDifference, check_rows, read_folder
from pipeline.testing.sample import choose_ranges, sample_job
from pipeline.testing.strikes import KINDS, Moment, Strike, draw_script
from pipeline.testing.trial import Struck, TrialAttempt

# Scripts


def test_a_seed_is_one_script_and_another_seed_another() -> None:
    scripts = [draw_script(seed, partitions=8, seconds=5.0, cold_seconds=6.0) for seed in range(60)]
    assert scripts == [draw_script(seed, partitions=8, seconds=5.0, cold_seconds=6.0) for seed in range(60)]
    assert len({script.strikes for script in scripts}) > 50


def test_every_kind_of_fault_comes_up_within_as_many_seeds() -> None:
    scripts = [draw_script(seed, partitions=8, seconds=5.0, cold_seconds=6.0) for seed in range(100, 100 + len(KINDS))]
    kinds = {strike.kind for script in scripts for strike in script.strikes}
    assert kinds | {"lifetime"} == set(KINDS)
    assert sum(script.lifetime is not None for script in scripts) == 1


@given(st.integers(0, 10**9), st.integers(0, 50), st.floats(0.1, 100))
def test_moments_are_such_as_can_come_in_order(seed: int, partitions: int, seconds: float) -> None:
    script = draw_script(seed, partitions=partitions, seconds=seconds, cold_seconds=2 * seconds)
    for strike in script.strikes:
        moment = strike.moment
        assert 0 <= moment.count <= (seconds if moment.mark == "seconds" else max(1, partitions))
        assert (strike.seconds > 0) is strike.kind.startswith("freeze")
    marks = ["seconds", "job", "data", "receipts", "manifest"]
    places = [(marks.index(strike.moment.mark), strike.moment.count) for strike in script.strikes]
    assert places == sorted(places)
    assert 1 <= len(script.strikes) + (script.lifetime is not None) <= 3


# The sample


def files(*groups: Sequence[int]) -> tuple[InputFile, ...]:
    return tuple(
        InputFile(f"{number}.parquet", 1, "v", tuple(RowGroup(rows, rows * 8, rows * 4) for rows in sizes))
        for number, sizes in enumerate(groups)
    )


sizes = st.lists(st.lists(st.integers(0, 40), max_size=4), max_size=5)


@given(sizes, st.integers(1, 200), st.integers(0, 1000))
def test_ranges_are_of_wanted_rows_each_once(groups: list[list[int]], rows: int, seed: int) -> None:
    found = files(*groups)
    total = sum(file.rows for file in found)
    ranges = choose_ranges(found, rows=rows, seed=seed)
    taken = Counter((part.path, row) for part in ranges for row in range(part.row_start, part.row_stop))
    assert all(count == 1 for count in taken.values())
    by_path = {file.path: file for file in found}
    for part in ranges:
        assert 0 <= part.row_start < part.row_stop <= by_path[part.path].rows
        bounds = np.cumsum([0, *(group.rows for group in by_path[part.path].row_groups)])
        assert bounds[part.group_start] <= part.row_start
        assert part.row_stop <= bounds[part.group_stop]
    if total <= rows:
        assert taken.total() == total
    else:
        assert rows - min(12, rows) < taken.total() <= rows


def test_row_groups_that_the_filter_rules_out_are_not_taken() -> None:
    groups = tuple(RowGroup(10, 80, 40, selected=number == 1) for number in range(3))
    (part,) = choose_ranges((InputFile("a", 1, "v", groups),), rows=100, seed=0)
    assert part == Fragment("a", 10, 20, 1, 2, 80)


def test_a_sample_is_rows_of_the_source_with_their_folders(lake: Lake, model_path: Path, tmp_path: Path) -> None:
    for number, file in enumerate(lake.files):
        place = lake.path / f"day={number % 2}" / "zone=a%2Fb"
        place.mkdir(parents=True, exist_ok=True)
        shutil.move(file, place / file.name)
    spec = JobSpec.build(
        name="small",
        source={"path": str(lake.path), "columns": [*FEATURES, "id", "day"], "filter": "day >= 0"},
        steps=[{"score": {"model": str(model_path)}}],
        sink={"path": "s3://never/here", "mode": "append", "compression": "snappy"},
        errors={"max_fraction": 0.0},
        cluster="tcp://never:1",
    )  # fmt: skip
    sample = sample_job(spec, tmp_path / "scratch", rows=3000, seed=4)
    assert sample.sink.path == str(tmp_path / "scratch/out")
    assert (sample.sink.mode, sample.sink.compression, sample.cluster) == ("overwrite", "snappy", "local")
    assert (sample.source.filter, sample.source.columns) == (spec.source.filter, spec.source.columns)
    assert (sample.steps, sample.errors.max_fraction) == (spec.steps, 1.0)
    assert sample.source.path == str(tmp_path / "scratch/lake")
    pieces = sorted((tmp_path / "scratch/lake").rglob("*.parquet"))
    assert all(piece.parent.name == "zone=a%2Fb" for piece in pieces)
    table = pa.concat_tables([pq.read_table(piece, partitioning=None) for piece in pieces])
    assert 2900 < table.num_rows <= 3000
    whole = pa.concat_tables([pq.read_table(file, partitioning=None) for file in sorted(lake.path.rglob("*.parquet"))])
    everything = {row["id"]: row for row in whole.select(table.schema.names).to_pylist()}
    assert all(everything[row["id"]] == row for row in table.to_pylist())
    assert len(set(table["id"].to_pylist())) == table.num_rows


def test_a_sample_of_nothing_has_the_schema(model_path: Path, tmp_path: Path, lake: Lake) -> None:
    table = pq.read_table(lake.files[0]).slice(0, 0)
    (tmp_path / "empty").mkdir()
    pq.write_table(table, tmp_path / "empty/a.parquet")
    spec = JobSpec.build(
        name="none",
        source={"path": str(tmp_path / "empty")},
        steps=[{"score": {"model": str(model_path)}}],
        sink={"path": "out"},
    )
    sample_job(spec, tmp_path / "scratch", rows=10)
    assert pq.read_schema(tmp_path / "scratch/lake/piece-000.parquet").names == table.schema.names


# The row checker

ROWS = pa.table({"id": [1, 2, 3, 4], "p": [0.5, math.nan, None, 1.0], "tags": [["a"], [], None, ["b", "c"]]})


@pytest.mark.parametrize(
    ("found", "difference"),
    [
        (ROWS, {}),
        (ROWS.take([3, 1, 0, 2]), {}),
        (ROWS.slice(1), {"lost": 1}),
        (ROWS.take([0, 1, 1, 2, 3, 3]), {"duplicated": 2}),
        (ROWS.take([0, 0, 2, 3]), {"lost": 1, "duplicated": 1}),
        (ROWS.set_column(1, "p", pa.array([0.5, math.nan, None, 1.5])), {"changed": 1}),
        (pa.concat_tables([ROWS, pa.table({"id": [9], "p": [0.0], "tags": [["z"]]})]), {"foreign": 1}),
        (ROWS.drop(["p"]), {"lost": 4, "foreign": 4}),
    ],
)
def test_rows_are_compared_one_by_one(found: pa.Table, difference: dict[str, int]) -> None:
    assert check_rows(ROWS, found) == RowDifference(4, **difference)


def test_scores_may_be_rounded_otherwise_where_that_is_allowed() -> None:
    near = ROWS.set_column(1, "p", pa.array([0.5 + 1e-8, math.nan, None, 1.0]))
    assert check_rows(ROWS, near).changed == 1
    assert check_rows(ROWS, near, outputs=["p"], tolerance=1e-5).is_none
    far = ROWS.set_column(1, "p", pa.array([0.6, math.nan, None, 1.0]))
    assert check_rows(ROWS, far, outputs=["p"], tolerance=1e-5).changed == 1


# The reader


class Output:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.old, self.new = ROWS.slice(0, 1), ROWS
        self.put(self.old)
        self.reader = Reader(path, {"earlier": self.old, "new": self.new})

    def put(self, *tables: pa.Table, success: bool = True) -> None:
        """In one step."""
        aside = self.path.with_name("aside")
        aside.mkdir()
        for number, table in enumerate(tables):
            pq.write_table(table, aside / f"part-{number}.parquet")
        if success:
            (aside / SUCCESS).touch()
        if self.path.exists():
            os.rename(self.path, self.path.with_name(f"gone-{len(list(self.path.parent.iterdir()))}"))
        os.rename(aside, self.path)

    def look(self) -> list[str]:
        self.reader.poll()
        return self.reader.wrong


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path / "out")


def test_a_reader_is_content_with_old_and_then_new(output: Output) -> None:
    assert output.look() == []
    output.put(output.new.slice(0, 2), output.new.slice(2))
    assert output.look() == []
    assert (output.reader.reads, output.reader.seen) == (2, "new")


def test_a_reader_notices_half_an_output(output: Output) -> None:
    output.put(output.new.slice(0, 2))
    assert output.look() == ["2 rows, which are those of no commit"]


def test_a_reader_notices_that_the_old_output_comes_back(output: Output) -> None:
    output.put(output.new)
    output.look()
    output.put(output.old)
    assert output.look() == ["the earlier output came back"]


def test_a_reader_notices_that_there_is_nothing(output: Output) -> None:
    shutil.rmtree(output.path)
    (wrong,) = output.look()
    assert "cannot be read" in wrong


def test_a_reader_does_not_judge_what_is_changed_in_place(output: Output) -> None:
    output.put(output.new.slice(0, 2), success=False)
    assert output.look() == []


def test_a_reader_reads_in_the_background(output: Output) -> None:
    with output.reader:
        pass
    assert output.reader.reads >= 1
    assert read_folder(output.path).num_rows == 1


# The command


def result(seed: int, **changes: Any) -> TrialResult:
    strike = Strike("kill worker", Moment("receipts", 2))
    given = {
        "seed": seed,
        "ok": True,
        "detail": "",
        "exit_code": 0,
        "faults": (Struck(strike, 1.5), Struck(Strike("kill nanny", Moment("job", 1)), None)),
        "attempts": (TrialAttempt("run", -9, 1.0), TrialAttempt("resume", 0, 2.0)),
        "rows": RowDifference(90),
        "rejects": RowDifference(10),
        "reads": 7,
        "seconds": 3.0,
        "lifetime": 5.0,
    }
    return TrialResult(**{**given, **changes})


def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *trials: TrialResult, flags: Sequence[str] = ()) -> Any:
    def unleash(spec: JobSpec, **asked: Any) -> ChaosReport:
        for trial in trials:
            asked["on_trial"](trial)
        return ChaosReport("churn", 100, 4, 3, tuple(trials), "" if trials[-1].ok else "/scratch", 9.0)

    monkeypatch.setattr(module, "chaos", unleash)
    spec = {
        "name": "churn",
        "source": {"path": "lake"},
        "steps": [{"score": {"model": "m.ubj"}}],
        "sink": {"path": "out"},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(spec))
    return CliRunner().invoke(main, ["chaos", str(tmp_path / "job.yaml"), *flags])


def test_command_prints_the_outcome(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = call(monkeypatch, tmp_path, result(0), result(1))
    assert shown.exit_code == 0
    assert "seed 0: held, 2 drivers, 3 s: kill worker at 2 receipts, workers live 5 s" in shown.stderr
    assert shown.stdout.startswith("HELD  churn\n")
    assert "2 of 3 that were asked for" in shown.stdout
    assert "0 lost, 0 duplicated" in shown.stdout
    assert "2 × kill worker, 2 × lifetime" in shown.stdout


def test_violation_is_reported_with_its_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = result(1, ok=False, detail="rows: 2 lost", exit_code=6, rows=RowDifference(90, lost=2))
    shown = call(monkeypatch, tmp_path, result(0), broken)
    assert shown.exit_code == 6
    assert shown.stdout.startswith("BROKEN  churn\n")
    assert "2 lost, 0 duplicated" in shown.stdout
    assert "seed 1: BROKEN" in shown.stdout
    assert "  rows: 2 lost\n" in shown.stdout
    assert "--seeds 1 --seed 1" in shown.stdout
    assert "/scratch" in shown.stdout


def test_json_has_what_is_documented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = call(monkeypatch, tmp_path, result(0), flags=["--json", "-q"])
    assert shown.stderr == ""
    page = (Path(__file__).parents[3] / "docs/json.md").read_text()
    table = page.partition("\n## chaos\n")[2].partition("\n## ")[0]
    found = json.loads(shown.stdout)
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == list(found)
    for key in [*found["trials"][0], *found["trials"][0]["faults"][0], *found["trials"][0]["rows"]]:
        assert f"`{key}`" in table, key
