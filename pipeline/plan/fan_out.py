"""One job spec for many: the values of a fan-out, and the job spec of each child. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import date, datetime
from typing import Any
from urllib.parse import quote

from pipeline.errors import PipelineError, SpecError
from pipeline.spec.diagnostics import IN_PYTHON, Document
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parameters import OWN_SECTIONS, PLACEHOLDER, Values, fill_text

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
    return fill_text(part, Values(fan_out=_written(value, place, is_from_data=is_from_data)))


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
