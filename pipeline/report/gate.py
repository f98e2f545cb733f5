"""The publish gate: compare the output of a job with the limits of its spec, before readers see it.

``gate/result.json`` of a job has the result, ``gate/accepted-<digest>.json`` who published it all the same, and why.
Sketches add up exactly, so a resume finds the same figures, and an acceptance holds for these figures only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.common.digest import digest_json
from pipeline.common.sketch import ColumnSketch, NumberSketch, Sketches, is_number, is_sketched
from pipeline.common.text import listed
from pipeline.common.units import format_count, iso_time, utc_now
from pipeline.errors import GateFailed, SpecError
from pipeline.jobs import layout
from pipeline.jobs.cancellation import who
from pipeline.jobs.directory import JobDirectory
from pipeline.plan.plan import Plan
from pipeline.report.baseline import LAST, TRAINING, Baseline, baseline_columns, read_baseline
from pipeline.report.distributions import drift_of
from pipeline.spec.gate import DISTANCES, Gate, GateColumn, GateRows

logger = logging.getLogger(__name__)

_SHOWN = 4


@dataclass(frozen=True)
class GateCheck:
    """A figure and its limit."""

    column: str
    """Score or feature; empty for the rows of the output."""
    measure: str
    """``psi``, ``js``, ``ks``, ``nulls``, ``mean``, ``min``, ``max``, ``rows`` or ``rows / baseline``."""
    value: float | None
    """None without a finite figure."""
    limit: str
    """Limit as text, such as ``at most 0.2``."""
    ok: bool
    found: str = ""
    """What there is instead of a finite figure."""

    def text(self) -> str:
        """Return the figure and its limit in a line."""
        name = f"{self.column}: {self.measure}" if self.column else self.measure
        value = self.found if self.value is None else f"{self.value:,.6g}"
        return f"{name} is {value}, {'within' if self.ok else 'not'} {self.limit}"


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
    :raises PipelineError: if the baseline is gone or cannot be read.
    """
    gate = job.plan.spec.gate
    if gate is None:
        return None
    baseline = read_baseline(job, gate, names=list(sketches.columns))
    result = evaluate(gate, sketches, rows=rows, baseline=baseline)
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


def evaluate(gate: Gate, sketches: Sketches, *, rows: int, baseline: Baseline | None) -> GateResult:
    """Return the result of a gate. Pure.

    :param rows: rows of the output.
    """
    checks, skipped = list(_row_checks(gate, rows, baseline)), list[str]()
    if baseline is None:
        skipped.append("no baseline: no job of this name was published before")
    few, absent = list[str](), list[str]()
    for name, limits in gate.columns.items():
        if (sketch := sketches.columns.get(name)) is None or not sketch.rows:
            skipped.append(f"{name} has no rows")
        else:
            checks += _own_checks(name, sketch, limits)
    for name, sketch in sketches.columns.items():
        limits = gate.columns.get(name, GateColumn())
        if baseline is None or not any(_limit(measure, limits, gate) for measure in DISTANCES):
            continue
        other = baseline.sketches.columns.get(name)
        if other is None:
            absent.append(name)
        elif min(other.rows, sketch.rows) < gate.min_rows:
            few.append(name)
        else:
            checks += _drift_checks(name, other, sketch, limits, gate)
    if few:
        skipped.append(f"{listed(few)}: fewer than {gate.min_rows:,} rows, too few to compare")
    if absent:
        skipped.append(f"{listed(absent)}: not in the baseline")
    return GateResult(baseline.name if baseline else "", tuple(checks), tuple(skipped), gate.action)


def _limit(measure: str, limits: GateColumn, gate: Gate) -> float | None:
    """Return the largest distance of a column: its own, else that of the gate."""
    found: float | None = getattr(limits, measure) or getattr(gate, measure)
    return found


def _row_checks(gate: Gate, rows: int, baseline: Baseline | None) -> Iterator[GateCheck]:
    limits = gate.rows or GateRows()
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
    has_rows = baseline is not None and any(sketch.rows for sketch in baseline.sketches.columns.values())
    if has_rows and not rows and limits.at_least is None and limits.min is None:
        # Without rows there is nothing to compare, and nothing would hold back an empty output.
        yield GateCheck("", "rows", rows, "at least 1, as the baseline has rows", ok=False)


def _own_checks(name: str, sketch: ColumnSketch, limits: GateColumn) -> Iterator[GateCheck]:
    """Yield the checks of a column with rows by its own limits. What has no figure does not hold."""
    if limits.nulls is not None:
        missing = sketch.nulls + (sketch.nans if isinstance(sketch, NumberSketch) else 0)
        share = missing / sketch.rows
        yield GateCheck(name, "nulls", share, f"at most {limits.nulls:g}", share <= limits.nulls)
    figures: dict[str, float] = {}
    found = "not a number"
    if isinstance(sketch, NumberSketch):
        found = "infinite" if sketch.infinite else "missing in every row"
        if sketch.finite:
            figures["mean"] = float(sketch.mean)
        # An infinite value is beyond every limit.
        if sketch.finite and not sketch.infinite:
            figures |= {"min": float(sketch.least), "max": float(sketch.most)}
    for measure, low, high in (
        ("mean", *(limits.mean or (None, None))),
        ("min", limits.min, None),
        ("max", None, limits.max),
    ):
        if low is None and high is None:
            continue
        value = figures.get(measure)
        ok = value is not None and (low is None or low <= value) and (high is None or value <= high)
        yield GateCheck(name, measure, value, _range(low, high), ok, "" if value is not None else found)


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"


def _drift_checks(
    name: str, baseline: ColumnSketch, now: ColumnSketch, limits: GateColumn, gate: Gate
) -> Iterator[GateCheck]:
    drift = drift_of(name, baseline, now)
    if drift is None:
        kinds = ["numbers" if isinstance(one, NumberSketch) else "texts" for one in (baseline, now)]
        yield GateCheck(name, "type", None, f"{kinds[0]}, as in the baseline", ok=False, found=kinds[1])
        return
    for measure in DISTANCES:
        limit, value = _limit(measure, limits, gate), getattr(drift, measure)
        if limit is not None and value is not None:
            yield GateCheck(name, measure, value, f"at most {limit:g}", value <= limit)


def check_gate_plan(plan: Plan, *, root: str) -> None:
    """Refuse a gate that could not be checked at the end of the job.

    :param root: folder of job directories.
    :raises PipelineError: if a column of the gate will have no distribution, or cannot have a figure that has a limit;
        or if the baseline is not there, cannot be read, or has no column to compare.
    """
    gate = plan.spec.gate
    if gate is None:
        return
    if not plan.spec.report.distributions and (_compares(gate) or gate.columns):
        raise SpecError(
            "the gate needs distributions, which the job would not count",
            where="report.distributions",
            found="false, and a gate with limits for columns",
            expected="true",
            next_step="remove report.distributions, or give the gate limits for rows only",
        )
    first = next((child.plan for child in plan.children if child.plan is not None), plan)
    recipe = first.recipe(job="", directory="", sketch_every=1)
    names = [*recipe.sketched_features, *recipe.score_columns]
    _refuse_unknown(gate, names, _known_types(first))
    if gate.baseline == LAST:
        return
    if gate.baseline == TRAINING and gate.rows is not None and (gate.rows.min or gate.rows.max):
        raise SpecError(
            "the gate compares the number of rows with that of the training data",
            where="gate.rows",
            found="min or max, and baseline: training",
            expected="at_least or at_most",
            next_step="give numbers of rows",
        )
    found = baseline_columns(first, gate, root=root)
    needed = [*gate.columns] if not any(getattr(gate, measure) for measure in DISTANCES) else names
    if _compares(gate) and not set(needed) & set(found):
        raise SpecError(
            "the baseline of the gate has no column to compare",
            where="gate.baseline",
            found=listed(found) or "no distributions",
            expected=f"one of {listed(needed)}",
            next_step="name a job with distributions, or Parquet files with columns of these names",
        )


def _compares(gate: Gate) -> bool:
    """Return True if the gate has a limit for a distance from the baseline."""
    return any(getattr(one, measure) for one in (gate, *gate.columns.values()) for measure in DISTANCES)


def _known_types(plan: Plan) -> dict[str, pa.DataType]:
    """Return the types of columns of the source and the output, by name."""
    schemas = [pa.ipc.read_schema(pa.py_buffer(data)) for data in (plan.source_schema, plan.output_schema)]
    found: dict[str, pa.DataType] = {}
    for field in (field for schema in schemas for field in schema):
        # A step may make another type of it.
        found[field.name] = field.type if found.get(field.name, field.type) == field.type else pa.null()
    return found


def _refuse_unknown(gate: Gate, names: Sequence[str], types: Mapping[str, pa.DataType]) -> None:
    for name, limits in gate.columns.items():
        kind = types.get(name, pa.null())
        is_known = not pa.types.is_null(kind)
        if name not in names or (is_known and not is_sketched(kind)):
            raise SpecError(
                "a column of the gate has no distribution",
                where=f"gate.columns.{name}",
                found=f"{name} ({kind})" if name in names else name,
                expected=listed(names) or "a score or a feature, of which this job has none",
                next_step="name a score or a feature: a number, a boolean or a text",
            )
        measures = [measure for measure in ("mean", "min", "max", "ks") if getattr(limits, measure) is not None]
        if is_known and measures and not is_number(kind):
            raise SpecError(
                "a limit of the gate is for numbers",
                where=f"gate.columns.{name}.{measures[0]}",
                found=f"{name} has the type {kind}",
                expected="psi, js or nulls for a column of texts",
                next_step=f"leave {measures[0]} out",
            )
