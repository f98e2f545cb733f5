"""``on_error``: which rule counts, how often a step is called again, and what becomes of rows and job."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from pipeline.errors import SpecError, StepFailed
from pipeline.plan.recipe import ErrorRule, MapRecipe
from pipeline.plan.step_record import step_from_record, step_to_record
from pipeline.scoring import step_policy
from pipeline.scoring.bisection import RowsError
from pipeline.scoring.rows import Rows
from pipeline.scoring.step_frames import map_rows
from pipeline.scoring.step_policy import call_step, find_rule
from pipeline.scoring.steps import Step
from pipeline.spec.job_spec import JobSpec


class BusyError(ConnectionError):
    """An error of some service."""


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each pause, which nobody waits for."""
    slept: list[float] = []
    monkeypatch.setattr(step_policy, "_sleep", slept.append)
    return slept


def failing(times: int, error: BaseException) -> Callable[[], str]:
    left = [error] * times

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    return call


def test_the_nearest_class_has_the_rule() -> None:
    rules = [ErrorRule("OSError", "fail"), ErrorRule("ConnectionError", "reject"), ErrorRule("Exception", "reject")]
    assert find_rule(rules, BusyError()) is rules[1]
    assert find_rule(rules, FileNotFoundError()) is rules[0]
    assert find_rule(rules, ValueError()) is rules[2]
    assert find_rule(rules, SystemExit()) is None
    qualified = ErrorRule(f"{BusyError.__module__}.BusyError", "fail")
    assert find_rule([rules[0], qualified], BusyError()) is qualified


def test_a_step_is_called_again_after_longer_and_longer_pauses(pauses: list[float]) -> None:
    rule = ErrorRule("ConnectionError", "fail", retries=8, wait=1.5)
    assert call_step(failing(7, BusyError()), [rule], entrypoint="m:f") == "done"
    assert pauses == [1.5, 3.0, 6.0, 12.0, 24.0, 48.0, 60.0]


def test_after_the_last_call_the_job_fails_or_the_rows_are_blamed(pauses: list[float]) -> None:
    with pytest.raises(StepFailed, match="fails the job") as caught:
        call_step(failing(3, BusyError("busy")), [ErrorRule("OSError", "fail", 2, 1.0)], entrypoint="m:f")
    assert caught.value.found == "BusyError: busy, on each of 3 calls"
    with pytest.raises(RowsError) as rows:
        call_step(failing(2, BusyError()), [ErrorRule("OSError", "reject", 1, 1.0)], entrypoint="m:f")
    assert rows.value.reason == "step:m:f:BusyError"
    assert pauses == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), StepFailed("x")])
def test_errors_that_no_rule_can_name(error: BaseException, pauses: list[float]) -> None:
    with pytest.raises(type(error)):
        call_step(failing(1, error), [ErrorRule("BaseException", "reject", 1)], entrypoint="m:f")
    assert pauses == []


def test_an_error_without_a_rule_passes() -> None:
    with pytest.raises(KeyError):
        call_step(failing(1, KeyError()), [ErrorRule("OSError", "reject")], entrypoint="m:f")


def run(function: Callable[[pd.DataFrame], pd.DataFrame], *rules: ErrorRule) -> tuple[list[int], list[str]]:
    rows = Rows.from_table(pa.table({"a": list(range(8))}))
    parts, failures = map_rows([Step("m:f", function, on_error=rules)], rows)
    return [row for part in parts for row in part.table["a"].to_pylist()], list(failures.reasons)


def test_rows_are_rejected_for_an_error_of_the_network_if_the_rule_says_so(pauses: list[float]) -> None:
    def step(frame: pd.DataFrame) -> pd.DataFrame:
        if (frame["a"] == 5).any():
            raise BusyError
        return frame

    with pytest.raises(BusyError):
        run(step)
    assert run(step, ErrorRule("BusyError", "reject")) == ([0, 1, 2, 3, 4, 6, 7], ["step:m:f:BusyError"])
    with pytest.raises(StepFailed):
        run(step, ErrorRule("BusyError", "fail"))


def test_each_call_gets_a_frame_that_no_other_changed(pauses: list[float]) -> None:
    seen = []

    def step(frame: pd.DataFrame) -> pd.DataFrame:
        seen.append(list(frame.columns))
        frame["b"] = 1
        if len(seen) < 3:
            raise BusyError
        return frame[["a"]]

    assert run(step, ErrorRule("BusyError", "fail", retries=2)) == (list(range(8)), [])
    assert seen == [["a"]] * 3


def build(on_error: Any) -> JobSpec:
    steps = [{"map": "m:f", "on_error": on_error}]
    return JobSpec.build(name="j", source={"path": "in"}, sink={"path": "out"}, steps=steps)


def test_rules_of_a_spec() -> None:
    spec = build({"a.Error": {"retry": 2, "wait": "3 s", "then": "reject"}, "KeyError": "fail"})
    recipe = MapRecipe.of(spec.maps[0])
    assert recipe.on_error == (ErrorRule("a.Error", "reject", 2, 3.0), ErrorRule("KeyError", "fail"))
    assert step_from_record(json.loads(json.dumps(step_to_record(recipe)))) == recipe
    assert "on_error" not in step_to_record(MapRecipe("m:f"))
    assert JobSpec.load(spec.to_yaml()) == spec


@pytest.mark.parametrize(
    "on_error",
    [{"not a name": "fail"}, {"KeyError": "ignore"}, {"KeyError": {"retry": 0}}, {"A": {"retry": 1, "wait": "x"}}],
)
def test_what_is_refused(on_error: Any) -> None:
    with pytest.raises(SpecError):
        build(on_error)
