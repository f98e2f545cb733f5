"""The distinct values of a column of a source, with the files and row groups that hold each value."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.common.rows import InputFile
from pipeline.errors import SpecError
from pipeline.sources.discovery import Discovery
from pipeline.sources.locate import hive_value


@dataclass
class Occurrence:
    """The rows that hold one value."""

    rows: int = 0
    """Number of rows."""
    groups: dict[str, set[int]] = field(default_factory=dict)
    """Row groups with at least one of the rows, by file."""


Occurrences = dict[Any, Occurrence]
"""Occurrences by Python value; None for null."""


def key_values(discovery: Discovery, key: str) -> Occurrences:
    """Return the values of a hive key, from the paths of the files."""
    arrow_type = discovery.schema.field(key).type
    occurrences: Occurrences = {}
    for file in discovery.files:
        text = dict(file.hive_keys)[key]
        occurrence = occurrences.setdefault(hive_value(text, arrow_type), Occurrence())
        occurrence.rows += file.rows
        occurrence.groups[file.path] = set(range(len(file.row_groups)))
    return occurrences


def check_count(count: int, *, column: str, limit: int) -> None:
    """Check the number of values.

    :raises SpecError: if ``count`` exceeds ``limit``.
    """
    if count > limit:
        raise SpecError(
            "a fan-out would have too many children",
            where="fan_out.by",
            found=f"more than {limit:,} values of {column}",
            expected=f"at most {limit:,} (fan_out.max_children)",
            next_step="fan out by a column with fewer values, or raise fan_out.max_children",
        )


def narrow(discovery: Discovery, occurrence: Occurrence, *, filter: str) -> Discovery:
    """Return ``discovery`` with only the files and selected row groups that hold a value.

    :param filter: row filter for these files.
    """
    groups = occurrence.groups
    return replace(
        discovery,
        files=tuple(_narrow_file(file, groups[file.path]) for file in discovery.files if file.path in groups),
        measured=tuple(
            measured.narrow(groups[measured.file.path])
            for measured in discovery.measured
            if measured.file.path in groups
        ),
        filter=filter,
    )


def _narrow_file(file: InputFile, numbers: Collection[int]) -> InputFile:
    groups = (
        replace(group, selected=group.selected and number in numbers) for number, group in enumerate(file.row_groups)
    )
    return replace(file, row_groups=tuple(groups))
