"""Make the report of a job from its directory, and decide whether it succeeded.

All figures come from the plan, the receipts and the events. Nothing is measured here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any

from pipeline.common.agreement import BUCKETS, Agreement
from pipeline.common.reasons import Reason
from pipeline.common.rows import QuarantinedFile, RowCounts
from pipeline.common.sketch import Sketches
from pipeline.common.step_code import digests_of
from pipeline.common.units import format_count, plural, utc_now
from pipeline.errors import PipelineError, StepFailed, TooManyRejects
from pipeline.events import AttemptOutcome, MitigationAction, SplitReason
from pipeline.jobs.budget import read_budget
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import has_ended, read_lease
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.progress_file import read_progress
from pipeline.jobs.receipts import DeviceTotals, Timings, Totals
from pipeline.jobs.rounds import STEP_EVENT, Round, RoundReason
from pipeline.jobs.status import Status
from pipeline.models.engines import EngineUse
from pipeline.models.options import promise_warning, rounds_text, unused_rounds_warning
from pipeline.models.registry.alias_watch import alias_change_warnings
from pipeline.plan.describe import input_text, skew
from pipeline.plan.plan import Plan
from pipeline.plan.recipe import AnyScore
from pipeline.report.distributions import distributions_of, score_columns, sketches_of
from pipeline.report.estimate import compare_with_actual
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
    StragglerCounts,
)
from pipeline.report.gate import read_gate
from pipeline.report.report import ChildReport, Report
from pipeline.report.stages import ChainResult

_SHOWN_REASONS = 3
_SHOWN_FRAGMENTS = 3


def status_for(rows: RowCounts, *, max_fraction: float, max_rows: int | None = None) -> Status:
    """Return the final status of a job whose partitions are all done, from its rejected rows.

    Filtered rows do not count: a filter that drops nearly all rows must not make bad rows look rare.
    """
    if rows.rejected == 0:
        return Status.SUCCEEDED
    within = rows.rejected <= max_fraction * wanted_rows(rows)
    if max_rows is not None:
        within = rows.rejected <= max_rows and (within or not max_fraction)
    return Status.SUCCEEDED_WITH_WARNINGS if within else Status.FAILED


def wanted_rows(rows: RowCounts) -> int:
    """Return the number of rows to be scored: output rows and rejected rows."""
    return rows.output + rows.rejected


def decide_status(ledger: Ledger, *, job: str, examples: Mapping[str, str] | None = None) -> Status:
    """Return the status that a job whose partitions are all done gets once it is published.

    :param examples: the first rejected row per reason, as text; see `pipeline.report.rejects.first_examples`.
    :raises TooManyRejects: or StepFailed, if more rows were rejected than the limits of ``errors`` allow.
    """
    rows, errors = ledger.rows, ledger.last.plan.spec.errors
    limits: dict[str, Any] = {"max_fraction": errors.max_fraction, "max_rows": errors.max_rows}
    status = status_for(rows, **limits)
    if status is Status.FAILED:
        raise too_many_rejects(rows, **limits, reasons=ledger.reasons, job=job, examples=examples)
    return Status.SUCCEEDED_WITH_WARNINGS if ledger.quarantined_files else status


def too_many_rejects(
    rows: RowCounts,
    *,
    max_fraction: float,
    max_rows: int | None = None,
    reasons: Mapping[str, int],
    job: str,
    examples: Mapping[str, str] | None = None,
) -> PipelineError:
    """Build the error for a job that `decide_status` fails.

    `StepFailed` if a step or the model caused more than half of the rejects, else `TooManyRejects`.

    :param examples: the first rejected row per reason, as text.
    """
    by_code = sum(count for reason, count in reasons.items() if Reason.parse(reason).kind.is_user_code)
    kind = StepFailed if 2 * by_code > sum(reasons.values()) else TooManyRejects
    top = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [
        f"{format_count(count)} {reason}" + (f" ({examples[reason]})" if examples and reason in examples else "")
        for reason, count in top[:_SHOWN_REASONS]
    ]
    more = f"; {plural(len(top) - _SHOWN_REASONS, 'more reason')}" if len(top) > _SHOWN_REASONS else ""
    return kind(
        "too many rows were rejected; nothing was published",
        where=f"job {job}",
        found=f"{format_count(rows.rejected)} of {format_count(wanted_rows(rows))} rows to be scored "
        f"({_percent(rows.rejected, wanted_rows(rows))}): " + "; ".join(shown) + more,
        expected=" and ".join(_limits(max_fraction, max_rows)),
        next_step=f"python -m pipeline rejects {job}",
    )


def _limits(max_fraction: float, max_rows: int | None) -> list[str]:
    by_rows = [] if max_rows is None else [f"at most {plural(max_rows, 'row')} (errors.max_rows: {max_rows})"]
    if by_rows and not max_fraction:
        return by_rows
    return [f"at most {max_fraction:.4%} (errors.max_fraction: {max_fraction:g})", *by_rows]


def make_report(
    job: JobDirectory,
    *,
    ledger: Ledger | None = None,
    status: Status | None = None,
    seconds: float | None = None,
    retries: int | None = None,
    warnings: Sequence[str] = (),
    error: PipelineError | None = None,
    sketches: Sketches | None = None,
) -> Report:
    """Return the report of a finished or unfinished job, from its directory.

    :param ledger: ledger of the job, if already read. Default: read from the receipts.
    :param status: status of the job. Default: from the events.
    :param seconds: wall time of the running driver; the time of earlier drivers is added. Default: time of all
        drivers, from the events.
    :param retries: repeated attempts. Default: counted in the events.
    :param sketches: distributions of the job's columns, if already read.
    """
    if job.record.children:
        return _sum_children(job, status=status or job.status(), seconds=seconds, warnings=warnings, error=error)
    if job.record.stages:
        return _sum_stages(job, status=status or job.status(), seconds=seconds, warnings=warnings, error=error)
    ledger, events = ledger or job.ledger(), job.events.read()
    plan, totals, rows = ledger.base.plan, ledger.totals, ledger.rows
    status = status or job.status()
    if seconds is None:
        total = _active_seconds(job, events, status, totals)
    else:
        total = active_seconds(before_this(events)) + seconds
    running = running_figures(job, ledger, events) if status.is_active else None
    provision, starts = provision_seconds(events), sum(event["event"] == "driver" for event in events)
    return Report(
        **_common(job, plan, events, status=status, error=error),
        rows=rows,
        running=running,
        culprit=culprit(ledger, events) if status is Status.FAILED else "",
        input=input_text(plan),
        step_code=digests_of(plan.code),
        seconds=job_timings(totals.seconds, total=total, provision=provision),
        partitions=PartitionCounts(done=len(ledger.done), planned=ledger.planned),
        skew=_spread(plan, totals.durations),
        retries=sum(event.get("outcome") == AttemptOutcome.RETRY for event in events) if retries is None else retries,
        batch=batch_rows(plan, totals.smallest_batch, events),
        stragglers=straggler_counts(events),
        reasons=ledger.reasons,
        rounds=ledger.summaries(),
        quarantined_files=ledger.quarantined_files,
        engines=engine_evidence(totals.engine, tolerance=plan.tolerance) if plan.models else None,
        device=device_text(events),
        devices=device_uses(totals.devices, events),
        shadows=shadow_uses(plan, totals.agreements),
        model_loads=totals.model_loads,
        peak_memory=totals.peak_memory,
        gate=read_gate(job) if plan.spec.gate else None,
        distributions=distributions_of(sketches or sketches_of(job, ledger), score_columns(job)),
        estimate=compare_with_actual(job, plan, totals, seconds=total, provision=provision, starts=starts),
        warnings=(*warnings, *_warnings(job, ledger, events)),
        next=_next(
            status,
            job.id,
            has_rejects=rows.rejected > 0 or bool(ledger.quarantined_files),
            is_driven=running is not None,
        ),
    )


def _common(
    job: JobDirectory, plan: Plan, events: Sequence[Mapping[str, Any]], *, status: Status, error: PipelineError | None
) -> dict[str, Any]:
    """Return the fields that a job and a fan-out have in common."""
    return {
        "job": job.id,
        "name": plan.spec.name,
        "status": status,
        "reason": error.message if error else last_reason(events, status),
        "model": _model_id(plan),
        "output": job.resolve(plan.spec.sink.place),
        "directory": job.root,
        "published": _published(job, events),
        "budget": read_budget(job),
        "error": JobError.from_error(error) if error else last_error(events, status),
    }


def shadow_uses(plan: Plan, agreements: Mapping[str, Agreement]) -> tuple[ShadowUse, ...]:
    """Return the agreement of each challenger of a plan, in the order of the steps."""
    found = []
    for step in plan.chain:
        if not isinstance(step, AnyScore) or step.shadow is None:
            continue
        sums = agreements.get(step.outputs[0], Agreement())
        use = ShadowUse(
            column=step.outputs[0],
            other=step.shadow.column,
            rows=sums.rows,
            agreed=sums.agreed if step.shadow.decision else None,
            mean=sums.mean,
            mean_absolute=sums.mean_absolute,
            largest=sums.largest,
            missing=sums.missing,
            errors=sums.errors,
            seconds=round(sums.seconds, 3),
            other_seconds=round(sums.other_seconds, 3),
            histogram=tuple((*divmod(cell, BUCKETS), rows) for cell, rows in sorted(sums.histogram.items())),
        )
        found.append(use)
    return tuple(found)


def _model_id(plan: Plan) -> ModelId:
    """Return the model of a job; of several, names and versions in order; without any, empty texts."""
    found = plan.model_details
    rounds = rounds_text(plan.models[0]) if len(plan.models) == 1 else ""
    return ModelId(found["name"], found["version"], found["digest"], rounds)


def _gate_warning(job: JobDirectory) -> tuple[str, ...]:
    gate = read_gate(job) if job.plan.spec.gate else None
    return (f"gate: {len(gate.failed)} of {len(gate.checks)} checks failed",) if gate and gate.failed else ()


def _warnings(
    job: JobDirectory, ledger: Ledger, events: Sequence[Mapping[str, Any]], *, with_rejects: bool = True
) -> tuple[str, ...]:
    """Return the warnings that receipts, rounds and events give rise to."""
    return (
        *(_reject_warning(ledger.rows) if with_rejects else ()),
        *_gate_warning(job),
        *_file_warning(ledger.quarantined_files),
        *_restart_warnings(job.rounds.all()),
        *alias_change_warnings(events),
        *_step_warnings(events),
        *filter(None, map(unused_rounds_warning, ledger.base.plan.models)),
        *filter(None, map(promise_warning, ledger.base.plan.models)),
        *engine_warnings(ledger.totals.engine),
    )


def _restart_warnings(rounds: Iterable[Round]) -> tuple[str, ...]:
    policies = {RoundReason.ALIAS_CHANGE: "on_alias_change", RoundReason.STEP_CHANGE: "step_change"}
    restarts = [
        (round_.record, policies[round_.reason]) for round_ in rounds if round_.record and round_.reason in policies
    ]
    return tuple(f"the job started over: {', '.join(record.changes)} ({name}: restart)" for record, name in restarts)


def _step_warnings(events: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the warnings about changed code that the job ignored."""
    steps = dict.fromkeys(str(event.get("step")) for event in events if event.get("event") == STEP_EVENT)
    return tuple(
        f"the code of step {step} changed before the job ended: every row was scored with the planned code "
        "(step_change: pin)"
        for step in steps
    )


def _sum_children(
    job: JobDirectory, *, status: Status, seconds: float | None, warnings: Sequence[str], error: PipelineError | None
) -> Report:
    """Return the report of a fan-out: the sum of its children's reports."""
    plan, events = job.plan, job.events.read()
    reports = [make_report(child) for child in job.children()]
    total = active_seconds(events) if seconds is None else active_seconds(before_this(events)) + seconds
    reasons: Counter[str] = Counter()
    for report in reports:
        reasons.update(report.reasons)
    rows = RowCounts.total(report.rows for report in reports)
    phases = {name: sum(report.seconds.phases[name] for report in reports) for name in reports[0].seconds.phases}
    return Report(
        **_common(job, plan, events, status=status, error=error),
        rows=rows,
        seconds=job_timings(phases, total=total, provision=provision_seconds(events)),
        partitions=PartitionCounts(
            done=sum(report.partitions.done for report in reports),
            planned=sum(report.partitions.planned for report in reports),
        ),
        skew=Skew(
            skew([child.rows for child in plan.children]),
            skew([report.rows.input for report in reports]),
            max(report.skew.slowest_seconds for report in reports),
            sum(report.skew.mean_seconds for report in reports) / len(reports),
        ),
        retries=sum(report.retries for report in reports),
        batch=None,
        stragglers=None,
        reasons=dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
        quarantined_files=tuple(file for report in reports for file in report.quarantined_files),
        devices=_sum_devices(reports),
        peak_memory=max((report.peak_memory for report in reports), default=0),
        gate=read_gate(job) if plan.spec.gate else None,
        warnings=(*warnings, *_reject_warning(rows), *_gate_warning(job)),
        children=tuple(
            ChildReport.from_report(child.value, report) for child, report in zip(plan.children, reports, strict=True)
        ),
        next=_next(status, job.id, has_rejects=rows.rejected > 0, is_driven=status.is_active and is_driven(job)),
    )


def _sum_stages(
    job: JobDirectory, *, status: Status, seconds: float | None, warnings: Sequence[str], error: PipelineError | None
) -> Report:
    """Return the report of a job of several stages: rows into the first and out of the last, and sums of the others."""
    plan, chain, own = job.plan, ChainResult.of(job), job.events.read()
    events, totals, rows = chain.events(job), chain.totals, chain.rows
    before = active_seconds(before_this(own))
    total = _active_seconds(job, own, status, totals) if seconds is None else before + seconds
    first = chain.stages[0].ledger if chain.stages else None
    quarantined = first.quarantined_files if first else plan.quarantined_files
    by_stage = [
        text
        for stage in chain.stages
        for text in _warnings(stage.job, stage.ledger, stage.job.events.read(), with_rejects=False)
    ]
    parts = [partition for stage in chain.stages for partition in stage.ledger.base.plan.partitions]
    return Report(
        **_common(job, plan, own, status=status, error=error),
        rows=rows,
        input=input_text(plan),
        step_code=digests_of(plan.code),
        seconds=job_timings(totals.seconds, total=total, provision=provision_seconds(own)),
        partitions=PartitionCounts(done=chain.done, planned=chain.planned),
        skew=replace(_spread(plan, totals.durations), after=round(skew([part.rows for part in parts]), 3)),
        retries=sum(event.get("outcome") == AttemptOutcome.RETRY for event in events),
        batch=None,
        stragglers=straggler_counts(events),
        reasons=chain.reasons,
        rounds=tuple(summary for stage in chain.stages for summary in stage.ledger.summaries()),
        quarantined_files=quarantined,
        engines=engine_evidence(totals.engine, tolerance=plan.tolerance) if plan.models else None,
        device=device_text(events),
        devices=device_uses(totals.devices, events),
        shadows=shadow_uses(plan, totals.agreements),
        model_loads=totals.model_loads,
        peak_memory=totals.peak_memory,
        distributions=distributions_of(sketches_of(job), score_columns(job)),
        estimate=None,
        warnings=tuple(
            dict.fromkeys(
                (*warnings, *_reject_warning(rows), *_gate_warning(job), *by_stage, *alias_change_warnings(own))
            )
        ),
        gate=read_gate(job) if plan.spec.gate else None,
        stages=chain.reports(),
        next=_next(status, job.id, has_rejects=rows.rejected > 0 or bool(quarantined)),
    )


def _spread(plan: Plan, times: Sequence[float]) -> Skew:
    return Skew(
        before=round(skew([file.rows for file in plan.files]), 3),
        after=round(skew([partition.rows for partition in plan.partitions]), 3),
        slowest_seconds=round(max(times, default=0.0), 3),
        mean_seconds=round(sum(times) / len(times), 3) if times else 0.0,
    )


def _reject_warning(rows: RowCounts) -> tuple[str, ...]:
    if not rows.rejected:
        return ()
    were = f"{plural(rows.rejected, 'row')} {'was' if rows.rejected == 1 else 'were'}"
    return (f"{were} rejected ({_percent(rows.rejected, wanted_rows(rows))})",)


def _file_warning(files: Sequence[QuarantinedFile]) -> tuple[str, ...]:
    if not files:
        return ()
    known = [file.rows for file in files if file.rows is not None]
    rows = plural(sum(known), "row") if known else "rows unknown"
    rows += f" in {len(known):,} of them, the others unknown" if known and len(known) < len(files) else ""
    were = f"{plural(len(files), 'input file')} {'was' if len(files) == 1 else 'were'}"
    return (f"{were} quarantined, such as {files[0].path} ({rows}): {files[0].message}",)


def _published(job: JobDirectory, events: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the number of the last published manifest.

    Events of older versions do not contain it; for a successful job it is then the last manifest.
    """
    numbers = [event["manifest"] for event in events if event["event"] == "published" and "manifest" in event]
    if numbers:
        return int(numbers[-1])
    ended_well = any(str(event.get("after", "")).startswith("SUCCEEDED") for event in events)
    return next(reversed(job.manifests.numbers()), None) if ended_well else None


def _percent(part: int, total: int) -> str:
    return f"{part / total:.4%}" if total else "0%"


def _next(status: Status, job: str, *, has_rejects: bool, is_driven: bool = False) -> tuple[str, ...]:
    if is_driven:
        return (f"python -m pipeline watch {job}", f"python -m pipeline cancel {job}")
    rejects = (f"python -m pipeline rejects {job}", f"python -m pipeline retry {job}") if has_rejects else ()
    if status.is_success:
        return (f"python -m pipeline verify {job}", *rejects, f"python -m pipeline status {job}")
    if status is Status.QUEUED:
        return (f"python -m pipeline watch {job}", f"python -m pipeline cancel {job}")
    # The status alone does not show that no driver lives: `watch` does, and says so.
    watch = (f"python -m pipeline watch {job}",) if status.is_active else ()
    logs = (f"python -m pipeline logs {job} --errors",) if status is Status.FAILED else ()
    return (*watch, *logs, *rejects, f"python -m pipeline resume {job}", f"python -m pipeline status {job}")


def job_timings(phases: Timings | Mapping[str, float], *, total: float, provision: float) -> JobTimings:
    """Return the timings, rounded to milliseconds.

    :param phases: sums over all partitions.
    """
    named = phases if isinstance(phases, Mapping) else {name: getattr(phases, name) for name in JobTimings().phases}
    figures = {"total": total, "provision": provision, **named}
    return JobTimings(**{name: round(value, 3) for name, value in figures.items()})


def batch_rows(plan: Plan, smallest: int | None, events: Iterable[Mapping[str, Any]]) -> BatchRows:
    """Return the rows per batch: planned, remembered and smallest.

    :param smallest: smallest batch size with which a partition ended, or None.
    """
    known = [int(event["remembered"]) for event in events if event.get("event") == "batch"]
    return BatchRows(planned=plan.batch_rows, remembered=known[-1] if known else None, smallest=smallest)


def straggler_counts(events: Iterable[Mapping[str, Any]]) -> StragglerCounts:
    """Count the mitigations of slow partitions in the events of a job."""
    known = [event for event in events if event.get("event") == "straggler"]
    started = Counter((event.get("action"), event.get("split_reason")) for event in known if not event.get("is_over"))
    won = [event for event in known if event.get("is_over") and event.get("won")]
    return StragglerCounts(
        backups=started[MitigationAction.BACKUP, None],
        split_slow=started[MitigationAction.SPLIT, SplitReason.SLOW],
        split_frozen=started[MitigationAction.SPLIT, SplitReason.FROZEN],
        split_idle_workers=started[MitigationAction.SPLIT, SplitReason.IDLE_WORKERS],
        reassigned=started[MitigationAction.REASSIGN, None],
        won=len(won),
        seconds_won=round(sum(float(event.get("seconds_won") or 0.0) for event in won), 3),
    )


# A probe ends with PLANNED.
_FINAL = {str(status) for status in Status if status.is_final or status is Status.PLANNED}
_ACTIVE = {str(Status.PROVISIONING), str(Status.RUNNING), str(Status.PUBLISHING)}


def _active_seconds(job: JobDirectory, events: Sequence[Mapping[str, Any]], status: Status, totals: Totals) -> float:
    """Return the seconds during which drivers ran, up to now if a driver runs.

    Completed partitions are no events. Without this, the time of a running job would end before most of its work.
    """
    if not status.is_active:
        return active_seconds(events)
    seconds = active_seconds(events, until=utc_now() if is_driven(job) else None)
    return max(seconds, max(totals.durations, default=0.0))


def is_driven(job: JobDirectory) -> bool:
    """Return True if a driver holds the lease of ``job``, and is not known to have ended."""
    lease = read_lease(job.store)
    return lease.epoch > 0 and not lease.is_released and not has_ended(lease.holder)


def running_figures(
    job: JobDirectory, ledger: Ledger, events: Sequence[Mapping[str, Any]], *, now: datetime | None = None
) -> RunningFigures | None:
    """Return what the driver of ``job`` has reached; None if no driver runs.

    Rows that earlier drivers had done count neither for the rate nor for what remains.
    """
    if not is_driven(job):
        return None
    this = events[len(before_this(events)) :]
    cluster: Mapping[str, Any] = next((event for event in reversed(this) if event["event"] == "cluster"), {})
    known: dict[str, Any] = {"workers": cluster.get("workers", 0), "dashboard": cluster.get("dashboard", "")}
    if (record := read_progress(job.store, epoch=read_lease(job.store).epoch)) is not None:
        return RunningFigures(record.rows_per_second, record.seconds_left, **known)
    start = next((event for event in this if event["event"] == "round_started"), None)
    if start is None:
        return RunningFigures(**known)
    done = sum(receipt.rows.input for receipt in ledger.done) - int(start.get("rows_done", 0))
    seconds = ((now or utc_now()) - datetime.fromisoformat(str(start["time"]))).total_seconds()
    if done <= 0 or seconds <= 0:
        return RunningFigures(**known)
    rows_left = sum(partition.rows for partition in ledger.todo)
    return RunningFigures(round(done / seconds, 1), round(rows_left * seconds / done, 1), **known)


def culprit(ledger: Ledger, events: Sequence[Mapping[str, Any]]) -> str:
    """Return the partition that failed the job, with its input rows; empty if the job failed otherwise."""
    failed = [str(e["partition"]) for e in events if e["event"] == "partition" and e.get("outcome") == "failed"]
    partitions = {partition.id: partition for partition in ledger.todo}
    if not failed or failed[-1] not in partitions:
        return ""
    fragments = partitions[failed[-1]].fragments
    shown = [f"{part.path} rows {part.row_start:,} to {part.row_stop - 1:,}" for part in fragments[:_SHOWN_FRAGMENTS]]
    more = len(fragments) - len(shown)
    return f"partition {failed[-1]}: " + ", ".join(shown) + (f", and {more:,} more" if more else "")


def last_error(events: Sequence[Mapping[str, Any]], status: Status) -> JobError | None:
    """Return the error that ended the job, as its last status event has it; None without one."""
    if not status.is_final or status.is_success:
        return None
    last: Mapping[str, Any] = next((event for event in reversed(events) if event["event"] == "status"), {})
    # A driver of another version may have written fields that this one does not know.
    with suppress(TypeError):
        return JobError(**last["error"]) if last.get("error") else None
    return None


def active_seconds(events: Sequence[Mapping[str, Any]], *, until: datetime | None = None) -> float:
    """Return the seconds during which a driver ran. The time of a killed driver ends at its last event.

    :param until: End of the time of a driver that runs now.
    """
    total, since, last = 0.0, None, None
    for event in events:
        try:
            now = datetime.fromisoformat(str(event["time"]))
        except (KeyError, ValueError):
            continue
        after = event.get("after") if event["event"] == "status" else None
        is_restart = after == Status.PROVISIONING and since is not None
        if since is not None and last is not None and (is_restart or after in _FINAL):
            total += ((last if is_restart else now) - since).total_seconds()
            since = None
        if since is None and after in _ACTIVE:
            since = now
        last = now
    if since is not None and last is not None:
        total += ((until or last) - since).total_seconds()
    return max(0.0, total)


def before_this(events: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the events before the start of the last driver."""
    starts = [number for number, event in enumerate(events) if event["event"] == "driver"]
    return events[: starts[-1]] if starts else ()


def provision_seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds that drivers waited for workers."""
    total, since = 0.0, None
    for event in events:
        if event["event"] != "status":
            continue
        now = datetime.fromisoformat(str(event["time"]))
        if event.get("after") == Status.PROVISIONING:
            since = now
        elif since is not None:
            total += max(0.0, (now - since).total_seconds()) if event.get("after") == Status.RUNNING else 0.0
            since = None
    return total


def last_reason(events: Sequence[Mapping[str, Any]], status: Status) -> str:
    """Return the reason for a job's status; empty for a success."""
    if status.is_success:
        return ""
    reasons = [str(event.get("reason", "")) for event in events if event["event"] == "status"]
    return reasons[-1] if reasons else ""


def device_text(events: Iterable[Mapping[str, Any]]) -> str:
    """Return what was requested of the workers last, and why they use no GPU; empty if nobody asked."""
    known = [event for event in events if event.get("event") == "device"]
    if not known:
        return ""
    reasons = "; ".join(map(str, known[-1].get("reasons", ())))
    return f"cpu: {reasons}" if reasons else str(known[-1].get("requested", ""))


def device_uses(totals: Mapping[str, DeviceTotals], events: Iterable[Mapping[str, Any]]) -> tuple[DeviceUse, ...]:
    """Return the work of each GPU, with the name and driver that its worker reported."""
    reports = {
        str(report["uuid"]): report
        for event in events
        if event.get("event") == "device"
        for report in event.get("workers", {}).values()
        if "uuid" in report
    }
    return tuple(
        DeviceUse(
            uuid,
            str(reports.get(uuid, {}).get("name", uuid)),
            str(reports.get(uuid, {}).get("driver", "")),
            used.rows,
            used.peak_bytes,
        )
        for uuid, used in sorted(totals.items())
    )


def _sum_devices(reports: Iterable[Report]) -> tuple[DeviceUse, ...]:
    """Return the work of each GPU over the children of a fan-out."""
    sums: dict[str, DeviceUse] = {}
    for device in (device for report in reports for device in report.devices):
        sums[device.uuid] = sums[device.uuid] + device if device.uuid in sums else device
    return tuple(sums.values())


def engine_evidence(use: EngineUse | None, *, tolerance: float) -> EngineEvidence | None:
    """Return the evidence of all partitions together, with seconds rounded. None for None."""
    if use is None:
        return None
    seconds = {name: round(value, 6) for name, value in use.seconds.items()}
    return EngineEvidence(replace(use, seconds=seconds, seconds_start=round(use.seconds_start, 3)), tolerance)


def engine_warnings(use: EngineUse | None) -> tuple[str, ...]:
    """Return the warnings about the engines of all partitions."""
    if use is None:
        return ()
    warnings = [f"the tree engine was disabled: {reason}" for reason in use.disabled]
    warnings += [f"a worker stopped using its GPU: {reason}" for reason in use.device_reasons]
    if use.mismatches:
        warnings.append(
            f"{use.mismatches:,} of {use.compared_rows:,} compared rows came out otherwise than from {use.libraries}, "
            f"whose results were taken there; {use.rows.get('trees', 0):,} rows have the tree engine's{_of_gpus(use)}: "
            f"score again with {'device: cpu' if use.device_rows else 'engine: library'}"
        )
    return tuple(warnings)


def _of_gpus(use: EngineUse) -> str:
    return f", {use.device_rows:,} those of GPUs" if use.device_rows else ""
