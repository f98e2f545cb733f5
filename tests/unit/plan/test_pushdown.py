"""The first `filter` steps are conditions of the source."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import SpecError
from pipeline.plan.fan_out import child_spec
from pipeline.plan.pushdown import pushed_filters, read_source
from pipeline.sources import parse_filter
from pipeline.spec.job_spec import JobSpec

SCORE = {"score": {"model": "m.ubj"}}


def spec(*steps: dict[str, Any], **source: Any) -> JobSpec:
    return JobSpec.build(name="j", source={"path": "/in", **source}, sink={"path": "/out"}, steps=steps)


def test_filters_before_the_first_map_and_score_are_pushed() -> None:
    assert pushed_filters(spec({"filter": "a > 1"}, SCORE, {"filter": "b > 1"})) == {0: "a > 1"}
    assert pushed_filters(spec({"map": "m:f"}, {"filter": "a > 1"})) == {}


def test_all_conditions_are_joined() -> None:
    steps = {"filter": "a > 1 or b > 1"}, {"filter": "c == 2"}, SCORE
    joined = read_source(spec(*steps, filter="d < 3 or e < 3")).filter
    assert joined == "(d < 3 or e < 3) and (a > 1 or b > 1) and (c == 2)"
    assert read_source(spec(steps[1], SCORE)).filter == "c == 2"
    assert read_source(spec(SCORE)).filter is None


def test_a_condition_behind_a_select_gets_the_names_of_the_source() -> None:
    steps = {"select": {"b": "a", "a": "b"}}, {"filter": "a > 1 and column('b') < 2"}, SCORE
    (pushed,) = pushed_filters(spec(*steps)).values()
    assert parse_filter(pushed).root == parse_filter("b > 1 and a < 2").root


def test_a_condition_with_the_value_of_a_fan_out_is_left_to_the_children() -> None:
    steps = [{"filter": "a == '${fan_out.value}'"}, SCORE]
    parent = JobSpec.build(
        name="j", source={"path": "/in"}, sink={"path": "/out"}, steps=steps, fan_out={"by": ["x", "y"]}
    )
    assert pushed_filters(parent) == {}
    assert pushed_filters(child_spec(parent, "x", column=None)) == {0: "a == 'x'"}


def test_syntax_is_blamed_on_the_step() -> None:
    with pytest.raises(SpecError) as caught:
        read_source(spec({"select": ["a"]}, {"filter": "a >"}, SCORE))
    assert caught.value.where.startswith("steps.1.filter, character")
    assert caught.value.next_step == "fix steps.1.filter"
