"""Figures of a job for the live page: sums over its receipts, added up as they arrive.

The driver of a job keeps them and sends them to the scheduler; ``python -m pipeline dashboard`` makes them from the job
directory. Both have the same receipts, so both show the same figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from pipeline.common.metrics import BUCKETS
from pipeline.common.rows import RowCounts
from pipeline.common.secrets import redact_values
from pipeline.common.step_output import MessageCount, add_counts
from pipeline.common.units import iso_time, utc_now
from pipeline.events import AttemptOutcome, MitigationAction, RunningPartition, StepMessage
from pipeline.execution.failures import is_worker_loss
from pipeline.execution.stragglers import StragglerPolicy
from pipeline.jobs.budget import BudgetUse, read_budget
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.progress_file import read_progress
from pipeline.jobs.receipts import Receipt, Timings
from pipeline.jobs.stages import stage_states
from pipeline.plan.plan import Plan

SHOWN_RUNNING = 16
SHOWN_WORKERS = 40
SHOWN_REASONS = 12
BINS = 30
"""Bars of the histogram of durations."""
PHASES = ("read", "steps", "score", "write", "model_load")


@dataclass
class WorkerTime:
    """Work of one worker for a job, in seconds summed over partitions."""

    partitions: int = 0
    seconds: Timings = field(default_factory=Timings)
    ended: float = 0.0
    """End of its last partition, in seconds since the epoch; 0: unknown."""

    @property
    def busy(self) -> float:
        """Sum of the phases."""
        return float(sum(getattr(self.seconds, name) for name in PHASES))


@dataclass
class LiveFigures:
    """Figures of a job, kept up to date by its driver."""

    job: str
    name: str
    plan: Plan
    started: float = 0.0
    """Start of the present round, in seconds since the epoch; 0: unknown."""
    threads: int = 0
    """Threads of a worker; 0: unknown."""
    status: str = ""
    reason: str = ""
    counts: RowCounts = field(default_factory=RowCounts)
    rows_done: int = 0
    """Input rows of completed partitions."""
    done: int = 0
    planned: int = 0
    splits: int = 0
    backups: int = 0
    retries: int = 0
    lost_workers: int = 0
    """Attempts that ended with their worker."""
    backoffs: int = 0
    """Partitions that ended with smaller batches than planned, or were split for their memory."""
    smallest_batch: int = 0
    peak_memory: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    engines: Counter[str] = field(default_factory=Counter)
    workers: dict[str, WorkerTime] = field(default_factory=dict)
    durations: list[float] = field(default_factory=list)
    messages: dict[tuple[str, str, str], MessageCount] = field(default_factory=dict)
    """Prints and warnings of steps in completed partitions, by place; 0 times: of a partition that runs."""
    budget: BudgetUse | None = None
    """Limits of the whole job, and what is spent."""

    @staticmethod
    def of(job: JobDirectory, ledger: Ledger, events: Sequence[Mapping[str, Any]] = ()) -> LiveFigures:
        """Return the figures of the receipts and events so far."""
        figures = LiveFigures(job.id, job.record.name, ledger.base.plan, planned=ledger.planned)
        for receipt in ledger.done:
            figures.add(receipt)
        for event in events:
            figures.add_event(event)
        # Rows that a retry has recovered are no longer rejected.
        figures.counts, figures.reasons = ledger.rows, Counter(ledger.reasons)
        return figures

    def add(self, receipt: Receipt) -> None:
        """Count a completed partition."""
        rows, before = receipt.rows, sum(receipt.before.values())
        self.counts = RowCounts(
            self.counts.input + rows.input - before,
            self.counts.output + rows.output,
            self.counts.rejected + rows.rejected - before,
            self.counts.filtered + rows.filtered,
        )
        self.done += 1
        self.rows_done += rows.input
        self.reasons.update(receipt.reasons)
        self.reasons.subtract(receipt.before)
        if receipt.engine is not None:
            self.engines.update(receipt.engine.rows)
        worker = self.workers.setdefault(receipt.worker, WorkerTime())
        worker.partitions, worker.seconds = worker.partitions + 1, worker.seconds + receipt.seconds
        worker.ended = max(worker.ended, receipt.ended)
        self.durations.append(receipt.seconds.total)
        self.peak_memory = max(self.peak_memory, receipt.peak_memory)
        if receipt.batch_rows:
            self.smallest_batch = min(self.smallest_batch or receipt.batch_rows, receipt.batch_rows)
            self.backoffs += receipt.batch_rows < self.plan.batch_rows
        add_counts(self.messages, receipt.messages)

    def add_message(self, event: StepMessage) -> None:
        """Show a print or warning whose partition has not ended."""
        add_counts(self.messages, [MessageCount(event.step, event.kind, event.place, event.message, 0)])

    def add_parts(self, parts: int) -> None:
        """Count the parts that replace a partition."""
        self.planned += max(0, parts - 1)

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Count an event of the job, in the form in which it is stored."""
        kind, outcome = event.get("event"), event.get("outcome")
        if kind == "status":
            self.status, self.reason = str(event.get("after", "")), ""
        elif kind == "partition" and outcome == AttemptOutcome.RETRY:
            self.retries += 1
            self.lost_workers += is_worker_loss(str(event.get("reason", "")))
        elif kind == "partition" and outcome == AttemptOutcome.SPLIT:
            self.splits += 1
            self.lost_workers += is_worker_loss(str(event.get("reason", "")))
            self.backoffs += event.get("split_reason") == "memory"
        elif kind == "straggler" and event.get("action") == MitigationAction.BACKUP and not event.get("is_over"):
            self.backups += 1
        elif kind == "cluster":
            self.threads = round(int(event.get("threads", 0)) / max(1, int(event.get("workers", 1))))

    def to_dict(
        self,
        *,
        now: float,
        rows_done: int,
        rate: float,
        left: float | None,
        running: Iterable[RunningPartition] = (),
        is_running: bool = True,
    ) -> dict[str, Any]:
        """Return the figures for the page, with secrets masked.

        :param now: seconds since the epoch; of a job that has ended, its end.
        :param rows_done: input rows that are done, inside running partitions too.
        :param rate: rows per second; 0: unknown.
        :param left: seconds until the last row is scored; None: unknown.
        """
        shown = list(running) if is_running else []
        waiting = max(0, self.planned - self.done - len(shown))
        workers = sorted(self.workers.items(), key=lambda pair: -pair[1].busy)
        rows = sum(partition.rows for partition in self.plan.partitions)
        found = self.plan.model_details
        return {
            "time": iso_time(utc_now()),
            **redact_values(
                {
                    "job": self.job,
                    "name": self.name,
                    "status": self.status,
                    "reason": self.reason,
                    "rows": rows,
                    "rows_done": min(rows, rows_done),
                    "rows_per_second": round(rate, 1),
                    "seconds_left": left if is_running else None,
                    "partitions": {
                        "planned": self.planned,
                        "done": self.done,
                        "running": len(shown),
                        "waiting": waiting,
                    },
                    "counts": self.counts.to_dict(),
                    "running": [asdict(part) for part in shown[:SHOWN_RUNNING]],
                    "durations": self._histogram(),
                    "seconds": self._buckets(),
                    "updated": round(now, 3),
                    "workers": [self._worker(name, time, now) for name, time in workers[:SHOWN_WORKERS]],
                    "workers_left_out": max(0, len(workers) - SHOWN_WORKERS),
                    "batch": {
                        "planned": self.plan.batch_rows,
                        "smallest": self.smallest_batch,
                        "backoffs": self.backoffs,
                    },
                    "peak_memory": self.peak_memory,
                    "model": f"{found['name']} version {found['version']}" if found["name"] else "",
                    "engines": dict(self.engines),
                    "reasons": {name: n for name, n in self.reasons.most_common(SHOWN_REASONS) if n > 0},
                    "messages": [message.to_dict() for message in self.messages.values()],
                    "retries": self.retries,
                    "splits": self.splits,
                    "backups": self.backups,
                    "lost_workers": self.lost_workers,
                    **({"budget": self.budget.to_dict()} if self.budget else {}),
                }
            ),
        }

    def _worker(self, name: str, time: WorkerTime, now: float) -> dict[str, Any]:
        """Return the seconds of a worker by phase. It was idle for the rest, until its last partition ended."""
        phases = {phase: round(getattr(time.seconds, phase), 3) for phase in PHASES}
        # Reading overlaps scoring: a worker is not idle while a partition runs.
        active = max(time.seconds.total, time.busy)
        end = min(now, time.ended or now)
        idle = (end - self.started) * max(1, self.threads) - active if self.started else 0.0
        return {"worker": name, "partitions": time.partitions, **phases, "idle": round(max(0.0, idle), 3)}

    def _buckets(self) -> dict[str, Any]:
        """Return the partitions by `BUCKETS` of their seconds."""
        counts = np.bincount(np.searchsorted(BUCKETS, self.durations), minlength=len(BUCKETS) + 1)
        return {"counts": counts.tolist(), "sum": round(sum(self.durations), 3)}

    def _histogram(self) -> dict[str, Any]:
        if not self.durations:
            return {"edges": [], "counts": [], "median": None, "longest": None, "straggler": None}
        times = np.asarray(self.durations)
        line = straggler_line(times)
        counts, edges = np.histogram(times, bins=BINS, range=(0.0, max(float(times.max()), line or 0.0) * 1.02 or 1.0))
        return {
            "edges": [round(float(edge), 4) for edge in edges],
            "counts": counts.tolist(),
            "median": round(float(np.median(times)), 3),
            "longest": round(float(times.max()), 3),
            "straggler": line,
        }


def straggler_line(times: np.ndarray, policy: StragglerPolicy | None = None) -> float | None:
    """Return the seconds after which a partition of mean size is a straggler; None: too few have ended.

    The driver weighs rows, bytes and workers too; this is its limit for the mean of them.
    """
    policy = policy or StragglerPolicy()
    if len(times) < policy.samples:
        return None
    expected = float(np.median(times))
    # The median absolute deviation of a normal distribution is 0.6745 of its standard deviation.
    spread = float(np.median(np.abs(times - expected))) / 0.6745
    limits = expected + policy.seconds, policy.factor * expected, expected + policy.spreads * spread
    return round(max(limits), 3)


def stored_figures(job: JobDirectory) -> dict[str, Any]:
    """Return the figures of a job from its directory, whether it runs, waits or has ended.

    Of a job with stages, they are those of the stage that began last.
    """
    part = next((state.job for state in reversed(stage_states(job)) if state.job is not None), job)
    events = job.events.read()
    of_part = events if part is job else part.events.read()
    figures = LiveFigures.of(part, part.ledger(), of_part)
    figures.job, figures.budget = job.id, read_budget(job)
    starts = [event for event in of_part if event["event"] == "round_started"]
    statuses = [event for event in events if event["event"] == "status"]
    if starts:
        figures.started = datetime.fromisoformat(str(starts[-1]["time"])).timestamp()
    status = job.status()
    figures.status = str(status)
    now = utc_now().timestamp()
    if not status.is_active and statuses:
        now = datetime.fromisoformat(str(statuses[-1]["time"])).timestamp()
        figures.reason = "" if status.is_success else str(statuses[-1].get("reason", ""))
    record = read_progress(job.store) if status.is_active else None
    rows_done = figures.rows_done
    seconds = now - figures.started if figures.started else 0.0
    return figures.to_dict(
        now=now,
        rows_done=max(rows_done, record.progress.rows_done if record else 0),
        rate=record.rows_per_second if record else rows_done / seconds if seconds > 0 else 0.0,
        left=record.seconds_left if record else None,
        running=record.progress.running if record else (),
        is_running=status.is_active,
    )
