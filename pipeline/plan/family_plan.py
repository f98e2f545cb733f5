"""The plan of a fan-out: one plan for each child, from one look at the source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import SpecError
from pipeline.models.model import ModelVersion
from pipeline.plan.fan_out import ChildValue, child_spec, json_value, slugs, text_of
from pipeline.plan.plan import ChildPlan, Plan
from pipeline.sources import Discovery
from pipeline.sources.parquet.distinct import Occurrence, check_count, column_values, key_values, narrow
from pipeline.spec.diagnostics import did_you_mean
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parameters import PLACEHOLDER

SEVERAL = "one per child"
"""Stands for the model version of a fan-out whose children have different ones."""


@dataclass(frozen=True)
class Planner:
    """How one job is planned; see `pipeline.driver.prepare`."""

    discover: Callable[[JobSpec], Discovery]
    plan: Callable[[JobSpec, Discovery], Plan]


@dataclass(frozen=True)
class _Branch:
    spec: JobSpec
    value: ChildValue
    discovery: Discovery
    rows: int | None = None
    """Rows of the source that have the value."""


def plan_family(spec: JobSpec, planner: Planner) -> Plan:
    """The plan of a fan-out, with one for each child.

    :raises SpecError: when ``fan_out`` does not go with the source, or two children would publish to one place.
    :raises PipelineError: whatever the plan of a child is refused for, with the child's value.
    """
    assert spec.fan_out is not None
    by = spec.fan_out.by
    branches = _of_column(spec, by, planner) if isinstance(by, str) else _of_list(spec, by, planner)
    _check_sinks(branches)
    names = slugs([branch.value for branch in branches])
    children = []
    for slug, branch in zip(names, branches, strict=True):
        plan = planner.plan(branch.spec, branch.discovery)
        children.append(
            ChildPlan(
                slug=slug,
                value=branch.value,
                matching=branch.rows,
                rows=plan.rows,
                partitions=len(plan.partitions),
                work=plan.work_digest,
                cut=plan.digest,
                plan=plan,
            )
        )
    first = children[0].plan
    assert first is not None
    return replace(
        first,
        spec=spec,
        model=_common_model([child.plan.model for child in children if child.plan is not None]),
        files=(),
        partitions=(),
        pruned_rows=0,
        rejected_files=(),
        children=tuple(children),
    )


def _of_list(spec: JobSpec, values: Sequence[Any], planner: Planner) -> list[_Branch]:
    assert spec.fan_out is not None
    check_count(len(values), column="fan_out.by", limit=spec.fan_out.max_children)
    found: dict[str, Discovery] = {}
    branches = []
    for value in values:
        child = child_spec(spec, value, column=None)
        # Children that read the same have one look at it in common.
        source = child.source.model_dump_json()
        if source not in found:
            found[source] = planner.discover(child)
        branches.append(_Branch(child, value, found[source]))
    return branches


def _of_column(spec: JobSpec, column: str, planner: Planner) -> list[_Branch]:
    assert spec.fan_out is not None
    if any(PLACEHOLDER in text for text in _source_texts(spec)):
        raise SpecError(
            "the source of a fan-out by a column cannot depend on its values",
            where="source",
            found=f"{PLACEHOLDER}; each child gets the rows with its value anyway",
            next_step=f"leave it out, or give the values as a list: fan_out: {{by: [{column}1, {column}2]}}",
        )
    every = planner.discover(_without_fan_out(spec))
    if column not in every.available:
        raise SpecError(
            "fan_out.by names a column that the source does not have",
            where="fan_out.by",
            found=column,
            expected="one of: " + ", ".join(every.available[:20]) + (", …" if len(every.available) > 20 else ""),
            next_step=did_you_mean(column, every.available) or "mend fan_out.by, or give a list of values",
        )
    if column not in every.schema.names:
        every = planner.discover(_without_fan_out(spec, also=column))
    limit = spec.fan_out.max_children
    is_key = column in every.key_names
    found = key_values(every, column) if is_key else column_values(every, column, limit=limit)
    check_count(len(found), column=column, limit=limit)
    return [_branch(spec, column, value, found[value], every) for value in sorted(found, key=_order)]


def _branch(spec: JobSpec, column: str, value: Any, occurrence: Occurrence, every: Discovery) -> _Branch:
    child = child_spec(spec, json_value(value), column=column)
    narrowed = narrow(every, occurrence, filter=child.source.filter or "")
    return _Branch(child, json_value(value), narrowed, occurrence.rows)


def _order(value: Any) -> tuple[bool, Any]:
    """Null last."""
    return value is None, "" if value is None else value


def _source_texts(spec: JobSpec) -> tuple[str, ...]:
    path, columns = spec.source.path, spec.source.columns or ()
    return (*((path,) if isinstance(path, str) else path), *columns)


def _without_fan_out(spec: JobSpec, *, also: str | None = None) -> JobSpec:
    """A job over all rows that any child might want."""
    record = child_spec(spec, "x", column=None).to_dict()
    if PLACEHOLDER in (spec.source.filter or ""):
        del record["source"]["filter"]
    if also is not None:
        record["source"]["columns"] = [*(spec.source.columns or ()), also]
    return JobSpec.model_validate(record)


def _check_sinks(branches: Sequence[_Branch]) -> None:
    seen: dict[str, ChildValue] = {}
    for branch in branches:
        path = branch.spec.sink.path.rstrip("/")
        if path in seen:
            raise SpecError(
                "two children of a fan-out would publish to one place",
                where="sink.path",
                found=f"{path}, for {text_of(seen[path])!r} and {text_of(branch.value)!r}",
                expected=f"another path for each value: {PLACEHOLDER} in it, or none at all",
            )
        seen[path] = branch.value


def _common_model(versions: Sequence[ModelVersion]) -> ModelVersion:
    first = versions[0]
    if all(version.digest == first.digest for version in versions):
        return first
    return replace(first, name=SEVERAL, version="", uri="", digest="")
