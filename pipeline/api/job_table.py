"""`JobTable`: a list of jobs as a DataFrame, with a card in notebooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from html import escape
from typing import Any

import pandas as pd

from pipeline.common.html import Tone, card_color, html_card
from pipeline.common.units import format_bytes, format_count, format_seconds, iso_time, plural
from pipeline.errors import SpecError
from pipeline.jobs.listing import JobSummary
from pipeline.jobs.status import Status
from pipeline.report.job_figures import JobFigures

SHOWN = 30
"""Jobs on a card."""


class JobTable(pd.DataFrame):
    """The jobs of a directory. What is selected or computed from it is a plain DataFrame."""

    @property
    def _constructor(self) -> Callable[..., pd.DataFrame]:
        return pd.DataFrame

    def _repr_html_(self) -> str:
        """Return the newest jobs as a card, with a bar for the rows per second."""
        fastest = self["rows_per_second"].max()
        header = "".join(f"<th>{name}</th>" for name in _HEADER)
        rows = [_html_row(job, fastest) for job in self.head(SHOWN).to_dict("records")]
        more = f"<div>and {len(self) - SHOWN:,} more</div>" if len(self) > SHOWN else ""
        table = f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        return html_card(plural(len(self), "job"), table + more)


_HEADER = ("job", "status", "age", "duration", "rows", "rejected", "rows/s", "", "memory", "done")


def job_table(jobs: Sequence[JobSummary], figures: Sequence[JobFigures], *, now: datetime) -> JobTable:
    """Return the table of some jobs.

    :param figures: figures of each job.
    :param now: UTC.
    """
    rows = [_row(job, found, now) for job, found in zip(jobs, figures, strict=True)]
    columns: dict[str, Any] = {name: [row[place] for row in rows] for place, name in enumerate(_TYPES)}
    return JobTable({name: pd.Series(columns[name], dtype=kind) for name, kind in _TYPES.items()})


_TYPES = {
    "id": "object",
    "name": "object",
    "status": "object",
    "created": "datetime64[ns, UTC]",
    "age": "timedelta64[ns]",
    "duration": "timedelta64[ns]",
    "rows": "int64",
    "rejected": "Int64",
    "rows_per_second": "float64",
    "peak_memory": "Int64",
    "partitions": "int64",
    "done": "int64",
    "model": "object",
    "output": "object",
}


def _row(job: JobSummary, figures: JobFigures, now: datetime) -> tuple[Any, ...]:
    record = job.record
    return (
        record.job,
        record.name,
        str(job.status),
        pd.to_datetime(record.created, utc=True, errors="coerce"),
        pd.Timedelta(seconds=round(job.age(now))),
        pd.NaT if figures.seconds is None else pd.Timedelta(seconds=figures.seconds),
        record.rows,
        figures.rejected,
        figures.rows_per_second,
        figures.peak_memory,
        job.planned,
        job.done,
        record.model.get("version", ""),
        record.sink,
    )


def _html_row(job: dict[Any, Any], fastest: float) -> str:
    status, rate = Status(job["status"]), job["rows_per_second"]
    tone: Tone = (
        "good" if status is Status.SUCCEEDED else "warn" if status.is_success else "busy" if status.is_active else "bad"
    )
    share = 0.0 if pd.isna(rate) or not fastest > 0 else rate / fastest
    bar = f'<div class="dbp-bar" style="width:6em"><div style="width:{100 * share:.0f}%"></div></div>'
    cells = (
        escape(str(job["id"])),
        f'<span style="color:{card_color(tone)};font-weight:600">{escape(str(status))}</span>',
        _shown(job["age"], lambda age: format_seconds(age.total_seconds())),
        _shown(job["duration"], lambda duration: format_seconds(duration.total_seconds())),
        f"{job['rows']:,}",
        _shown(job["rejected"], "{:,}".format),
        _shown(rate, format_count),
        bar if share else "",
        _shown(job["peak_memory"], lambda size: format_bytes(int(size))),
        f"{job['done']:,} of {job['partitions']:,}",
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _shown(value: Any, text: Callable[[Any], str]) -> str:
    return "–" if pd.isna(value) else text(value)


def since_text(since: str | datetime | timedelta, *, now: datetime) -> str:
    """Return the beginning of a time as records of jobs have it; empty for all times.

    :param since: a time, UTC without a zone, or a span before ``now``.
    :raises SpecError: for anything else.
    """
    if isinstance(since, str) and not since:
        return ""
    try:
        span = _span(since)
        moment = pd.Timestamp(since) if span is None else pd.Timestamp(now) - span  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise SpecError(
            "not a time",
            where="since",
            found=repr(since)[:80],
            expected="a time such as '2026-01-01', a datetime, or a span such as '7d'",
        ) from error
    moment = moment.tz_localize("UTC") if moment.tzinfo is None else moment.tz_convert("UTC")
    return iso_time(moment.to_pydatetime())


def _span(since: str | datetime | timedelta) -> pd.Timedelta | None:
    """Return a span of time; None for a moment."""
    if isinstance(since, datetime):
        return None
    try:
        return pd.Timedelta(since)
    except ValueError:
        return None
