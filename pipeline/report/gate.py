"""The publish gate: compare the output of a job with the limits of its spec, before readers see it.

``gate/result.json`` of a job has the result, ``gate/accepted-<digest>.json`` who published it all the same, and why.
Sketches add up exactly, so a resume finds the same figures, and an acceptance holds for these figures only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.digest import digest_json
from pipeline.common.sketch import ColumnSketch, NumberSketch, Sketches, is_sketched
from pipeline.common.units import format_count, iso_time, utc_now
from pipeline.errors import CorruptInput, GateFailed, SpecError
from pipeline.jobs import layout
from pipeline.jobs.cancellation import who
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job, previous_job
from pipeline.report.distributions import drift_of, sketches_of
from pipeline.sources.locate import locate
from pipeline.spec.gate import Gate, GateColumn
from pipeline.storage.store import open_store

logger = logging.getLogger(__name__)

LAST = "last"
_SHOWN = 4


@dataclass(frozen=True)
class GateCheck:
    """A figure and its limit."""

    column: str
    """Score or feature; empty for the rows of the output."""
    measure: str
    """``psi``, ``js``, ``ks``, ``nulls``, ``mean``, ``min``, ``max``, ``rows`` or ``rows / baseline``."""
    value: float
    limit: str
    """Limit as text, such as ``at most 0.2``."""
    ok: bool

    def text(self) -> str:
        """Return the figure and its limit in a line."""
        name = f"{self.column}: {self.measure}" if self.column else self.measure
        return f"{name} is {self.value:,.6g}, {'within' if self.ok else 'not'} {self.limit}"


@dataclass(frozen=True)
class GateResult:
    """Result of a gate."""

    baseline: str
    """Job or path that was compared with; empty without one."""
    checks: tuple[GateCheck, ...]
    skipped: tuple[str, ...] = ()
    """Comparisons that could not be made, and why."""
    action: str = "fail"
    accepted: str = ""
    """Reason for which the output was published all the same, with who gave it and when; empty without one."""

    @property
    def failed(self) -> tuple[GateCheck, ...]:
        """Checks that do not hold."""
        return tuple(check for check in self.checks if not check.ok)

    @property
    def digest(self) -> str:
        """SHA-256 over the figures and their limits."""
        return digest_json([self.baseline, [asdict(check) for check in self.checks]])

    def text(self) -> str:
        """Return the result in a line."""
        against = f" against {self.baseline}" if self.baseline else ""
        missing = f"; {'; '.join(self.skipped)}" if self.skipped else ""
        if not self.failed:
            return f"passed: {len(self.checks)} checks{against}{missing}"
        shown = ", ".join(check.text() for check in self.failed[:_SHOWN])
        more = f", and {len(self.failed) - _SHOWN} more" if len(self.failed) > _SHOWN else ""
        end = f"; accepted {self.accepted}" if self.accepted else ""
        return f"{len(self.failed)} of {len(self.checks)} checks failed{against}: {shown}{more}{missing}{end}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for storage and JSON output."""
        return {**asdict(self), "ok": not self.failed}

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> GateResult:
        """Inverse of `to_dict`."""
        plain = {name: value for name, value in record.items() if name not in ("ok", "schema_version")}
        checks = tuple(GateCheck(**check) for check in record["checks"])
        return GateResult(**{**plain, "checks": checks, "skipped": tuple(record["skipped"])})


def check_gate(job: JobDirectory, sketches: Sketches, *, rows: int) -> GateResult | None:
    """Check the gate of a job whose rows are all scored, and store the result; None if its spec has no gate.

    :param sketches: distributions of the job's columns.
    :param rows: rows of the output.
    :raises GateFailed: if a check does not hold, its action is ``fail`` and nobody has accepted it.
    :raises SpecError: if the baseline cannot be read, or a column of the gate has no distribution.
    """
    gate = job.plan.spec.gate
    if gate is None:
        return None
    _refuse_unknown(gate, sketches)
    found = _baseline(job, gate)
    result = evaluate(gate, sketches, rows=rows, baseline=found)
    accepted = _acceptance(job, result)
    if accepted:
        result = replace(result, accepted=accepted)
    job.store.replace(layout.GATE_RESULT, json.dumps({"schema_version": 1, **result.to_dict()}, indent=1).encode())
    if not result.failed:
        return result
    if gate.action == "fail" and not accepted:
        raise GateFailed(
            "the output does not pass the gate; nothing was published",
            where=f"job {job.id}" + (f", compared with {result.baseline}" if result.baseline else ""),
            found="; ".join(check.text() for check in result.failed[:_SHOWN]),
            expected="; ".join(dict.fromkeys(check.limit for check in result.failed[:_SHOWN])),
            next_step=f'python -m pipeline publish {job.id} --accept "why" publishes it as it is',
        )
    logger.warning("job %s: gate: %d of %d checks failed", job.id, len(result.failed), len(result.checks))
    return result


def read_gate(job: JobDirectory) -> GateResult | None:
    """Return the stored result of a job's gate; None without one."""
    try:
        return GateResult.from_dict(json.loads(job.store.read(layout.GATE_RESULT)))
    except FileNotFoundError:
        return None


def accept(job: JobDirectory, reason: str) -> None:
    """Record that the output of a job is to be published although its gate failed.

    :raises SpecError: if the gate of the job has not failed.
    """
    result = read_gate(job)
    if result is None or not result.failed:
        raise SpecError(
            "there is nothing to accept",
            where=f"job {job.id}",
            found="no gate was checked" if result is None else result.text(),
            expected="a job whose gate failed",
            next_step=f"python -m pipeline status {job.id}",
        )
    record = {"reason": reason, "by": who(), "time": iso_time(utc_now())}
    job.store.put_if_absent(
        layout.gate_acceptance_path(result.digest), json.dumps({**record, "figures": result.to_dict()}).encode()
    )
    job.events.append("gate_accepted", **record)


def _acceptance(job: JobDirectory, result: GateResult) -> str:
    try:
        record = json.loads(job.store.read(layout.gate_acceptance_path(result.digest)))
    except FileNotFoundError:
        return ""
    return f"by {record['by']} at {record['time']}: {record['reason']}"


@dataclass(frozen=True)
class Baseline:
    """Distributions to compare with."""

    name: str
    sketches: Sketches
    rows: int
    """Rows of the output of that job, or of the files."""


def evaluate(gate: Gate, sketches: Sketches, *, rows: int, baseline: Baseline | None) -> GateResult:
    """Return the result of a gate. Pure.

    :param rows: rows of the output.
    """
    checks, skipped = list(_row_checks(gate, rows, baseline)), list[str]()
    if baseline is None:
        skipped.append("no baseline: no job of this name was published before")
    compared = 0
    for name, sketch in sketches.columns.items():
        limits = gate.columns.get(name, GateColumn())
        checks += _own_checks(name, sketch, limits)
        other = baseline.sketches.columns.get(name) if baseline is not None else None
        if other is None:
            continue
        if min(other.rows, sketch.rows) < gate.min_rows:
            compared += 1
            continue
        checks += _drift_checks(name, other, sketch, limits, gate)
    if compared:
        skipped.append(f"{compared} columns have fewer than {gate.min_rows:,} rows, too few to compare")
    return GateResult(baseline.name if baseline else "", tuple(checks), tuple(skipped), gate.action)


def _row_checks(gate: Gate, rows: int, baseline: Baseline | None) -> Iterator[GateCheck]:
    limits = gate.rows
    if limits is None:
        return
    if limits.at_least is not None:
        yield GateCheck("", "rows", rows, f"at least {format_count(limits.at_least)}", rows >= limits.at_least)
    if limits.at_most is not None:
        yield GateCheck("", "rows", rows, f"at most {format_count(limits.at_most)}", rows <= limits.at_most)
    if baseline is not None and baseline.rows:
        ratio = rows / baseline.rows
        if limits.min is not None:
            yield GateCheck("", "rows / baseline", ratio, f"at least {limits.min:g}", ratio >= limits.min)
        if limits.max is not None:
            yield GateCheck("", "rows / baseline", ratio, f"at most {limits.max:g}", ratio <= limits.max)


def _own_checks(name: str, sketch: ColumnSketch, limits: GateColumn) -> Iterator[GateCheck]:
    if limits.nulls is not None and sketch.rows:
        missing = sketch.nulls + (sketch.nans if isinstance(sketch, NumberSketch) else 0)
        share = missing / sketch.rows
        yield GateCheck(name, "nulls", share, f"at most {limits.nulls:g}", share <= limits.nulls)
    if not isinstance(sketch, NumberSketch) or not sketch.finite:
        return
    if limits.mean is not None:
        low, high = limits.mean
        yield GateCheck(name, "mean", sketch.mean, f"from {low:g} to {high:g}", low <= sketch.mean <= high)
    # An infinite value is beyond every limit.
    least, most = (-np.inf if sketch.infinite else sketch.least), (np.inf if sketch.infinite else sketch.most)
    if limits.min is not None:
        yield GateCheck(name, "min", float(least), f"at least {limits.min:g}", bool(least >= limits.min))
    if limits.max is not None:
        yield GateCheck(name, "max", float(most), f"at most {limits.max:g}", bool(most <= limits.max))


def _drift_checks(
    name: str, baseline: ColumnSketch, now: ColumnSketch, limits: GateColumn, gate: Gate
) -> Iterator[GateCheck]:
    drift = drift_of(name, baseline, now)
    if drift is None:
        kinds = ["numbers" if isinstance(one, NumberSketch) else "texts" for one in (baseline, now)]
        yield GateCheck(name, "type", np.nan, f"{kinds[0]}, as before: it has {kinds[1]} now", ok=False)
        return
    for measure in ("psi", "js", "ks"):
        limit, value = getattr(limits, measure) or getattr(gate, measure), getattr(drift, measure)
        if limit is not None and value is not None:
            yield GateCheck(name, measure, value, f"at most {limit:g}", value <= limit)


def _refuse_unknown(gate: Gate, sketches: Sketches) -> None:
    unknown = [name for name in gate.columns if name not in sketches.columns]
    if unknown:
        raise SpecError(
            "a column of the gate has no distribution",
            where=f"gate.columns.{unknown[0]}",
            found=unknown[0],
            expected=", ".join(sketches.columns) or "scores and features (report.distributions is false)",
            next_step="name a score or a feature: a number, a boolean or a text",
        )


def _baseline(job: JobDirectory, gate: Gate) -> Baseline | None:
    if gate.baseline == LAST:
        before = previous_job(job)
        return _job_baseline(before) if before is not None else None
    path = job.resolve(gate.baseline)
    if open_store(path).exists(layout.JOB_FILE):
        return _job_baseline(JobDirectory.open(path))
    if "/" not in gate.baseline and not gate.baseline.endswith(".parquet"):
        return _job_baseline(find_job(job.root.rpartition("/")[0], gate.baseline))
    return _file_baseline(path)


def _job_baseline(job: JobDirectory) -> Baseline:
    report = job.read_report() or {}
    return Baseline(job.id, sketches_of(job), int(report.get("rows", {}).get("out", 0)))


def _file_baseline(path: str) -> Baseline:
    """Return the distributions of all columns of Parquet files that can have one."""
    sketches, rows = Sketches(), 0
    for file in locate([path]):
        folder, _, name = file.path.rpartition("/")
        try:
            with open_store(folder or "/").open_input(name) as data:
                opened = pq.ParquetFile(data)
                names = [field.name for field in opened.schema_arrow if is_sketched(field.type)]
                for batch in opened.iter_batches(columns=names):
                    sketches.add(pa.Table.from_batches([batch]))
                    rows += batch.num_rows
        except pa.ArrowException as error:
            raise CorruptInput(
                "the baseline of the gate cannot be read",
                where=file.path,
                found=f"{type(error).__name__}: {error}",
                expected="Parquet files, or a job",
                next_step="repair or replace the file, and resume the job",
            ) from error
    return Baseline(path, sketches, rows)
