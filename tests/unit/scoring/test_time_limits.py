"""Time limits of steps: the seconds that a group of rows has, and what a spec, a plan and a recipe hold of them."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import SpecError
from pipeline.models.model import Feature, ModelVersion
from pipeline.models.process import ProcessFacts, set_process_facts
from pipeline.plan.recipe import MapRecipe
from pipeline.plan.step_record import step_from_record, step_to_record
from pipeline.scoring.isolation import SLOW_REASON, TIMEOUT_REASON, IsolatedScorer, Isolation, for_steps
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.recipes import make_recipe

VERSION = ModelVersion("m", "1", "/m.ubj", "0" * 64, "xgboost", 10, (Feature("a"),), "regression", 1)
IN_STEPS = Isolation(is_for_steps=True)


def seconds(*steps: MapRecipe, rows: int, isolation: Isolation = IN_STEPS) -> tuple[float, str]:
    recipe = make_recipe(VERSION, pa.schema([("a", pa.float32())]), maps=steps)
    return IsolatedScorer(recipe, isolation, rows=1000)._seconds(rows)


@pytest.mark.parametrize(
    ("limits", "rows", "expected"),
    [
        ({"timeout": 30.0}, 1000, 30.0),
        ({"timeout": 30.0}, 1, 30.0),
        ({"row_timeout": 0.5}, 1000, 500.0),
        ({"row_timeout": 0.5}, 1, 0.5),
        ({"timeout": 30.0, "row_timeout": 0.5}, 1000, 30.0),
        ({"timeout": 30.0, "row_timeout": 0.5}, 3, 1.5),
    ],
)
def test_a_group_may_take_the_time_of_a_batch_and_of_its_rows(
    limits: dict[str, float], rows: int, expected: float
) -> None:
    assert seconds(MapRecipe("m:f", **limits), rows=rows) == (expected, SLOW_REASON)  # type: ignore[arg-type]


def test_of_several_steps_the_strictest_limit_counts() -> None:
    steps = MapRecipe("m:f", timeout=9.0), MapRecipe("m:g"), MapRecipe("m:h", timeout=4.0, row_timeout=2.0)
    assert seconds(*steps, rows=100) == (4.0, SLOW_REASON)


def test_in_a_partition_that_crashed_a_process_its_own_limit_counts_too() -> None:
    step, isolation = MapRecipe("m:f", timeout=30.0), Isolation(seconds=100.0)
    assert seconds(step, rows=1000, isolation=isolation) == (30.0, SLOW_REASON)
    assert seconds(step, rows=10, isolation=isolation) == (5.0, TIMEOUT_REASON)
    assert seconds(MapRecipe("m:f"), rows=10, isolation=isolation) == (5.0, TIMEOUT_REASON)


def test_the_processes_of_a_worker_share_its_memory() -> None:
    set_process_facts(ProcessFacts(threads=3, memory=1000))
    try:
        assert for_steps() == Isolation(memory=200, is_for_steps=True)
    finally:
        set_process_facts(ProcessFacts())


def build(**limits: Any) -> JobSpec:
    steps = [{"map": "m:f", **limits}]
    return JobSpec.build(name="j", source={"path": "in"}, sink={"path": "out"}, steps=steps)


def test_limits_of_a_spec_are_durations() -> None:
    recipe = MapRecipe.of(build(timeout="1 min", row_timeout=0.5).maps[0])
    assert (recipe.timeout, recipe.row_timeout) == (60.0, 0.5)
    assert step_from_record(json.loads(json.dumps(step_to_record(recipe)))) == recipe
    assert "timeout" not in step_to_record(MapRecipe("m:f"))


@pytest.mark.parametrize("limit", ["soon", 0, 0.05, "-1 s"])
def test_limits_that_are_refused(limit: Any) -> None:
    with pytest.raises(SpecError):
        build(row_timeout=limit)
