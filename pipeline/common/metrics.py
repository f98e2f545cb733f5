"""Figures of jobs as metrics of Prometheus, in its text format. Pure, and without a client library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Upper bounds of the histogram of seconds per partition."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PHASES = ("read", "steps", "score", "write", "model_load", "idle")


@dataclass
class Metric:
    """One metric with its samples."""

    name: str
    kind: str
    """``gauge``, ``counter`` or ``histogram``."""
    help: str
    samples: list[tuple[str, Mapping[str, str], float]] = field(default_factory=list)
    """Suffix of the name, labels, value."""

    def add(self, value: float | None, *, suffix: str = "", **labels: str) -> None:
        """Add a sample; None: there is none."""
        if value is not None:
            self.samples.append((suffix, labels, value))

    def text(self) -> str:
        """Return the metric in the text format; empty without samples."""
        if not self.samples:
            return ""
        lines = [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} {self.kind}"]
        lines += [f"{self.name}{suffix}{_labels(labels)} {value!r}" for suffix, labels, value in self.samples]
        return "\n".join(lines) + "\n"


_COUNTERS = {
    "retries": "Attempts at partitions that were repeated.",
    "splits": "Partitions that were split.",
    "backups": "Partitions that got a copy on another worker.",
    "lost_workers": "Attempts that ended with their worker.",
}


def metrics_text(jobs: Iterable[Mapping[str, Any]]) -> str:
    """Return the metrics of jobs.

    :param jobs: as `pipeline.report.live_figures` makes them.
    """
    return "".join(metric.text() for metric in _metrics(list(jobs)))


def _metrics(jobs: Sequence[Mapping[str, Any]]) -> Iterable[Metric]:
    status = Metric("pipeline_job_status", "gauge", "1 for the present status of a job.")
    updated = Metric("pipeline_job_updated_seconds", "gauge", "Time of the figures, in seconds since the epoch.")
    rows = Metric("pipeline_job_rows", "gauge", "Rows of completed partitions by where they ended.")
    planned = Metric("pipeline_job_planned_rows", "gauge", "Input rows of the job.")
    done = Metric("pipeline_job_done_rows", "gauge", "Input rows that are done, inside running partitions too.")
    rate = Metric("pipeline_job_rows_per_second", "gauge", "Input rows per second; of an ended job, on average.")
    left = Metric("pipeline_job_left_seconds", "gauge", "Seconds until the last row is scored, estimated.")
    partitions = Metric("pipeline_job_partitions", "gauge", "Partitions by state.")
    reasons = Metric("pipeline_job_rejected_rows", "gauge", "Rejected rows by reason; the most frequent reasons only.")
    memory = Metric("pipeline_job_peak_memory_bytes", "gauge", "Peak resident memory of a worker process.")
    backoffs = Metric("pipeline_job_memory_backoffs_total", "counter", "Partitions whose batches memory made smaller.")
    workers = Metric("pipeline_job_worker_seconds_total", "counter", "Seconds of a worker by phase.")
    spent = Metric("pipeline_job_budget_spent", "gauge", "Spent of a budget: money for services, or node-hours.")
    limit = Metric("pipeline_job_budget_limit", "gauge", "Limit of a budget.")
    seconds = Metric("pipeline_job_partition_seconds", "histogram", "Wall time of completed partitions.")
    counters = {name: Metric(f"pipeline_job_{name}_total", "counter", text) for name, text in _COUNTERS.items()}
    for job in jobs:
        of = {"job": str(job["job"]), "name": str(job["name"])}
        status.add(1, **of, status=str(job["status"]))
        updated.add(job["updated"], **of)
        for kind, count in job["counts"].items():
            rows.add(count, **of, kind=_KINDS.get(kind, kind))
        planned.add(job["rows"], **of)
        done.add(job["rows_done"], **of)
        rate.add(job["rows_per_second"], **of)
        left.add(job["seconds_left"], **of)
        for state in ("done", "running", "waiting"):
            partitions.add(job["partitions"][state], **of, state=state)
        for reason, count in job["reasons"].items():
            reasons.add(count, **of, reason=reason)
        memory.add(job["peak_memory"] or None, **of)
        backoffs.add(job["batch"]["backoffs"], **of)
        for kind, amounts in job.get("budget", {}).items():
            spent.add(amounts["spent"], **of, kind=kind)
            limit.add(amounts["limit"], **of, kind=kind)
        for worker in job["workers"]:
            for phase in PHASES:
                workers.add(worker[phase], **of, worker=worker["worker"], phase=phase)
        for name, counter in counters.items():
            counter.add(job[name], **of)
        _add_histogram(seconds, job["seconds"], of)
    yield from (status, updated, rows, planned, done, rate, left, partitions, reasons, memory, backoffs)
    yield from (*counters.values(), spent, limit, workers, seconds)


_KINDS = {"in": "input", "out": "output"}


def _add_histogram(metric: Metric, seconds: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    total = 0
    for bound, count in zip((*(f"{bound:g}" for bound in BUCKETS), "+Inf"), seconds["counts"], strict=True):
        total += count
        metric.add(total, suffix="_bucket", **labels, le=bound)
    metric.add(seconds["sum"], suffix="_sum", **labels)
    metric.add(total, suffix="_count", **labels)


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
