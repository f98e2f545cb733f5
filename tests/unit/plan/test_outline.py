"""Stages of a job spec: where they end, what each reads and keeps, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.driver.prepare import draft
from pipeline.errors import InsufficientMemory, SpecError
from pipeline.plan.outline import outline, stage_spec
from pipeline.plan.plan import Plan
from pipeline.plan.table import plan_from_table, plan_to_table
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import FEATURES, make_lake, train_model

CHECKPOINT: dict[str, Any] = {"checkpoint": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("outline")
    make_lake(made / "lake", rows=(900, 400), row_group=150)
    train_model(made / "m.ubj", rounds=4, max_depth=3)
    (made / "outline_steps.py").write_text("def same(frame):\n    return frame.assign(made=frame['id'] + 1)\n")
    return made


def spec(folder: Path, *steps: dict[str, Any], **fields: Any) -> JobSpec:
    return JobSpec.build(
        **{"name": "o", "source": {"path": folder / "lake"}, "steps": steps, "sink": {"path": folder / "out"}, **fields}
    )


def planned(folder: Path, *steps: dict[str, Any], memory: str = "4 GiB", **fields: Any) -> Plan:
    settings = Settings(
        directory=str(folder), workers=1, threads=1, memory_limit=memory, fsync=False, import_paths=(str(folder),)
    )
    return draft(spec(folder, *steps, **fields), settings=settings).plan


def columns(schema: bytes) -> list[str]:
    return list(pa.ipc.read_schema(pa.py_buffer(schema)).names)


def score(folder: Path, output: str = "p", **fields: Any) -> dict[str, Any]:
    return {"score": {"model": str(folder / "m.ubj"), "output": output, **fields}}


def test_a_checkpoint_ends_a_stage(folder: Path) -> None:
    made = spec(
        folder, {"filter": "id > 1"}, score(folder), {"checkpoint": {"partition_bytes": "1 KiB"}}, score(folder, "q")
    )
    first, second = outline(made)
    assert (first.slug, first.is_last, first.partition_bytes) == ("0-1", False, None)
    assert (second.slug, second.is_last, second.partition_bytes) == ("3", True, 1024)
    assert stage_spec(made, first).steps == made.steps[:2]
    assert stage_spec(made, second, folder="/jobs/x").source.path == "/jobs/x"
    assert JobSpec.load(made.to_yaml() + "\n") == made
    assert outline(spec(folder, score(folder))) == ()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([CHECKPOINT, {"filter": "id > 1"}], "before which no step is"),
        ([{"filter": "id > 1"}, CHECKPOINT], "behind which no step is"),
        ([{"filter": "id > 1"}, CHECKPOINT, CHECKPOINT, {"filter": "id > 2"}], "two checkpoints in a row"),
        ([{"filter": "id > 1"}, {"checkpoint": False}, {"filter": "id > 2"}], "checkpoint"),
        ([{"filter": "id > 1"}, {"checkpoint": {"partition_bytes": "many"}}, {"filter": "id > 2"}], "not a valid size"),
        ([{"filter": "id > 1"}, {"rebalance": True}, {"filter": "id > 2"}], "say checkpoint: true"),
    ],
)
def test_a_useless_checkpoint_is_refused(folder: Path, steps: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec(folder, *steps)


def test_a_checkpoint_keeps_what_later_steps_need(folder: Path) -> None:
    plan = planned(folder, {"filter": "age > 20"}, CHECKPOINT, {"filter": "id > 10"}, score(folder, keep=["id"]))
    first, second = plan.stages
    assert set(columns(first.output_schema)) == {"id", *FEATURES}
    assert columns(second.output_schema) == columns(plan.output_schema) == ["id", "p"]
    assert set(plan.source_columns) == {"id", *FEATURES}
    assert (first.recipes, second.recipes) == (0, 1), "filters are read with the files of both stages"
    assert first.partitions == len(plan.partitions)


def test_columns_of_a_step_are_kept_and_not_written(folder: Path) -> None:
    plan = planned(folder, {"map": "outline_steps:same"}, CHECKPOINT, score(folder))
    names = pq.read_schema(next((folder / "lake").glob("*.parquet"))).names
    assert columns(plan.output_schema) == [*names, "p"]
    plan = planned(folder, {"map": "outline_steps:same"}, CHECKPOINT, score(folder), {"map": "outline_steps:same"})
    assert columns(plan.stages[0].output_schema) == [*names, "made"]


def test_an_error_of_a_later_stage_is_found_when_the_job_is_planned(folder: Path) -> None:
    with pytest.raises(SpecError, match="column") as caught:
        planned(folder, {"select": ["id"]}, CHECKPOINT, {"filter": "age > 3"}, CHECKPOINT, {"filter": "id > 1"})
    assert "steps.2.filter" in str(caught.value)
    with pytest.raises(InsufficientMemory):
        planned(folder, {"filter": "id > 1"}, CHECKPOINT, score(folder), memory="300 MiB")


@pytest.mark.parametrize("name", ["on_alias_change", "step_change"])
def test_restart_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(SpecError, match="does not start over by itself"):
        planned(folder, {"filter": "id > 1"}, CHECKPOINT, score(folder), **{name: "restart"})


def test_plans_are_stored_with_their_stages(folder: Path) -> None:
    plan = planned(folder, score(folder), CHECKPOINT, {"filter": "p > 0.1"})
    stored = plan_from_table(plan_to_table(plan))
    assert stored.stages == plan.stages
    assert stored.digest == plan.digest
    whole = planned(folder, score(folder), {"filter": "p > 0.1"})
    assert whole.stages == ()
    assert whole.work_digest != plan.work_digest
