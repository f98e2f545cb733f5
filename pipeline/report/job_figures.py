"""Figures of a job for a list of jobs. One small file of each job is read, and no receipt: a list may be long."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.jobs import layout
from pipeline.jobs.listing import JobSummary, read_each
from pipeline.jobs.progress_file import read_progress
from pipeline.storage.store import Store, open_store


@dataclass(frozen=True)
class JobFigures:
    """Figures of a job: of its report, or while it runs of its progress. None: unknown."""

    rejected: int | None = None
    """Rejected rows."""
    seconds: float | None = None
    """Wall time of all drivers."""
    rows_per_second: float | None = None
    """Input rows / wall time; of a running job, its rate now."""
    peak_memory: int | None = None
    """Largest resident memory of a worker process in bytes."""


def read_figures(root: str | os.PathLike[str], jobs: Sequence[JobSummary]) -> list[JobFigures]:
    """Return the figures of each of the jobs under ``root``, in order."""
    return read_each(root, _figures, jobs)


def _figures(job: JobSummary) -> JobFigures:
    store = open_store(job.directory, private=True)
    if job.status.is_active:
        progress = read_progress(store)
        return JobFigures(rows_per_second=progress.rows_per_second or None) if progress else JobFigures()
    report = _report(store)
    if report.get("status") != str(job.status):
        return JobFigures()
    rows, seconds = report.get("rows"), report.get("seconds")
    rejected = rows.get("rejected") if isinstance(rows, Mapping) else None
    total = seconds.get("total") if isinstance(seconds, Mapping) else None
    return JobFigures(rejected, total, report.get("rows_per_second") or None, report.get("peak_memory") or None)


def _report(store: Store) -> Mapping[str, Any]:
    try:
        report = json.loads(store.read(layout.REPORT_FILE))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, Mapping) else {}
