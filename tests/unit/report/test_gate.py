"""The publish gate: its figures against limits, what is skipped, and what an acceptance holds for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from pipeline.common.sketch import Sketches
from pipeline.report.gate import Baseline, GateResult, evaluate
from pipeline.spec.gate import Gate


def sketches(shift: float = 0.0, rows: int = 4000, **columns: Any) -> Sketches:
    numbers, made = np.random.default_rng(4), Sketches()
    plans = pa.array(["basic", "gold"] * (rows // 2))
    made.add(pa.table({"p": numbers.normal(shift, 1, rows), "plan": plans, **columns}))
    return made


def result(gate: dict[str, Any], now: Sketches, *, rows: int = 4000, before: Sketches | None = None) -> GateResult:
    baseline = None if before is None else Baseline("job-1", before, 4000)
    return evaluate(Gate.model_validate(gate), now, rows=rows, baseline=baseline)


def failed(found: GateResult) -> list[tuple[str, str]]:
    return [(check.column, check.measure) for check in found.failed]


def test_each_column_has_a_distance_of_its_own() -> None:
    found = result({"psi": 0.2, "ks": 0.1, "js": 0.5}, sketches(shift=0.6), before=sketches())
    assert failed(found) == [("p", "psi"), ("p", "ks")]
    assert {(check.column, check.measure) for check in found.checks} >= {("plan", "psi"), ("plan", "js")}
    assert ("plan", "ks") not in {(check.column, check.measure) for check in found.checks}
    assert "2 of 5 checks failed against job-1: p: psi is" in found.text()


def test_a_column_may_have_another_limit_than_the_gate() -> None:
    now, before = sketches(shift=0.6), sketches()
    assert failed(result({"psi": 0.2, "columns": {"p": {"psi": 9}}}, now, before=before)) == []
    assert failed(result({"columns": {"p": {"psi": 0.2}}}, now, before=before)) == [("p", "psi")]


def test_limits_without_a_baseline() -> None:
    holes = pa.array(np.arange(4000.0), mask=np.arange(4000) < 400)
    now = sketches(x=holes, y=np.where(np.arange(4000) == 7, np.inf, 1.0))
    limits = {"x": {"nulls": 0.05, "mean": [0, 10], "min": 0, "max": 5000}, "y": {"max": 2}, "p": {"min": -100}}
    found = result({"columns": limits, "psi": 0.1}, now)
    assert failed(found) == [("x", "nulls"), ("x", "mean"), ("y", "max")]
    assert found.skipped == ("no baseline: no job of this name was published before",)


def test_rows_are_compared_with_the_baseline() -> None:
    gate = {"rows": {"min": 0.5, "max": 2, "at_least": 1500, "at_most": 5000}}
    assert failed(result(gate, sketches(), before=sketches())) == []
    assert failed(result(gate, sketches(), before=sketches(), rows=1000)) == [("", "rows"), ("", "rows / baseline")]
    assert failed(result(gate, sketches(), before=sketches(), rows=9000)) == [("", "rows"), ("", "rows / baseline")]


def test_too_few_rows_are_not_compared() -> None:
    found = result({"psi": 0.01}, sketches(shift=3, rows=900), before=sketches())
    assert found.checks == ()
    assert found.skipped == ("p, plan: fewer than 1,000 rows, too few to compare",)


def test_a_column_that_became_text_fails() -> None:
    before = sketches(z=np.arange(4000.0))
    found = result({"psi": 0.2}, sketches(z=pa.array(["a"] * 4000)), before=before)
    assert failed(found) == [("z", "type")]
    assert "z: type is texts, not numbers, as in the baseline" in found.text()
    assert found.digest  # without a figure, too


def test_limits_of_a_column_without_figures_do_not_hold() -> None:
    now = sketches(x=pa.array([None] * 4000, pa.float64()), y=np.full(4000, np.inf), z=pa.array(["a"] * 4000))
    limits = {"x": {"mean": [0, 1]}, "y": {"min": 0, "max": 9}, "z": {"mean": [0, 1]}}
    found = result({"columns": limits}, now)
    assert [check.text() for check in found.checks] == [
        "x: mean is missing in every row, not from 0 to 1",
        "y: min is infinite, not at least 0",
        "y: max is infinite, not at most 9",
        "z: mean is not a number, not from 0 to 1",
    ]
    assert GateResult.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))).digest == found.digest


@pytest.mark.parametrize(("rows", "ok"), [(None, False), ({"at_least": 0}, True), ({"at_most": 5}, False)])
def test_an_empty_output_is_held_back_unless_a_limit_allows_it(rows: dict[str, Any] | None, ok: bool) -> None:
    gate = {"psi": 0.2, "rows": rows, "columns": {"p": {"mean": [0, 1]}}}
    found = result(gate, Sketches(), rows=0, before=sketches())
    assert (not found.failed) is ok
    assert "p has no rows" in found.skipped
    assert not result(gate, Sketches(), rows=0).failed, "a first job may be empty"


def test_columns_that_the_baseline_does_not_have_are_named() -> None:
    found = result({"psi": 0.2}, sketches(z=np.arange(4000.0)), before=sketches())
    assert found.skipped == ("z: not in the baseline",)


def test_an_acceptance_holds_for_its_figures_only() -> None:
    gate = {"psi": 0.2}
    one, same = (result(gate, sketches(shift=0.6), before=sketches()) for _ in range(2))
    other = result(gate, sketches(shift=0.61), before=sketches())
    assert one.digest == same.digest != other.digest


def test_a_result_comes_back_from_json() -> None:
    found = result({"psi": 0.2, "rows": {"min": 0.5}}, sketches(shift=0.6), before=sketches())
    assert GateResult.from_dict(found.to_dict()) == found
    assert found.to_dict()["ok"] is False


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({}, "checks nothing"),
        ({"baseline": "last"}, "checks nothing"),
        ({"columns": {"p": {"mean": [2, 1]}}}, "wrong order"),
        ({"psi": 0}, "greater than 0"),
        ({"columns": {"p": {"nulls": 2}}}, "less than or equal to 1"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(gate: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Gate.model_validate(gate)
