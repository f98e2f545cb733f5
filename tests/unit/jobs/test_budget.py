"""Limits of a job, and the record of what its runs have spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SpecError, StateCorrupt
from pipeline.jobs.budget import BudgetUse, Spending, budget_of, parse_budget, read_budget, read_spending, set_budget
from pipeline.jobs.directory import JobDirectory
from pipeline.spec.budget import Budget
from pipeline.storage.store import open_store
from pipeline.testing.jobs import small_job


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    job = small_job(tmp_path / "in", sink=str(tmp_path / "out"), rows=(5,))
    return JobDirectory.create(str(tmp_path / "jobs"), job.plan, job="small-1")


def test_a_new_limit_leaves_the_other_one(job: JobDirectory) -> None:
    assert (budget_of(job), read_budget(job)) == (None, None)
    set_budget(job, Budget(cost=5.0))
    assert set_budget(job, Budget(node_hours=2.0)) == Budget(cost=5.0, node_hours=2.0)
    assert budget_of(job) == Budget(cost=5.0, node_hours=2.0)


def test_a_damaged_limit_is_an_error_until_there_is_a_new_one(job: JobDirectory) -> None:
    job.store.replace("budget/limit.json", b"{")
    with pytest.raises(StateCorrupt, match="budget is damaged"):
        budget_of(job)
    assert set_budget(job, Budget(cost=1.0)) == Budget(cost=1.0)


def test_runs_are_summed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    Spending(1.0, 3600.0).write(store, "1")
    Spending(3.0, 1800.0).write(store, "2")
    store.replace("budget/spent-3.json", b"{")
    # The cost is that of the whole job, whoever recorded it last.
    assert read_spending(store) == Spending(3.0, 5400.0)
    assert read_spending(store, without="2") == Spending(1.0, 3600.0)


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (BudgetUse(1.0, 1.0), ""),
        (BudgetUse(1.0, 1.0, 1.1, 1.1), ""),
        (BudgetUse(1.0, 1.0, 1.0), "cost"),
        (BudgetUse(1.0, 1.0, None, 0.5), "node_hours"),
    ],
)
def test_the_limit_that_is_reached(use: BudgetUse, name: str) -> None:
    assert use.exhausted == name


def test_text_and_json() -> None:
    use = BudgetUse(12.4, 0.25, 25.0, 40.0)
    assert use.text() == "cost 12.40 of 25.00, 0.25 of 40.00 node-hours"
    assert BudgetUse.from_dict(use.to_dict()) == use
    assert BudgetUse(1.0, 2.0, 3.0).to_dict() == {"cost": {"spent": 1.0, "limit": 3.0}}


def test_limits_from_the_command_line() -> None:
    assert parse_budget({"cost": "5", "node_hours": "0.5"}) == Budget(cost=5.0, node_hours=0.5)


@pytest.mark.parametrize("texts", [{}, {"costs": "5"}, {"cost": "much"}, {"cost": "0"}, {"cost": "inf"}])
def test_wrong_limits_from_the_command_line(texts: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="not a valid budget"):
        parse_budget(texts)
