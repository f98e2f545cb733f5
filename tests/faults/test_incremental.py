"""Incremental jobs over files that arrive, grow and change, killed anywhere: the output equals that of a full run."""

from __future__ import annotations

import json
import os
import random
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputChanged, OutputConflict, PipelineError, SpecError
from pipeline.plan.describe import explain, input_text
from pipeline.plan.table import plan_from_table, plan_to_table
from pipeline.report.verify import verify
from pipeline.sinks import PublishedFile
from pipeline.sinks.parquet import layout
from pipeline.sinks.parquet.incremental import with_inputs
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.examples import IS_LONG
from pipeline.testing.inline import plan_inline, publish_inline, score_inline
from pipeline.testing.oracle import make_table, oracle, train_model
from pipeline.testing.stores import Crash, Faults, faulty_os


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


class World:
    """A folder in which files come, and an output that follows it."""

    def __init__(self, folder: Path, model: Path, **source: object) -> None:
        self.folder, self.model = folder, model
        self.jobs, self.lake, self.out = folder / "jobs", folder / "lake", folder / "out"
        self.lake.mkdir(parents=True)
        self.source = source
        self.next_id = self.number = 0

    def spec(self, **fields: object) -> JobSpec:
        made = {
            "name": "inc",
            "source": {"path": str(self.lake), "incremental": True, **self.source},
            "steps": [{"score": {"model": str(self.model), "keep": ["id", "age"]}}],
            "sink": {"path": str(self.out), "mode": "append"},
        }
        return JobSpec.build(**{**made, **fields})

    def write(self, name: str, *, rows: int = 30, groups: int = 1) -> None:
        """A file, new or in the place of another one."""
        tables = [self._table(rows) for _ in range(groups)]
        unfinished = self.folder / "unfinished"
        with pq.ParquetWriter(unfinished, tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)
        os.replace(unfinished, self.lake / name)

    def append(self, name: str, *, rows: int = 20) -> None:
        """Row groups that are added to a file, as a writer does that copies what is there."""
        unfinished = self.folder / "unfinished"
        with pq.ParquetFile(self.lake / name) as old, pq.ParquetWriter(unfinished, old.schema_arrow) as writer:
            for number in range(old.num_row_groups):
                writer.write_table(old.read_row_group(number))
            writer.write_table(self._table(rows))
        os.replace(unfinished, self.lake / name)

    def _table(self, rows: int):
        self.next_id += 1000
        return make_table(rows, seed=self.next_id, start=self.next_id)

    def plan(self, **fields: object):
        return plan_inline(self.spec(**fields), directory=self.jobs)

    def run(self, **fields: object):
        job = self.score(**fields)
        publish_inline(job)
        return job

    def score(self, **fields: object):
        self.number += 1
        return score_inline(self.plan(**fields), directory=self.jobs, job=f"inc-{self.number:03d}")

    def reasons(self) -> dict[str, str]:
        return {Path(file.path).name: file.reason.partition(" /")[0] for file in self.plan().files}

    def check(self) -> None:
        """Check that a reader finds what one plain loop over all current files gives."""
        state = json.loads((self.out / "_manifest.json").read_text())
        names = [file["name"] for one in state["publications"] for file in one["files"]]
        assert sorted(names) == sorted(path.name for path in self.out.glob("*.parquet"))
        found = pd.concat([pq.read_table(self.out / name).to_pandas() for name in names]).sort_values("id")
        expected = oracle(sorted(self.lake.glob("*.parquet")), self.model)[["id", "age", "prediction"]].sort_values(
            "id"
        )
        assert found["id"].tolist() == expected["id"].tolist()
        assert found["prediction"].tolist() == expected["prediction"].tolist()


@pytest.fixture
def world(tmp_path: Path, model_path: Path) -> World:
    made = World(tmp_path, model_path)
    for name in ("a.parquet", "b.parquet"):
        made.write(name, groups=2)
    return made


def test_a_life(world: World) -> None:
    assert world.reasons() == {"a.parquet": "new", "b.parquet": "new"}
    world.run()
    world.check()
    assert world.reasons() == {}
    world.write("c.parquet")
    assert world.reasons() == {"c.parquet": "new"}
    world.run()
    world.append("c.parquet")
    assert world.reasons() == {"c.parquet": "appended"}
    job = world.run()
    assert job.ledger().rows.output == 20, "what was appended, and no more"
    world.check()
    assert verify(job, sample=50).ok
    world.write("a.parquet", rows=7)
    assert world.reasons() == {"a.parquet": "changed", "b.parquet": "shares an output file with"}
    world.run()
    world.check()
    world.write("c.parquet", rows=5)
    world.run()
    world.check()


def test_job_without_new_input_succeeds_without_publication(world: World) -> None:
    world.run()
    before = (world.out / "_manifest.json").read_bytes()
    job = world.run()
    assert job.status().is_success
    assert job.ledger().rows.input == 0
    assert (world.out / "_manifest.json").read_bytes() == before
    assert input_text(job.plan) == "nothing new; 2 unchanged files"
    assert verify(job).ok


def test_rows_that_were_rejected_or_filtered_are_done(tmp_path: Path, model_path: Path) -> None:
    world = World(tmp_path, model_path, filter="age > 1000")
    world.write("a.parquet")
    world.run()
    world.write("b.parquet")
    world.run()
    assert world.reasons() == {}
    state = json.loads((world.out / "_manifest.json").read_text())
    assert [len(one["files"]) for one in state["publications"]] == [1, 0], "an empty file tells the columns, once"


def test_plan_lists_reasons(world: World) -> None:
    world.run()
    world.write("c.parquet")
    failed = world.score()
    for status in ("RUNNING", "FAILED"):
        failed.set_status(type(failed.status())(status))
    world.write("d.parquet")
    told = explain(world.plan())
    assert told["counts"] == {"failed before": 1, "new": 1}
    assert told["unchanged"] == 2
    assert {reason for partition in told["partitions"] for reason in partition["reasons"]} == {
        f"failed before ({failed.id})",
        "new",
    }
    assert sum(one["rows"] for one in told["partitions"]) == 60
    plan = world.plan()
    assert plan_from_table(plan_to_table(plan)) == plan, "why, and what it goes on from, is kept with the plan"


def test_another_model(world: World, tmp_path: Path) -> None:
    world.run()
    world.write("c.parquet")
    other = train_model(tmp_path / "other.ubj", rounds=3)
    world.model = other
    assert world.reasons() == {"c.parquet": "new"}
    world.source["incremental"] = {"on_model_change": "all"}
    assert world.reasons() == {"a.parquet": "model changed", "b.parquet": "model changed", "c.parquet": "new"}
    world.run()
    world.check()
    assert world.reasons() == {}


def test_two_that_were_planned_on_the_same_output(world: World) -> None:
    """Both have the new rows: one publishes, the other must not, whenever it wakes."""
    world.run()
    world.write("c.parquet")
    one, other = world.score(), world.score()
    publish_inline(other)
    with pytest.raises(OutputConflict, match="since this one was planned"):
        publish_inline(one)
    publish_inline(other)
    world.check()


def test_sink_of_unknown_input_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="adds to its sink"):
        world.plan(sink={"path": str(world.out), "mode": "overwrite"})
    world.out.mkdir()
    pq.write_table(make_table(3, seed=1), world.out / "foreign.parquet")
    with pytest.raises(OutputConflict, match="rows of unknown input"):
        world.plan()


def test_a_file_that_is_gone(world: World) -> None:
    world.run()
    (world.lake / "b.parquet").unlink()
    assert world.reasons() == {}, "its rows stay"
    world.write("a.parquet")
    with pytest.raises(InputChanged) as caught:
        world.plan()
    assert "b.parquet" in caught.value.where


def test_files_that_stay_when_a_job_is_repaired_count_for_every_input(world: World) -> None:
    job = world.run()
    made = layout.Publication(job.id, 2, "append", (PublishedFile("kept.parquet", 1, 1, ""),))
    assert {one.outputs for one in with_inputs(made, job, ()).inputs} == {("kept.parquet",)}


@pytest.mark.slow
@pytest.mark.parametrize("goes_on", ["resumed", "another job"])
@pytest.mark.parametrize("change", ["new", "appended", "changed"])
def test_a_crash_at_every_step_of_publishing(tmp_path: Path, model_path: Path, change: str, goes_on: str) -> None:
    """Whichever call is the last: gone on with, or done anew by another job, every row is there once.

    Per commit every third call of each kind of change; ``HYPOTHESIS_PROFILE=long`` takes them all.
    """
    kind = ("new", "appended", "changed").index(change) + (goes_on == "resumed")
    for step in range(0 if IS_LONG else kind % 3, 400, 1 if IS_LONG else 3):
        world = World(tmp_path / str(step), model_path)
        world.write("a.parquet", groups=2)
        world.write("b.parquet")
        world.run()
        {"new": lambda w: w.write("c.parquet"), "appended": lambda w: w.append("a.parquet"),
         "changed": lambda w: w.write("a.parquet")}[change](world)  # fmt: skip
        job = world.score()
        faults = Faults(step)
        with suppress(Crash), faulty_os(faults):
            publish_inline(job)
        if goes_on == "resumed":
            publish_inline(job)
        else:
            world.run()
            with suppress(OutputConflict):
                publish_inline(job)
        world.check()
        assert world.reasons() == {}
        if not faults.has_failed:
            assert step > 10
            return
    raise AssertionError("it never came through")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_runs(tmp_path: Path, model_path: Path, seed: int) -> None:
    """Files come, grow and change at random; jobs die at random, are resumed or given up.

    The union is right at the end, and at no time a row is there twice."""
    chance = random.Random(seed)
    world = World(tmp_path, model_path)
    world.write("0.parquet")
    names = ["0.parquet"]
    given_up = []
    for _ in range(25):
        for _ in range(chance.randrange(3)):
            deed = chance.choice(["new", "new", "append", "change"])
            if deed == "new":
                names.append(f"{len(names)}.parquet")
                world.write(names[-1], rows=chance.randrange(1, 60), groups=chance.choice([1, 2]))
            elif deed == "append":
                world.append(chance.choice(names))
            else:
                world.write(chance.choice(names), rows=chance.randrange(1, 60))
        job = world.score()
        with suppress(Crash), faulty_os(Faults(chance.randrange(80))):
            publish_inline(job)
        if chance.random() < 0.5:
            given_up.append(job)
        else:
            publish_inline(job)
        if given_up and chance.random() < 0.5:
            with suppress(PipelineError):
                publish_inline(chance.choice(given_up))
        if (world.out / "_manifest.json").exists():
            state = json.loads((world.out / "_manifest.json").read_text())
            rows = [
                row
                for one in state["publications"]
                for file in one["files"]
                for row in pq.read_table(world.out / file["name"], columns=["id"])["id"].to_pylist()
            ]
            assert len(rows) == len(set(rows))
    world.run()
    world.check()
