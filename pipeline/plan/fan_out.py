"""The plan of a fan-out: one plan for each child, from one look at the source.

One job spec for many: the values of a fan-out, and the job spec of each child. Pure.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Any
from urllib.parse import quote

from pipeline.errors import PipelineError, SpecError
from pipeline.models.model import ModelVersion
from pipeline.plan.plan import ChildPlan, Plan
from pipeline.sources import Discovery, find_source
from pipeline.sources.distinct import Occurrence, check_count, key_values, narrow
from pipeline.spec.diagnostics import IN_PYTHON, Document, did_you_mean
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parameters import OWN_SECTIONS, PLACEHOLDER, Values, render_text

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


def plan_fan_out(spec: JobSpec, planner: Planner) -> Plan:
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
        quarantined_files=(),
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
    if column in every.key_names:
        occurrences = key_values(every, column)
    else:
        occurrences = find_source(every.format).distinct_values(every, column, limit=limit)
    check_count(len(occurrences), column=column, limit=limit)
    return [_branch(spec, column, value, occurrences[value], every) for value in sorted(occurrences, key=_order)]


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


HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
"""What stands for null in the name of a folder, and what ``${fan_out.value}`` is then."""
_EMPTY = "__EMPTY__"
LONGEST_SLUG = 40
_DIGEST_DIGITS = 8
_LIST = "value"
"""What children of a list are told apart by, in the paths of their sinks."""

ChildValue = str | int | float | bool | None


def json_value(value: Any) -> ChildValue:
    """A value of a column as a fan-out has it: dates as ISO 8601."""
    return value.isoformat() if isinstance(value, (date, datetime)) else value


def text_of(value: ChildValue) -> str:
    """What ``${fan_out.value}`` is inside of a text."""
    if value is None:
        return HIVE_NULL
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def folder_of(value: ChildValue) -> str:
    """``value`` as the name of one folder, percent-encoded: it can lead nowhere else."""
    text = quote(text_of(value), safe=" ") or _EMPTY
    return text if text.strip(". ") else text.replace(".", "%2E").replace(" ", "%20")


def slugs(values: Sequence[ChildValue]) -> tuple[str, ...]:
    """A name for each child that can be a folder and the end of a job id: lower-case letters, digits, ``._-``.

    Values that would have one name, and names that had to be cut, have a piece of the value's digest at their end.
    """
    plain = [_slug(value) for value in values]
    return tuple(
        slug if slug and plain.count(slug) == 1 and len(slug) <= LONGEST_SLUG else _with_digest(slug, value)
        for slug, value in zip(plain, values, strict=True)
    )


def _slug(value: ChildValue) -> str:
    text = "null" if value is None else text_of(value)
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")


def _with_digest(slug: str, value: ChildValue) -> str:
    digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:_DIGEST_DIGITS]
    return f"{slug[: LONGEST_SLUG - _DIGEST_DIGITS - 1].rstrip('-._') or 'x'}-{digest}"


def condition(column: str, value: ChildValue) -> str:
    """The row filter that keeps the rows of a child."""
    name = f"column({column!r})"
    return f"{name} is None" if value is None else f"{name} == {value!r}"


def combine(condition: str, other: str | None) -> str:
    """A row filter for both."""
    return condition if other is None else f"({condition}) and ({other})"


def child_spec(parent: JobSpec, value: ChildValue, *, column: str | None) -> JobSpec:
    """The job spec of one child.

    :param column: the column, or hive key, whose value it is; None for an item of a list.
    :raises SpecError: when it is none with that value.
    """
    own = {name: part for name, part in parent.to_dict().items() if name in OWN_SECTIONS and name != "fan_out"}
    left_out = {*OWN_SECTIONS, "triggers", "hooks"}
    record = {name: part for name, part in parent.to_dict().items() if name not in left_out}
    if PLACEHOLDER not in parent.sink.path:
        record["sink"]["path"] = f"{parent.sink.path.rstrip('/')}/{quote(column or _LIST, safe='')}={PLACEHOLDER}/"
    try:
        filled = {name: _fill(part, (name,), value, is_from_data=column is not None) for name, part in record.items()}
        if column is not None:
            filled["source"]["filter"] = combine(condition(column, value), filled["source"].get("filter"))
        return JobSpec.from_filled(Document(IN_PYTHON, {**filled, **own}))
    except PipelineError as error:
        raise SpecError(
            "the job spec of a child is wrong",
            where=f"fan_out.by, the value {text_of(value)!r}",
            found=" ".join(str(error).split()),
            next_step="mend the field, or leave the value out",
        ) from error


def _fill(part: Any, place: tuple[str | int, ...], value: ChildValue, *, is_from_data: bool) -> Any:
    """``part`` of a spec, which stands at ``place``, with the value of a child in its texts."""
    if isinstance(part, dict):
        return {key: _fill(item, (*place, key), value, is_from_data=is_from_data) for key, item in part.items()}
    if isinstance(part, list):
        return [_fill(item, (*place, number), value, is_from_data=is_from_data) for number, item in enumerate(part)]
    if not isinstance(part, str) or "${" not in part:
        return part
    return render_text(part, Values(fan_out=_written(value, place, is_from_data=is_from_data)))


def _written(value: ChildValue, place: tuple[str | int, ...], *, is_from_data: bool) -> str | int | float:
    """What ``${fan_out.value}`` is in one field. Nobody has vouched for a value that was found in the data: in a path
    it stays the name of one folder. In the sink's path, all do."""
    if place == ("sink", "path") or (is_from_data and place[-1] in ("path", "model")):
        return folder_of(value)
    if value is None:
        return HIVE_NULL
    if place == ("source", "filter") and isinstance(value, str):
        # Inside of quotes, as a filter has texts, these are what could end them.
        return value.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"')
    return value
