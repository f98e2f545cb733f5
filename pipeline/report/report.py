"""`Report`: the result of a job, as JSON, text and HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

from pipeline.common.html import Tone, html_table
from pipeline.common.rows import QuarantinedFile, RowCounts
from pipeline.common.secrets import MASK, redact_values
from pipeline.common.text import label_line, labelled, next_lines, shortened, table_text
from pipeline.common.units import format_cost, format_count, format_seconds, plural
from pipeline.errors import SpecError
from pipeline.jobs.budget import BudgetUse
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import RoundSummary
from pipeline.jobs.status import Status
from pipeline.models.engines import DEVICE_ENGINE
from pipeline.plan.stages import steps_title
from pipeline.report.distributions import Distribution
from pipeline.report.estimate import EstimateComparison
from pipeline.report.figures import (
    BatchRows,
    DeviceUse,
    EngineEvidence,
    JobError,
    JobTimings,
    ModelId,
    PartitionCounts,
    RunningFigures,
    ShadowUse,
    Skew,
    StageReport,
    StragglerCounts,
    rounds_text,
)
from pipeline.report.gate import GateResult

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.execution.graph import DaskFrame
    from pipeline.report.verify import Verification

SCHEMA_VERSION = 1
SHOWN_CHILDREN = 60
"""Children of a fan-out shown in a summary."""
_OPTIONAL = (
    "input",
    "step_code",
    "device",
    "devices",
    "shadows",
    "model_loads",
    "peak_memory",
    "distributions",
    "culprit",
    "running",
    "stages",
    "gate",
    "budget",
)
"""Fields that are left out of JSON while they are empty."""
SHOWN_REASONS = 4
"""Most frequent reasons of rejected rows shown in a summary."""


@dataclass(frozen=True)
class ChildReport:
    """A short result of one child of a fan-out."""

    job: str
    value: str | int | float | bool | None
    status: Status
    reason: str
    """Reason for the status, if the child did not succeed."""
    rows: RowCounts
    partitions: PartitionCounts
    retries: int
    output: str

    @classmethod
    def from_report(cls, value: str | int | float | bool | None, report: Report) -> Self:
        """Copy the figures that a parent's report repeats from the child's report."""
        names = [field.name for field in fields(cls) if field.name != "value"]
        return cls(value=value, **{name: getattr(report, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON output."""
        return {**asdict(self), "status": str(self.status), "rows": self.rows.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(
            **{
                **record,
                "status": Status(record["status"]),
                "rows": RowCounts.from_dict(record["rows"]),
                "partitions": PartitionCounts(**record["partitions"]),
            }
        )


@dataclass(frozen=True, repr=False)
class Report:
    """The result of a job. ``report.json`` holds it."""

    job: str
    name: str
    status: Status
    reason: str
    """Reason for the status, if the job did not succeed."""
    rows: RowCounts
    model: ModelId
    output: str
    """Path or URL of the sink."""
    directory: str
    seconds: JobTimings
    partitions: PartitionCounts
    skew: Skew
    retries: int
    """Attempts at partitions that were repeated."""
    batch: BatchRows | None
    """None for a fan-out."""
    stragglers: StragglerCounts | None
    """None for a fan-out."""
    reasons: dict[str, int]
    """Rejected rows per reason, most frequent first."""
    published: int | None = None
    """Number of the manifest of the output; None before the first publication."""
    rounds: tuple[RoundSummary, ...] = ()
    """Each round after the first."""
    quarantined_files: tuple[QuarantinedFile, ...] = ()
    """Input files that are quarantined. No count includes their rows."""
    engines: EngineEvidence | None = None
    """Engine that evaluated the model; None before the first partition is done, and for a fan-out."""
    estimate: EstimateComparison | None = None
    """The estimate of a probe and the actual figures; None without a probe."""
    warnings: tuple[str, ...] = ()
    children: tuple[ChildReport, ...] = ()
    """Children of a fan-out. The other figures are then sums over all children."""
    error: JobError | None = None
    """Error that failed the job."""
    next: tuple[str, ...] = ()
    """Commands to type next."""
    input: str = ""
    """Part of the source that an incremental job scored. For other jobs empty, and left out of JSON."""
    step_code: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the code of each step module. Without steps empty, and left out of JSON."""
    device: str = ""
    """Device that was requested, and why no GPU is used. Empty if nobody asked, and left out of JSON."""
    devices: tuple[DeviceUse, ...] = ()
    """GPUs that scored rows. Without any, left out of JSON."""
    shadows: tuple[ShadowUse, ...] = ()
    """Challengers (``score.shadow``). Without any, left out of JSON."""
    model_loads: int = 0
    """Loads of models by key (``score.by``) into memory. Without any, left out of JSON."""
    peak_memory: int = 0
    """Largest resident memory of a worker process in bytes. If unknown 0, and left out of JSON."""
    distributions: tuple[Distribution, ...] = ()
    """Distributions of scores and features, the scores first. Without any, left out of JSON."""
    stages: tuple[StageReport, ...] = ()
    """Stages of a job with checkpoints between its steps, as far as they are planned. Without any, left out of JSON."""
    gate: GateResult | None = None
    """Result of the publish gate. Without one, left out of JSON."""

    budget: BudgetUse | None = None
    """Limits of the whole job, and what is spent of them. Without any, left out of JSON."""

    culprit: str = ""
    """Partition that failed the job, with its input rows. Empty without one, and left out of JSON."""
    running: RunningFigures | None = None
    """Figures of the driver that runs now. Without one, left out of JSON."""

    @property
    def ok(self) -> bool:
        """True if the job succeeded, with or without warnings."""
        return self.status.is_success

    @property
    def rows_per_second(self) -> float:
        """Input rows / wall time of all drivers; for a running job, that of its driver."""
        if self.running is not None:
            return self.running.rows_per_second
        return self.rows.input / self.seconds.total if self.seconds.total > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Its form in ``report.json`` and with ``--json``. Secrets are masked."""
        record = {name: value for name, value in asdict(self).items() if name not in _OPTIONAL or value}
        record |= {
            "status": str(self.status),
            "model": self.model.to_dict(),
            "rows": self.rows.to_dict(),
            "batch": asdict(self.batch) if self.batch else {},
            "stragglers": asdict(self.stragglers) if self.stragglers else {},
            "rounds": [summary.to_dict() for summary in self.rounds],
            "quarantined_files": [asdict(file) for file in self.quarantined_files],
            "engines": self.engines.to_dict() if self.engines else {},
            "estimate": self.estimate.to_dict() if self.estimate else {},
            "warnings": list(self.warnings),
            "children": [child.to_dict() for child in self.children],
            "error": self.error.to_dict() if self.error else None,
            "next": list(self.next),
            **({"devices": [asdict(device) for device in self.devices]} if self.devices else {}),
            **({"shadows": [asdict(shadow) for shadow in self.shadows]} if self.shadows else {}),
            **({"gate": self.gate.to_dict()} if self.gate else {}),
            **({"budget": self.budget.to_dict()} if self.budget else {}),
            **({"distributions": [asdict(one) for one in self.distributions]} if self.distributions else {}),
            **({"stages": [stage.to_dict() for stage in self.stages]} if self.stages else {}),
            "rows_per_second": round(self.rows_per_second, 1),
        }
        return {"schema_version": SCHEMA_VERSION, **redact_values(record)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`, such as for a stored ``report.json``.

        Masked secrets stay masked. If the path of the job has one, `frame` and all else that reads the job's files
        raise `SpecError`.

        :raises KeyError: or TypeError or ValueError, when ``record`` is not a report.
        """
        plain = {name: value for name, value in record.items() if name not in ("schema_version", "rows_per_second")}
        return cls(
            **{
                **plain,
                "status": Status(record["status"]),
                "rows": RowCounts.from_dict(record["rows"]),
                "model": ModelId(**record["model"]),
                "seconds": JobTimings(**record["seconds"]),
                "partitions": PartitionCounts(**record["partitions"]),
                "skew": Skew(**record["skew"]),
                "batch": BatchRows(**record["batch"]) if record["batch"] else None,
                "stragglers": StragglerCounts(**record["stragglers"]) if record["stragglers"] else None,
                "rounds": tuple(map(_round_summary, record["rounds"])),
                "quarantined_files": tuple(map(QuarantinedFile.from_dict, record["quarantined_files"])),
                "engines": EngineEvidence.from_dict(record["engines"]) if record["engines"] else None,
                "estimate": EstimateComparison.from_dict(record["estimate"]) if record["estimate"] else None,
                "warnings": tuple(record["warnings"]),
                "children": tuple(map(ChildReport.from_dict, record["children"])),
                "error": JobError(**record["error"]) if record["error"] else None,
                "next": tuple(record["next"]),
                "devices": tuple(DeviceUse(**device) for device in record.get("devices", ())),
                "running": RunningFigures(**record["running"]) if record.get("running") else None,
                "shadows": tuple(map(ShadowUse.from_dict, record.get("shadows", ()))),
                "gate": GateResult.from_dict(record["gate"]) if record.get("gate") else None,
                "budget": BudgetUse.from_dict(record["budget"]) if record.get("budget") else None,
                "distributions": tuple(map(Distribution.from_dict, record.get("distributions", ()))),
                "stages": tuple(map(StageReport.from_dict, record.get("stages", ()))),
            }
        )

    def text(self) -> str:
        """The text that ``python -m pipeline run`` prints."""
        return summary_text(self)

    def frame(self) -> pd.DataFrame:
        """Read the published rows of the job into a pandas DataFrame, in source order.

        Only the files of this job are read, not what other jobs appended to the same path.

        Raises
        ------
        OutputConflict
            If another job has replaced the output.

        Examples
        --------
        >>> report = pipeline.attach("@last").report()
        >>> list(report.frame().columns)
        ['customer_id', 'country', 'plan', 'monthly_charges', 'last_login', 'churn']
        """
        from pipeline.report.output import output_frame

        return output_frame(self._open())

    def to_dask(self) -> DaskFrame:
        """Return the published rows of the job as a lazy Dask DataFrame, one Dask partition per file.

        Only the files of this job are read, not what other jobs appended to the same path.

        Raises
        ------
        OutputConflict
            If another job has replaced the output.

        See Also
        --------
        Job.to_dask : The rows of a job that has not run.
        """
        from pipeline.report.output import output_dask

        return output_dask(self._open())

    def rejects(self) -> pd.DataFrame:
        """Return the rows that could not be scored.

        Returns
        -------
        pandas.DataFrame
            Columns of the source, and ``_file``, ``_row``, ``_reason``, ``_message``.

        Examples
        --------
        >>> rejects = pipeline.attach("@last").report().rejects()
        >>> len(rejects)
        48
        """
        from pipeline.report.rejects import rejects_frame

        return rejects_frame(self._open())

    def verify(self, *, sample: int = 1000, seed: int | None = None, call_services: bool = False) -> Verification:
        """Prove from the receipts and the data that every row was scored once. This report is not used.

        Parameters
        ----------
        sample : int, default 1000
            Input rows to score again and compare bit by bit.
        seed : int, optional
            Seed of the sample. Default: another sample each time.
        call_services : bool, default False
            Score the sample again also where a service scores, which costs.

        See Also
        --------
        verify : The same by the id of a job.
        """
        from pipeline.report.verify import verify

        return verify(self._open(), sample=sample, seed=seed, call_services=call_services)

    def _open(self) -> JobDirectory:
        if MASK in self.directory:
            raise SpecError(
                "this report was read from JSON, where a part of the path of its job is masked",
                where="directory",
                found=self.directory,
                expected="the path of the job's directory",
                next_step='pipeline.attach("<job id or directory>").report()',
            )
        return JobDirectory.open(self.directory)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<Report {self.job}: {self.status}, {self.rows.equation()}>"

    def _repr_html_(self) -> str:
        fields = [*_fields(self).items(), *(("warning", text) for text in self.warnings)]
        fields += [("children", _child_counts(self))] if self.children else []
        steps = [("next", step) for step in _next_steps(self)]
        return html_table(f"{self.status}  {self.job}", [*fields, *steps], tone=_tone(Status(self.status)))


def _tone(status: Status) -> Tone:
    """Return the color of a status."""
    if status.is_success:
        return "good" if status is Status.SUCCEEDED else "warn"
    return "bad" if status.is_final else "busy"


def _round_summary(record: Mapping[str, Any]) -> RoundSummary:
    changes, rows = tuple(record["changes"]), RowCounts.from_dict(record["rows"])
    return RoundSummary(**{**record, "changes": changes, "rows": rows})


def summary_text(report: Report) -> str:
    """Return at most one screen of text about a finished or unfinished job."""
    lines = [f"{report.status}  {report.job}", *labelled(_fields(report)), *_stage_lines(report)]
    lines += _child_lines(report)
    lines += [label_line("warning", text) for text in report.warnings]
    return "\n".join([*lines, *next_lines(_next_steps(report))])


def _next_steps(report: Report) -> tuple[str, ...]:
    """Return the next step of the error, then the commands."""
    step = report.error.next if report.error else ""
    return (step, *report.next) if step and step not in report.next else report.next


def _fields(report: Report) -> dict[str, str]:
    """Return the lines of a summary by label. Empty lines are not shown."""
    return {
        "error": report.error.message if report.error else "",
        "where": report.error.where if report.error else "",
        "found": report.error.found if report.error else "",
        "expected": report.error.expected if report.error else "",
        "culprit": report.culprit,
        "reason": "" if report.error or report.status.is_active else report.reason,
        "rows": report.rows.equation(),
        "input": report.input,
        "done": _done(report),
        "rejects": _reasons(report.reasons),
        "retried": rounds_text(report.rounds),
        "speed": _speed(report),
        "time": _times(report.seconds),
        "balance": _balance(report),
        "batch": _batch(report.batch) if report.batch else "",
        "model": str(report.model),
        "rounds": report.model.rounds,
        "engine": _engine(report.engines) if report.engines else "",
        "service": service_text(report.engines.use.usage) if report.engines else "",
        "budget": report.budget.text() if report.budget else "",
        "shadow": "; ".join(shadow.text() for shadow in report.shadows),
        "scores": "; ".join(one.text() for one in report.distributions if one.is_score),
        "gate": report.gate.text() if report.gate else "",
        "loads": f"models by key were loaded {report.model_loads:,} times" if report.model_loads else "",
        "device": _devices(report) or report.device,
        "estimate": str(report.estimate) if report.estimate else "",
        "workers": f"{report.running.workers:,}" if report.running and report.running.workers else "",
        "dashboard": report.running.dashboard if report.running else "",
        "output": _published(report),
        "directory": report.directory,
    }


def _stage_lines(report: Report) -> list[str]:
    """Return a table of the stages of a job."""
    if not report.stages:
        return []
    header = ["STAGE", "STATUS", "PARTITIONS", "IN", "OUT", "REJECTED", "FILTERED", "SECONDS"]
    rows = [
        [
            steps_title(stage.steps),
            stage.status,
            f"{stage.done:,} of {stage.planned:,}",
            *(f"{n:,}" for n in (stage.rows.input, stage.rows.output, stage.rows.rejected, stage.rows.filtered)),
            f"{stage.seconds:,.1f}",
        ]
        for stage in report.stages
    ]
    sealed = sum(stage.status == "sealed" for stage in report.stages)
    lines = table_text(header, rows).split("\n")
    return [label_line("stages", f"{sealed} sealed of {len(rows)} planned"), *(f"    {line}" for line in lines)]


def _child_lines(report: Report) -> list[str]:
    """Return a table of the children of a fan-out, unsuccessful children first."""
    if not report.children:
        return []
    children = sorted(report.children, key=lambda child: child.status.is_success)
    header = ["CHILD", "STATUS", "PARTITIONS", "IN", "OUT", "REJECTED", "FILTERED", "RETRIES", "REASON"]
    table = table_text(header, [_child_row(report.job, child) for child in children[:SHOWN_CHILDREN]])
    lines = [label_line("children", _child_counts(report)), *(f"    {line}" for line in table.split("\n"))]
    more = len(children) - SHOWN_CHILDREN
    return lines + ([f"    … and {more:,} more (--json shows all)"] if more > 0 else [])


def _child_counts(report: Report) -> str:
    children = sorted(report.children, key=lambda child: child.status.is_success)
    return ", ".join(f"{count:,} {status}" for status, count in Counter(child.status for child in children).items())


def _child_row(parent: str, child: ChildReport) -> list[str]:
    rows = child.rows
    return [
        child.job.removeprefix(parent),
        str(child.status),
        f"{child.partitions.done:,} of {child.partitions.planned:,}",
        *(f"{count:,}" for count in (rows.input, rows.output, rows.rejected, rows.filtered)),
        f"{child.retries:,}",
        shortened(child.reason, width=60),
    ]


def _done(report: Report) -> str:
    """Return the progress of an unfinished job."""
    if report.ok or not report.partitions.planned:
        return ""
    return f"{report.partitions.done:,} of {report.partitions.planned:,} partitions"


def _published(report: Report) -> str:
    if report.ok:
        return report.output
    if report.published:
        return f"{report.output} (as manifest {report.published} left it)"
    return f"{report.output} (nothing published by this job)"


def _balance(report: Report) -> str:
    done, skew = report.partitions.done, report.skew
    parts = [plural(done, "partition")] if done else []
    parts += [f"largest is {skew.before:.1f} × the mean in files, {skew.after:.1f} × in partitions"]
    parts += [plural(report.retries, "retry")]
    return ", ".join(parts + (_stragglers(report.stragglers) if report.stragglers else []))


def _batch(batch: BatchRows) -> str:
    """Return the rows per batch, if they differ from the plan."""
    if batch.remembered is None and batch.smallest in (None, batch.planned):
        return ""
    started = ""
    if batch.remembered:
        started = f"began with {plural(batch.remembered, 'row')}, remembered from an earlier job; "
    ended = f"down to {plural(batch.smallest, 'row')}; " if batch.smallest else ""
    return f"{started}{ended}planned were {format_count(batch.planned)}"


def _stragglers(counts: StragglerCounts) -> list[str]:
    if not counts.helped:
        return []
    won = f", about {format_seconds(counts.seconds_won)} won" if counts.seconds_won else ""
    return [f"{plural(counts.helped, 'straggler')} helped{won}"]


def _reasons(reasons: Mapping[str, int]) -> str:
    frequent = sorted(reasons.items(), key=lambda pair: -pair[1])
    text = ", ".join(f"{count:,} × {reason}" for reason, count in frequent[:SHOWN_REASONS])
    more = len(frequent) - SHOWN_REASONS
    return f"{text}, and {plural(more, 'more reason')}" if more > 0 else text


def _speed(report: Report) -> str:
    if report.running is not None:
        return report.running.speed()
    rate, total, waited = report.rows_per_second, report.seconds.total, report.seconds.provision
    parts = [f"{format_count(rate)} rows/s"] if rate else []
    parts += [f"{format_seconds(total)} in all"] if total else []
    parts += [f"{format_seconds(waited)} of it waiting for workers"] if waited else []
    return ", ".join(parts)


def _times(seconds: JobTimings) -> str:
    """Return the seconds of each phase that took at least 0.005 s."""
    parts = [
        f"{name.replace('_', ' ')} {format_seconds(value)}" for name, value in seconds.phases.items() if value >= 0.005
    ]
    return ", ".join(parts) + " (summed over partitions)" if parts else ""


def _engine(engines: EngineEvidence) -> str:
    """Return the engine that evaluated the model, and the result of comparing both engines."""
    use = engines.use
    if not any(use.rows.values()):
        return ""
    speed = (
        f" {use.speedup:.1f} × {use.libraries}'s predictor on {use.timed_rows:,} timed rows" if use.timed_rows else ""
    )
    library = DEVICE_ENGINE if use.device_rows else use.libraries
    parts = [f"trees{speed}" if use.rows.get("trees") else f"{library}; trees{speed}" if speed else library]
    if use.mismatches:
        parts += [f"different on {use.mismatches:,} of {use.compared_rows:,} compared rows"]
    elif use.compared_rows:
        near = f"within {engines.tolerance:g}" if engines.tolerance else "bit-equal"
        parts += [f"{near} on all {use.compared_rows:,} compared rows"]
    tokens, padded = use.usage.get("tokens", 0), use.usage.get("padded_tokens", 0)
    if tokens:
        parts += [f"{tokens:,.0f} tokens and {padded / tokens:.0%} of padding"]
    return ", ".join(parts)


def service_text(usage: Mapping[str, float]) -> str:
    """Return requests, tokens and cost of services; empty without any."""
    if not usage.get("calls") and not usage.get("reused_answers"):
        return ""
    calls, failed, kept = (usage.get(name, 0.0) for name in ("calls", "failed_calls", "reused_answers"))
    parts = [f"{calls:,.0f} requests" + (f", {failed:,.0f} of them sent again" if failed else "")]
    if kept:
        parts += [f"{kept:,.0f} answers kept from attempts that died"]
    cached = usage.get("cached_tokens", 0.0)
    parts += [f"{usage.get('prompt_tokens', 0.0):,.0f} tokens in" + (f" ({cached:,.0f} cached)" if cached else "")]
    parts += [f"{usage.get('completion_tokens', 0.0):,.0f} tokens out"]
    return ", ".join(parts) + (f", cost {format_cost(usage['cost'])}" if usage.get("cost") else "")


def _devices(report: Report) -> str:
    """Return the GPUs by name, with their rows and those of CPUs; empty without GPUs."""
    if not report.devices or report.engines is None:
        return ""
    names = Counter(device.name for device in report.devices)
    rows = sum(device.rows for device in report.devices)
    cards = ", ".join(f"{count} × {name}" for name, count in sorted(names.items()))
    others = sum(report.engines.use.rows.values()) - rows
    return f"{rows:,} rows on {cards}" + (f"; {others:,} rows on CPUs" if others > 0 else "")
