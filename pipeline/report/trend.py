"""Compare the jobs of one name over time: rows, speed, rejects, duration, memory and drift."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.common.sketch import Sketches
from pipeline.common.text import table_text
from pipeline.common.units import format_bytes, format_count, format_seconds
from pipeline.errors import PipelineError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import list_jobs
from pipeline.report.build import make_report
from pipeline.report.distributions import drifts, sketches_of
from pipeline.report.report import Report

logger = logging.getLogger(__name__)
SHOWN = 20
"""Newest jobs of a trend when no number is given."""
BAR = 20
"""Characters of the longest bar."""


@dataclass(frozen=True)
class TrendPoint:
    """One job of a trend."""

    job: str
    created: str
    """UTC, ISO 8601."""
    status: str
    rows: int
    rejected: int
    rejected_share: float
    """Rejected rows / rows to be scored."""
    seconds: float
    """Wall time of all drivers."""
    rows_per_second: float
    peak_memory: int
    """Largest resident memory of a worker process in bytes; 0 if unknown."""
    model: str
    """Version of the model."""
    drift: float | None = None
    """Largest PSI of a score or feature against the successful job before; None if there is none to compare with."""
    drift_column: str = ""
    """Column that has it."""

    def to_dict(self) -> dict[str, Any]:
        """The point as JSON output shows it."""
        return asdict(self)


def trend(root: str | os.PathLike[str], name: str, *, limit: int = SHOWN) -> tuple[TrendPoint, ...]:
    """Return the newest jobs whose name in the job spec, or id, matches ``name``, oldest first.

    A job that cannot be read is logged and left out.

    :param name: such as ``churn`` or ``churn-*``.
    """
    points: list[TrendPoint] = []
    before: Sketches | None = None
    for summary in reversed(list_jobs(root, name=name, limit=limit)):
        try:
            job = JobDirectory.open(summary.directory)
            point = _point(job, summary.record.created)
            if job.status().is_success:
                sketches = sketches_of(job)
                found = drifts(before, sketches) if before is not None else []
                most = max(found, key=lambda drift: drift.psi, default=None)
                point = replace(point, drift=round(most.psi, 4), drift_column=most.column) if most else point
                before = sketches
            points.append(point)
        except (PipelineError, OSError) as error:
            logger.warning("left out %s: %s", summary.directory, error)
    return tuple(points)


def _point(job: JobDirectory, created: str) -> TrendPoint:
    stored, report = job.read_report(), None
    if stored is not None and stored.get("status") == str(job.status()) and "peak_memory" in stored:
        # A report that was damaged, or changed by hand, or is of an older version, is made again.
        with suppress(KeyError, TypeError, ValueError):
            report = Report.from_dict(stored)
    report = report or make_report(job)
    wanted = report.rows.output + report.rows.rejected
    return TrendPoint(
        job=job.id,
        created=created,
        status=str(report.status),
        rows=report.rows.input,
        rejected=report.rows.rejected,
        rejected_share=round(report.rows.rejected / wanted, 6) if wanted else 0.0,
        seconds=report.seconds.total,
        rows_per_second=round(report.rows_per_second, 1),
        peak_memory=report.peak_memory,
        model=report.model.version,
    )


def trend_text(points: Sequence[TrendPoint]) -> str:
    """Return a table of the points, oldest first, with a bar for the rows per second."""
    fastest = max((point.rows_per_second for point in points), default=0.0) or 1.0
    header = ["CREATED", "JOB", "STATUS", "ROWS", "REJECTED", "TIME", "MEMORY", "MODEL", "DRIFT", "ROWS/S", ""]
    rows = [
        [
            point.created[:16].replace("T", " "),
            point.job,
            point.status,
            f"{point.rows:,}",
            f"{point.rejected_share:.4%}",
            format_seconds(point.seconds),
            format_bytes(point.peak_memory) if point.peak_memory else "-",
            point.model or "-",
            f"{point.drift:.2f} {point.drift_column}" if point.drift is not None else "-",
            format_count(point.rows_per_second),
            "█" * round(BAR * point.rows_per_second / fastest),
        ]
        for point in points
    ]
    return table_text(header, rows)
