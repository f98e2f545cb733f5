"""The plan of a job, made before anything runs: columns, partitions, memory, batch sizes, children. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.common.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.plan.describe import PlanSummary, explain, plan_summary
    from pipeline.plan.plan import Limits, Partition, Plan
    from pipeline.plan.planner import make_plan

__all__ = ["Limits", "Partition", "Plan", "PlanSummary", "explain", "make_plan", "plan_summary"]

__getattr__, __dir__ = lazy_face(
    "pipeline.plan",
    {
        "describe": "PlanSummary explain plan_summary",
        "plan": "Limits Partition Plan",
        "planner": "make_plan",
    },
)
