"""Plan a fan-out: its values, and the job spec and plan of each child, from one discovery of the source.

Pure, except for discovery and reading the distinct values of a column.
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
from pipeline.plan.pushdown import read_source
from pipeline.sources import Discovery, find_source
from pipeline.sources.distinct import Occurrence, check_count, key_values, narrow
from pipeline.spec.diagnostics import IN_PYTHON, Document, did_you_mean
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parameters import OWN_SECTIONS, PLACEHOLDER, Values, render_text

SEVERAL = "one per child"
"""Stands for the model of a fan-out whose children have different model versions."""


@dataclass(frozen=True)
class Planner:
    """The functions that plan one job; see `pipeline.driver.prepare`."""

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
    """Return the plan of a fan-out, with one plan per child.

    :raises SpecError: if ``fan_out`` does not fit the source, or two children would publish to one place.
    :raises PipelineError: if a child cannot be planned.
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
                work_digest=plan.work_digest,
                plan_digest=plan.digest,
                plan=plan,
            )
        )
    first = children[0].plan
    assert first is not None
    return replace(
        first,
        spec=spec,
        model=_common_model([child.plan.model for child in children if child.plan is not None]),
        chain=() if spec.is_plain else first.chain,
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
        # Children with the same source share one discovery.
        source = read_source(child).model_dump_json()
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
            next_step=did_you_mean(column, every.available) or "fix fan_out.by, or give a list of values",
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
    narrowed = narrow(every, occurrence, filter=read_source(child).filter or "")
    return _Branch(child, json_value(value), narrowed, occurrence.rows)


def _order(value: Any) -> tuple[bool, Any]:
    """Return a sort key that puts null last."""
    return value is None, "" if value is None else value


def _source_texts(spec: JobSpec) -> tuple[str, ...]:
    path, columns = spec.source.path, spec.source.columns or ()
    return (*((path,) if isinstance(path, str) else path), *columns)


def _without_fan_out(spec: JobSpec, *, also: str | None = None) -> JobSpec:
    """Return a job spec over all rows that any child may need.

    :param also: column to add to ``source.columns``.
    """
    record = child_spec(spec, "x", column=None).to_dict()
    if PLACEHOLDER in (spec.source.filter or ""):
        del record["source"]["filter"]
    if also is not None:
        record["source"]["columns"] = [*(spec.source.columns or ()), also]
    return JobSpec.model_validate(record)


def _check_sinks(branches: Sequence[_Branch]) -> None:
    seen: dict[str, ChildValue] = {}
    for branch in branches:
        sink = branch.spec.sink
        if not sink.path and sink.mode in ("append", "merge"):
            continue  # all children may add to one table
        path = (sink.where or "") + sink.place.rstrip("/")
        if path in seen:
            raise SpecError(
                "two children of a fan-out would publish to one place",
                where="sink.path" if sink.path else "sink.table",
                found=f"{path}, for {text_of(seen[path])!r} and {text_of(branch.value)!r}",
                expected=(
                    f"another path for each value: {PLACEHOLDER} in it, or none at all"
                    if sink.path
                    else f"mode append or merge, or {PLACEHOLDER} in table, url or where"
                ),
            )
        seen[path] = branch.value


def _common_model(versions: Sequence[ModelVersion]) -> ModelVersion:
    first = versions[0]
    if all(version.digest == first.digest for version in versions):
        return first
    return replace(first, name=SEVERAL, version="", uri="", digest="")


HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
"""Null in the name of a folder, and the text of ``${fan_out.value}`` for null."""
_EMPTY = "__EMPTY__"
LONGEST_SLUG = 40
_DIGEST_DIGITS = 8
_LIST = "value"
"""Name of the key in the sink paths of children of a list, as in ``value=a/``."""

ChildValue = str | int | float | bool | None


def json_value(value: Any) -> ChildValue:
    """Return the value of a column in the form of a fan-out value: dates as ISO 8601 text."""
    return value.isoformat() if isinstance(value, (date, datetime)) else value


def text_of(value: ChildValue) -> str:
    """Return the text of ``${fan_out.value}`` inside a longer text."""
    if value is None:
        return HIVE_NULL
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def folder_of(value: ChildValue) -> str:
    """Return ``value`` as the name of one folder, percent-encoded, so that it cannot lead out of its parent."""
    text = quote(text_of(value), safe=" ") or _EMPTY
    return text if text.strip(". ") else text.replace(".", "%2E").replace(" ", "%20")


def slugs(values: Sequence[ChildValue]) -> tuple[str, ...]:
    """Return a name per child, usable as folder and end of a job id: lower-case letters, digits, ``._-``.

    Names that are ambiguous, empty or too long end in a part of the value's digest.
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
    """Return the row filter that keeps the rows of a child."""
    name = f"column({column!r})"
    return f"{name} is None" if value is None else f"{name} == {value!r}"


def combine(condition: str, other: str | None) -> str:
    """Return the row filter for both conditions."""
    return condition if other is None else f"({condition}) and ({other})"


def child_spec(parent: JobSpec, value: ChildValue, *, column: str | None) -> JobSpec:
    """Return the job spec of one child.

    :param column: column or hive key that has ``value``; None for an item of a list.
    :raises SpecError: if the spec is not valid with this value.
    """
    own = {name: part for name, part in parent.to_dict().items() if name in OWN_SECTIONS and name != "fan_out"}
    left_out = {*OWN_SECTIONS, "triggers", "hooks"}
    record = {name: part for name, part in parent.to_dict().items() if name not in left_out}
    if parent.sink.path and PLACEHOLDER not in parent.sink.path:
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
            next_step="fix the field, or leave the value out",
        ) from error


def _fill(part: Any, place: tuple[str | int, ...], value: ChildValue, *, is_from_data: bool) -> Any:
    """Return ``part`` of a spec, found at ``place``, with a child's value in its texts."""
    if isinstance(part, dict):
        return {key: _fill(item, (*place, key), value, is_from_data=is_from_data) for key, item in part.items()}
    if isinstance(part, list):
        return [_fill(item, (*place, number), value, is_from_data=is_from_data) for number, item in enumerate(part)]
    if not isinstance(part, str) or "${" not in part:
        return part
    return render_text(part, Values(fan_out=_written(value, place, is_from_data=is_from_data)))


def _written(value: ChildValue, place: tuple[str | int, ...], *, is_from_data: bool) -> str | int | float:
    """Return the text of ``${fan_out.value}`` in one field.

    Values from the data are untrusted: in a path or a model they stay the name of one folder. In the sink's path, all
    values do.
    """
    if place == ("sink", "path") or (is_from_data and {"path", "model"}.intersection(place[-2:])):
        return folder_of(value)
    if value is None:
        return HIVE_NULL
    is_condition = place == ("source", "filter") or (place[0] == "steps" and place[-1] in ("filter", "where"))
    if is_condition and isinstance(value, str):
        # A filter holds texts in quotes: escape the characters that could end them.
        return value.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"')
    return value
