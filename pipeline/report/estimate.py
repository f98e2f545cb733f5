"""Estimate time, cost and memory of a job from a sample of its partitions. Pure: receipts in, intervals out.

The seconds of all partitions are estimated by the ratio of seconds to *cost* in the sample. Cost is rows and bytes,
half each, as `dispatch_order` weighs them. The interval uses the ratio estimator's variance for a sample without
replacement (Cochran, Sampling Techniques, 3rd ed. 1977, section 6.4) and Student's t, because samples are small.

The wall time of ``slots`` concurrent tasks is at least seconds / slots. For any order of the partitions, it is at most
seconds / slots + (1 - 1 / slots) × longest (Graham, Bounds on Multiprocessing Timing Anomalies, 1969).

``probe.json`` in the job directory holds the estimate that a probe made before the whole job ran.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from pipeline.common.text import labelled
from pipeline.common.units import format_bytes, format_seconds, plural
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.receipts import Receipt, Totals
from pipeline.plan.plan import Partition, Plan

CONFIDENCE = 0.95
"""Share of intervals that contain the actual figure, if the rest of the job is like the sample."""
# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11)
_NORMAL = 1.96


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> Interval:
        """Return the interval with all three values multiplied by ``factor``."""
        return Interval(self.low * factor, self.expected * factor, self.high * factor)

    def holds(self, value: float) -> bool:
        """True if ``value`` lies in the interval."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Estimate:
    """A probe's estimate for the whole job, stored in ``probe.json``."""

    sampled: int
    """Timed partitions, which are completed and not scored again."""
    partitions: int
    workers: int
    slots: int
    """Concurrent tasks: workers × threads."""
    task_seconds: Interval
    """Sum of the seconds of all partitions."""
    seconds: Interval
    """Wall time of the whole job on ``workers`` workers, including their start."""
    worker_hours: Interval
    output_bytes: Interval
    """Bytes of the published files."""
    peak_memory: int
    """Largest resident memory of any worker in the probe, in bytes."""
    projected_memory: int
    """Memory that the plan projects for a worker, in bytes."""
    start_seconds: float
    """Part of ``seconds`` that does not grow with the rows: start of the workers, load of the model."""

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON output and ``probe.json``."""
        return {"schema_version": 1, **_rounded(asdict(self))}

    @classmethod
    def from_dict(cls, details: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        fields: dict[str, Any] = {name: value for name, value in details.items() if name != "schema_version"}
        record: dict[str, Any] = {
            name: Interval(**value) if isinstance(value, dict) else value for name, value in fields.items()
        }
        return cls(**record)


@dataclass(frozen=True)
class Actual:
    """The actual figures of a finished job, for those that a probe estimates."""

    seconds: float
    """Wall time."""
    task_seconds: float
    """Sum over all partitions, without loading the model."""
    output_bytes: float


@dataclass(frozen=True)
class EstimateComparison:
    """An estimate beside the actual figures of the job."""

    estimated: Estimate
    actual: Actual

    @property
    def held(self) -> dict[str, bool]:
        """True for each figure whose actual value lies in its interval."""
        return {name: getattr(self.estimated, name).holds(value) for name, value in asdict(self.actual).items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison for ``report.json``."""
        return {"estimated": self.estimated.to_dict(), "actual": asdict(self.actual), "held": self.held}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(Estimate.from_dict(record["estimated"]), Actual(**record["actual"]))

    def __str__(self) -> str:
        seconds = self.estimated.seconds
        span = f"{format_seconds(seconds.low)} to {format_seconds(seconds.high)}"
        return f"took {format_seconds(self.actual.seconds)}; estimated {format_seconds(seconds.expected)} ({span})"


def choose_sample(partitions: Sequence[Partition], *, count: int) -> tuple[Partition, ...]:
    """Return ``count`` of ``partitions``, evenly spaced from the smallest to the largest."""
    ordered = sorted(partitions, key=lambda partition: (partition.rows, partition.bytes, partition.id))
    count = min(count, len(ordered))
    return tuple(ordered[(2 * number + 1) * len(ordered) // (2 * count)] for number in range(count))


def make_estimate(
    plan: Plan, receipts: Mapping[str, Receipt], *, workers: int, threads: int, start_seconds: float, projected: int
) -> Estimate:
    """Estimate the job of ``plan`` from the receipts of some of its partitions.

    :param receipts: receipts by partition id.
    :param workers: workers that the job will have.
    :param threads: threads per worker.
    :param start_seconds: seconds until the workers had started.
    :param projected: bytes of memory that the plan projects for a worker.
    :raises ValueError: if no partition of the plan has a receipt.
    """
    done_ids = {name for name, receipt in receipts.items() if not receipt.splits}
    sample = [partition for partition in plan.partitions if partition.id in done_ids]
    if not sample:
        raise ValueError("an estimate needs a partition that is done")
    done = [receipts[partition.id] for partition in sample]
    costs = _costs(plan.partitions)
    sampled = [costs[partition.id] for partition in sample]
    total, count = sum(costs.values()), len(plan.partitions)
    seconds = [receipt.seconds.total - receipt.seconds.model_load for receipt in done]
    tasks = _ratio(seconds, sampled, total=total, count=count)
    start = start_seconds + max(receipt.seconds.model_load for receipt in done)
    wall = _wall(tasks, longest=max(costs.values()) / total * tasks.high, slots=workers * threads, start=start)
    sizes = [float(receipt.data.bytes if receipt.data else 0) for receipt in done]
    return Estimate(
        sampled=len(sample),
        partitions=count,
        workers=workers,
        slots=workers * threads,
        task_seconds=tasks,
        seconds=wall,
        worker_hours=wall.times(workers / 3600),
        output_bytes=_ratio(sizes, sampled, total=total, count=count),
        peak_memory=max(receipt.peak_memory for receipt in done),
        projected_memory=projected,
        start_seconds=start,
    )


def compare_estimate(
    estimate: Estimate, *, seconds: float, task_seconds: float, output_bytes: int
) -> EstimateComparison:
    """Return the estimate and the actual figures, rounded to five digits.

    :param seconds: wall time of the job.
    :param task_seconds: sum over all partitions, without loading the model.
    """
    actual = {"seconds": seconds, "task_seconds": task_seconds, "output_bytes": float(output_bytes)}
    return EstimateComparison(Estimate.from_dict(estimate.to_dict()), Actual(**_rounded(actual)))


def _costs(partitions: Sequence[Partition]) -> dict[str, float]:
    rows = max(1, sum(partition.rows for partition in partitions))
    size = max(1, sum(partition.bytes for partition in partitions))
    return {partition.id: partition.rows / rows + partition.bytes / size for partition in partitions}


def _ratio(values: Sequence[float], costs: Sequence[float], *, total: float, count: int) -> Interval:
    """Estimate the sum of a figure over all partitions, from the values and costs in the sample."""
    ratio, sampled = sum(values) / sum(costs), len(values)
    expected = ratio * total
    if sampled >= count:
        return Interval(expected, expected, expected)
    if sampled == 1:
        # One value gives no spread: assume a factor of two in both directions.
        return Interval(expected / 2, expected, expected * 2)
    squares = sum((value - ratio * cost) ** 2 for value, cost in zip(values, costs, strict=True)) / (sampled - 1)
    error = count * math.sqrt((1 - sampled / count) / sampled * squares)
    quantile = _STUDENT[sampled - 2] if sampled - 2 < len(_STUDENT) else _NORMAL
    # The sum cannot be lower than the part that was measured.
    return Interval(max(sum(values), expected - quantile * error), expected, expected + quantile * error)


def _wall(tasks: Interval, *, longest: float, slots: int, start: float) -> Interval:
    spread = (1 - 1 / slots) * longest
    low = max(tasks.low / slots, longest * tasks.low / tasks.high if tasks.high else 0.0)
    expected = max(tasks.expected / slots, low)
    return Interval(start + low, start + expected + spread / 2, start + tasks.high / slots + spread)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write_estimate(job: JobDirectory, estimate: Estimate) -> None:
    """Write ``probe.json``."""
    job.store.replace(layout.PROBE_FILE, json.dumps(estimate.to_dict(), indent=1).encode() + b"\n")


def read_estimate(job: JobDirectory) -> Estimate | None:
    """Return the estimate of the last probe; None if there is none or it cannot be read. No decision needs it."""
    try:
        return Estimate.from_dict(json.loads(job.store.read(layout.PROBE_FILE)))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def compare_with_actual(
    job: JobDirectory, plan: Plan, totals: Totals, *, seconds: float, provision: float, starts: int
) -> EstimateComparison | None:
    """Compare the job with its estimate. Return None without an estimate, or before all partitions are done.

    :param seconds: wall time of all drivers of the job.
    :param provision: part of ``seconds`` in which drivers waited for workers.
    :param starts: number of drivers. The estimate assumes one start, so the wait of the others is subtracted.
    """
    estimate = read_estimate(job)
    if estimate is None or totals.rows.input < plan.rows - plan.pruned_rows:
        return None
    return compare_estimate(
        estimate,
        seconds=max(0.0, seconds - provision * (1 - 1 / max(1, starts))),
        task_seconds=totals.seconds.total - totals.seconds.model_load,
        output_bytes=totals.output_bytes,
    )


def estimate_lines(estimate: Estimate) -> list[str]:
    """Return the figures of an estimate with their 95 % intervals, one per line."""
    return labelled(
        {
            "probed": f"{estimate.sampled:,} of {estimate.partitions:,} partitions; they stay done",
            "time": f"{_span(estimate.seconds, format_seconds)} on {plural(estimate.workers, 'worker')}",
            "cost": f"{_span(estimate.worker_hours, '{:.3g}'.format)} worker-hours",
            "size": f"{_span(estimate.output_bytes, lambda size: format_bytes(round(size)))} of output",
            "memory": f"{format_bytes(estimate.peak_memory)} at most so far in a worker; "
            f"the plan reckons with {format_bytes(estimate.projected_memory)}",
        }
    )


def _span(interval: Interval, form: Callable[[float], str]) -> str:
    return f"about {form(interval.expected)} ({form(interval.low)} to {form(interval.high)})"
