"""Limits of what a job may spend, and the spending of its runs.

::

    budget/limit.json       limits that a resume gave, in place of those of the spec
    budget/spent-<n>.json   spending as one driver last recorded it; a killed one loses some seconds

A fan-out and a job of several stages have one budget, in the directory of the whole job.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pipeline.common.units import format_cost
from pipeline.errors import SpecError, StateCorrupt
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import parent_of
from pipeline.jobs.receipts import Receipt
from pipeline.spec.budget import Budget
from pipeline.storage.store import Store

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class BudgetUse:
    """Limits of a job, and what is spent of them."""

    cost: float = 0.0
    """Cost of the answers of services, of all runs."""
    node_hours: float = 0.0
    """Hours of machines with workers, of all runs that had a budget."""
    cost_limit: float | None = None
    """None: no limit."""
    node_hours_limit: float | None = None

    @property
    def exhausted(self) -> str:
        """Name of the limit that is reached; empty if none is."""
        if self.cost_limit is not None and self.cost >= self.cost_limit:
            return "cost"
        return "node_hours" if self.node_hours_limit is not None and self.node_hours >= self.node_hours_limit else ""

    def text(self) -> str:
        """Return what is spent of each limit."""
        cost = f"cost {format_cost(self.cost)} of {format_cost(self.cost_limit)}" if self.cost_limit is not None else ""
        hours = ""
        if self.node_hours_limit is not None:
            hours = f"{format_cost(self.node_hours)} of {format_cost(self.node_hours_limit)} node-hours"
        return ", ".join(filter(None, (cost, hours)))

    def to_dict(self) -> dict[str, Any]:
        """Return spent amount and limit of each limit."""
        found = {"cost": (self.cost, self.cost_limit), "node_hours": (self.node_hours, self.node_hours_limit)}
        return {
            name: {"spent": round(spent, 9), "limit": limit}
            for name, (spent, limit) in found.items()
            if limit is not None
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        cost, hours = record.get("cost", {}), record.get("node_hours", {})
        return cls(cost.get("spent", 0.0), hours.get("spent", 0.0), cost.get("limit"), hours.get("limit"))


def whole_job(job: JobDirectory) -> JobDirectory:
    """Return the job that has the budget of ``job``: that of a child or a stage is its parent's."""
    while job.record.parent:
        job = parent_of(job)
    return job


def budget_of(job: JobDirectory) -> Budget | None:
    """Return the limits of a whole job: those that a resume gave, else those of its spec; None without any.

    :raises StateCorrupt: if the stored limits are damaged.
    """
    try:
        record = json.loads(job.store.read(layout.BUDGET_LIMIT))
        return Budget(cost=record["cost"], node_hours=record["node_hours"])
    except FileNotFoundError:
        return job.plan.spec.budget
    except (ValueError, KeyError, TypeError) as error:
        raise StateCorrupt(
            "the stored budget is damaged",
            where=job.store.url(layout.BUDGET_LIMIT),
            found=f"{type(error).__name__}: {error}"[:200],
            next_step=f"python -m pipeline resume {job.id} --budget cost=… writes a new one",
        ) from error


def set_budget(job: JobDirectory, budget: Budget) -> Budget:
    """Set limits of the whole job of ``job`` from now on; a limit that is not given stays. Return all limits."""
    root = whole_job(job)
    try:
        before = budget_of(root)
    except StateCorrupt:
        before = root.plan.spec.budget
    known = before.model_dump() if before is not None else {}
    given = {name: value for name, value in budget.model_dump().items() if value is not None}
    limits = Budget(**{"cost": None, "node_hours": None, **known, **given})
    record = {"schema_version": SCHEMA_VERSION, **limits.model_dump()}
    root.store.replace(layout.BUDGET_LIMIT, json.dumps(record, indent=1).encode() + b"\n")
    return limits


def parse_budget(texts: Mapping[str, Any]) -> Budget:
    """Return the budget of names and values.

    :raises SpecError: for another name, or a value that is no amount.
    """
    try:
        unknown = sorted(set(texts) - set(Budget.model_fields))
        if unknown or not texts:
            raise ValueError(f"no limit named {unknown[0]}" if unknown else "no limit")
        return Budget(**{name: float(value) for name, value in texts.items()})
    except (ValueError, TypeError) as error:
        raise SpecError(
            "not a valid budget",
            where="--budget",
            found=", ".join(f"{name}={value}" for name, value in texts.items()) or "nothing",
            expected="cost=AMOUNT or node_hours=HOURS, above 0",
        ) from error


@dataclass(frozen=True)
class Spending:
    """Record of one driver."""

    cost: float
    """Cost of the whole job so far, of earlier drivers, too."""
    node_seconds: float
    """Of this driver alone."""

    def write(self, store: Store, epoch: str) -> None:
        """Store it in place of what this driver recorded before."""
        record = {"schema_version": SCHEMA_VERSION, "cost": self.cost, "node_seconds": round(self.node_seconds, 1)}
        store.replace(layout.spending_path(epoch), json.dumps(record).encode() + b"\n")


def read_spending(store: Store, *, without: str = "") -> Spending:
    """Return the largest cost that any driver has recorded, and the node-seconds of all of them.

    :param without: epoch of the driver that asks.
    """
    cost = seconds = 0.0
    for name in store.list(layout.BUDGET):
        path = f"{layout.BUDGET}/{name}"
        if not name.startswith("spent-") or (without and path == layout.spending_path(without)):
            continue
        try:
            record = json.loads(store.read(path))
            cost, seconds = max(cost, float(record["cost"])), seconds + float(record["node_seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return Spending(cost, seconds)


def read_budget(job: JobDirectory) -> BudgetUse | None:
    """Return limits and spending of the whole job of ``job``; None for a job without a budget."""
    root = whole_job(job)
    limits = budget_of(root)
    if limits is None:
        return None
    spent = read_spending(root.store)
    return BudgetUse(spent.cost, spent.node_seconds / 3600.0, limits.cost, limits.node_hours)


def receipts_of(job: JobDirectory) -> Iterator[Receipt]:
    """Yield the receipts of all rounds of a job, of its children, and of all its stages."""
    if job.record.children:
        for child in job.children():
            yield from receipts_of(child)
    elif job.record.stages:
        for name in job.store.list_folders(layout.STEPS):
            folder = layout.stage_folder(name)
            if job.store.exists(f"{folder}/{layout.JOB_FILE}"):
                yield from receipts_of(JobDirectory.open(f"{job.root}/{folder}"))
    else:
        yield from job.receipts.each()


def cost_of(receipt: Receipt) -> float:
    """Return the cost of the answers in a receipt."""
    return receipt.engine.usage.get("cost", 0.0) if receipt.engine is not None else 0.0
