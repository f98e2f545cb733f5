"""What a probe of a job left in its directory: ``probe.json``, the estimate that was made before the whole job ran."""

from __future__ import annotations

import json
from typing import Any

from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.receipts import Totals
from pipeline.plan.plan import Plan
from pipeline.report.estimate import Estimate, compare_estimate

PROBE_FILE = "probe.json"


def write_estimate(job: JobDirectory, estimate: Estimate) -> None:
    """Set ``probe.json``."""
    job.store.replace(PROBE_FILE, json.dumps(estimate.details(), indent=1).encode() + b"\n")


def read_estimate(job: JobDirectory) -> Estimate | None:
    """The estimate of the last probe; None when there was none, or it cannot be read: nothing depends on it."""
    try:
        return Estimate.from_details(json.loads(job.store.read(PROBE_FILE)))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def came_of_estimate(
    job: JobDirectory, plan: Plan, totals: Totals, *, seconds: float, provision: float, starts: int
) -> dict[str, Any]:
    """The estimate beside what came, once every partition is done; empty when there is no estimate, or it is too early.

    :param seconds: wall time of all drivers of the job.
    :param provision: seconds of it in which they waited for workers.
    :param starts: drivers there were. The estimate reckons with one: the others' wait is taken off.
    """
    estimate = read_estimate(job)
    if estimate is None or totals.rows.rows_in < plan.rows - plan.pruned_rows:
        return {}
    return compare_estimate(
        estimate,
        seconds=max(0.0, seconds - provision * (1 - 1 / max(1, starts))),
        task_seconds=totals.seconds.total - totals.seconds.model_load,
        output_bytes=totals.output_bytes,
    )
