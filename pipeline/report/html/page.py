"""Make the HTML report of a job: one file, for a browser, a mail or a printer."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jinja2

from pipeline.common.rows import RowCounts
from pipeline.common.secrets import redact, redact_values
from pipeline.common.sketch import Sketches, sample_every
from pipeline.common.units import format_bytes, format_count, format_seconds
from pipeline.errors import StepFailed, TooManyRejects
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.receipts import Receipt
from pipeline.report.distributions import score_columns, sketches_of
from pipeline.report.html import charts
from pipeline.report.html.charts import Chart
from pipeline.report.html.distributions import distribution_rows
from pipeline.report.html.spans import Span, Spans, receipts_of
from pipeline.report.rejects import RejectSummary, summarise
from pipeline.report.report import Report
from pipeline.spec.document import dump_text

SHOWN_FILES = 50
SHOWN_EVENTS = 80
EXAMPLES = 3
"""Examples of each reason of rejected rows."""
_LIBRARIES = ("dask", "distributed", "pandas", "pyarrow", "numpy", "xgboost-cpu", "xgboost")
_WITH_EXAMPLES = (TooManyRejects.__name__, StepFailed.__name__)
"""Errors that quote the first rejected rows."""
_ROUTINE = {"round_started", "device"}
"""Events that the page does not list."""


@dataclass(frozen=True)
class FileRows:
    """Rows of one input file."""

    path: str
    rows: RowCounts


@dataclass(frozen=True)
class Change:
    """A figure of this job beside that of an earlier one."""

    name: str
    before: str
    now: str
    change: str


def report_page(
    job: JobDirectory,
    report: Report,
    *,
    ledger: Ledger | None = None,
    before: Report | None = None,
    sketches: Sketches | None = None,
    baseline: Sketches | None = None,
    shows_values: bool = False,
) -> str:
    """Return the HTML report of a finished or unfinished job.

    :param ledger: ledger of a job without children, if already read.
    :param before: report of an earlier job, to compare with.
    :param sketches: distributions of the job's columns, if already read.
    :param baseline: distributions of the earlier job.
    :param shows_values: True: examples of rejected rows have their messages and values. They may be personal.
    """
    sketches = sketches if sketches is not None else sketches_of(job, ledger)
    is_one = not job.record.children and not job.record.stages
    ledger = (ledger if ledger is not None else job.ledger()) if is_one else None
    spans, files = _spans_and_files(receipts_of(job, ledger), besides=job.root if job.record.stages else "")
    events = job.events.read()
    rejects = summarise(job, ledger=ledger, examples=EXAMPLES) if report.rows.rejected else None
    return _template().render(
        report=report,
        verdict=_verdict(report),
        why=_why(report, shows_values=shows_values),
        rows=_rows_chart(report),
        charts=_charts(report, spans, events),
        files=files[:SHOWN_FILES],
        files_left_out=max(0, len(files) - SHOWN_FILES),
        rejects=rejects,
        shows_values=shows_values,
        examples=_examples(rejects, shows_values=shows_values),
        changes=_changes(report, before) if before is not None else (),
        before=before,
        events=_events(events),
        distributions=distribution_rows(sketches, score_columns(job), baseline=baseline),
        baseline=baseline,
        sampled=sample_every(job.plan.rows),
        output=_output(job, report),
        spec=dump_text(redact_values(job.plan.spec.to_dict())),
        facts=_facts(report, job),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
    )


def write_page(
    job: JobDirectory, report: Report, *, ledger: Ledger | None = None, sketches: Sketches | None = None
) -> None:
    """Write ``report.html`` of a job beside its ``report.json``."""
    shows_values = job.plan.spec.report.show_values
    page = report_page(job, report, ledger=ledger, sketches=sketches, shows_values=shows_values)
    job.store.replace(layout.REPORT_PAGE, page.encode())


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report.html", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": format_count,
        "exact": lambda value: f"{value:,}",
        "bytes": format_bytes,
        "seconds": format_seconds,
        "short": lambda value: f"{value:.4g}",
    }
    return environment.get_template("page.html.j2")


def _verdict(report: Report) -> tuple[str, str]:
    """Return the class of the page's colour, and a sentence."""
    rows = report.rows
    if report.ok and not rows.rejected and not report.quarantined_files:
        return "good", f"All {rows.output:,} rows were scored and published, each once."
    if report.ok:
        parts = [f"{rows.output:,} rows were scored and published"]
        parts += [f"{rows.rejected:,} were rejected"] if rows.rejected else []
        parts += [f"{len(report.quarantined_files):,} files were quarantined"] if report.quarantined_files else []
        return "warned", ", ".join(parts) + "."
    done = f"{report.partitions.done:,} of {report.partitions.planned:,} partitions are done and kept."
    if report.error is not None:
        return "bad", f"{report.error.message}. {done}"
    return "open", f"{report.reason + '. ' if report.reason else ''}{done}"


def _why(report: Report, *, shows_values: bool) -> list[tuple[str, str]]:
    """Return names and texts of the error that ended the job; without ``shows_values`` none of a rejected row."""
    error = report.error
    if error is None:
        return []
    found = error.found
    if error.kind in _WITH_EXAMPLES and not shows_values:
        reasons = ", ".join(f"{count:,} × {reason}" for reason, count in report.reasons.items())
        found = f"{report.rows.rejected:,} of {report.rows.output + report.rows.rejected:,} rows: {reasons}"
    texts = ("error", error.message), ("where", error.where), ("found", found), ("expected", error.expected)
    return [(name, text) for name, text in (*texts, ("next", error.next)) if text]


def _rows_chart(report: Report) -> Chart:
    rows = report.rows
    parts = [
        (name, float(value), f"{value:,}")
        for name, value in (("output", rows.output), ("rejected", rows.rejected), ("filtered", rows.filtered))
    ]
    return charts.shares(f"{rows.input:,} rows in", "rows", parts, name="rows")


def _charts(report: Report, spans: Spans, events: Sequence[Mapping[str, Any]]) -> list[Chart]:
    drawn = []
    if spans.parts:
        drawn = [charts.throughput(spans, _marks(events)), charts.timeline(spans), charts.durations(spans)]
    phases = [(name.replace("_", " "), value, format_seconds(value)) for name, value in report.seconds.phases.items()]
    if any(value for _, value, _ in phases):
        drawn.append(charts.shares("Where time went", "seconds, summed over partitions", phases, name="phases"))
    return [*drawn, charts.memory(spans)] if any(part.peak_memory for part in spans.parts) else drawn


def _marks(events: Iterable[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """Return time and text of what may have slowed a job."""
    chosen = (event for event in events if event["event"] in ("partition", "straggler", "batch", "round", "driver"))
    return [(_epoch(event), _event_text(event)) for event in chosen][:200]


def _epoch(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(str(event["time"])).timestamp()


def _event_text(event: Mapping[str, Any]) -> str:
    fields = {name: value for name, value in event.items() if name not in ("time", "event", "epoch", "pid")}
    if event["event"] == "status":
        reason = f": {event['reason']}" if event.get("reason") else ""
        return redact(f"{event.get('after')}{reason}")
    parts = ", ".join(f"{name} {value}" for name, value in fields.items() if value not in ("", None, 0, [], {}))
    return redact(f"{event['event'].replace('_', ' ')}: {parts}")


def _events(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return time and text of the last events."""
    chosen = [event for event in events if event["event"] not in _ROUTINE]
    return [(str(event["time"])[:19].replace("T", " "), _event_text(event)) for event in chosen[-SHOWN_EVENTS:]]


def _spans_and_files(receipts: Iterable[Receipt], *, besides: str = "") -> tuple[Spans, list[FileRows]]:
    """Return the spans, and the rows of each input file, those with most rejected rows first.

    One pass: each receipt is read from a file, and there may be too many for memory.

    :param besides: folder whose files are no input: those that a stage reads of the one before.
    """
    spans: list[Span] = []
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for receipt in receipts:
        if (span := Span.of(receipt)) is not None:
            spans.append(span)
        for part in receipt.files:
            if besides and part.path.startswith(f"{besides}/"):
                continue
            total = sums[part.path]
            total[0] += part.rows.input
            total[1] += part.rows.output
            total[2] += part.rows.rejected
            total[3] += part.rows.filtered
    files = [FileRows(redact(path), RowCounts(*counts)) for path, counts in sums.items()]
    return Spans.of(spans), sorted(files, key=lambda file: (-file.rows.rejected, file.path))


def _examples(rejects: RejectSummary | None, *, shows_values: bool) -> list[tuple[str, int, list[tuple[str, ...]]]]:
    """Return reason, count and examples: file and row, and with ``shows_values`` message and values."""
    found = []
    for group in rejects.groups if rejects else ():
        examples: list[tuple[str, ...]] = []
        for example in group.examples:
            place = (redact(example.file), f"{example.row:,}")
            values = ", ".join(f"{name}={value!r}" for name, value in example.values.items())
            examples.append((*place, example.message, values) if shows_values else place)
        found.append((group.reason, group.count, examples))
    return found


def _output(job: JobDirectory, report: Report) -> dict[str, Any]:
    """Return number, rows and bytes of the published files, and the first of them."""
    if not report.published or job.record.children:
        return {}
    manifest = job.manifests.find(report.published)
    if manifest is None:
        return {}
    return {
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files),
        "shown": manifest.files[:SHOWN_FILES],
        "left_out": max(0, len(manifest.files) - SHOWN_FILES),
    }


def _changes(report: Report, before: Report) -> list[Change]:
    pairs = [
        ("status", str(before.status), str(report.status)),
        ("model", str(before.model), str(report.model)),
    ]
    changes = [Change(name, old, new, "" if old == new else "changed") for name, old, new in pairs]
    figures = [
        ("rows in", before.rows.input, report.rows.input, format_count),
        ("rows out", before.rows.output, report.rows.output, format_count),
        ("rejected", before.rows.rejected, report.rows.rejected, format_count),
        ("filtered", before.rows.filtered, report.rows.filtered, format_count),
        ("rows per second", before.rows_per_second, report.rows_per_second, format_count),
        ("time", before.seconds.total, report.seconds.total, format_seconds),
        ("waiting for workers", before.seconds.provision, report.seconds.provision, format_seconds),
        ("partitions", before.partitions.planned, report.partitions.planned, format_count),
        ("retries", before.retries, report.retries, format_count),
    ]
    for name, old, new, text in figures:
        ratio = f"{new / old - 1:+.1%}" if old and new != old else ("" if new == old else "new")
        changes.append(Change(name, text(old), text(new), ratio))
    return changes


def _facts(report: Report, job: JobDirectory) -> list[tuple[str, str]]:
    """Return names and values of what made the result."""
    facts = [
        ("model", str(report.model)),
        ("SHA-256 of the model", report.model.digest),
        *([("budget", report.budget.text())] if report.budget else []),
        *((f"code of {name}", digest) for name, digest in report.step_code.items()),
        ("plan", job.record.plan),
        ("created", job.record.created),
        ("directory", redact(job.root)),
        ("output", redact(report.output)),
        ("Python", f"{platform.python_version()} on {platform.machine()} (of the process that wrote this page)"),
        ("libraries", ", ".join(_versions())),
    ]
    return [(name, value) for name, value in facts if value]


def _versions() -> list[str]:
    found = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
