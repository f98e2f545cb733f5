"""The cost of services, estimated when a job is planned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.plan.describe import estimated_cost
from pipeline.spec.job_spec import JobSpec


def plan_of(*before: dict[str, Any], **endpoint: Any) -> Any:
    given = {"url": "http://h/v1", "model": "m", "messages": "Sum up: {{text}}", **endpoint}
    steps = [*before, {"score": {"endpoint": given}}]
    return SimpleNamespace(spec=JobSpec.build(name="j", source={"path": "in/"}, steps=steps, sink={"path": "out/"}))


def test_least_and_most() -> None:
    plan = plan_of(prices={"input": 1.0, "output": 10.0}, max_tokens=100)
    low, high = estimated_cost(plan, rows=1_000_000, nbytes=40_000_000) or (0.0, 0.0)
    # Eight characters of the template are two tokens; then 30 of values, and 100 of the answer.
    assert (low, high) == pytest.approx((2.0 + 10.0, 32.0 + 1000.0))


def test_rows_may_be_filtered() -> None:
    plan = plan_of({"filter": "a > 0"}, prices={"input": 1.0})
    assert (estimated_cost(plan, rows=1000, nbytes=1000) or (1.0,))[0] == 0.0


def test_without_prices_nothing_is_known() -> None:
    assert estimated_cost(plan_of(), rows=1000, nbytes=1000) is None
