"""Compare two jobs, from their directories alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.common.rows import InputFile
from pipeline.common.units import plural
from pipeline.jobs.directory import JobDirectory
from pipeline.report.build import make_report
from pipeline.report.report import Report
from pipeline.sources.versions import content_version

_SHOWN = 20
"""Files of each kind that are named."""


@dataclass(frozen=True)
class Changed:
    """A value that differs between two jobs."""

    before: Any
    after: Any

    def to_dict(self) -> list[Any]:
        """Return the two values for JSON output."""
        return [self.before, self.after]


@dataclass(frozen=True)
class FileChanges:
    """The differences between the input files of two jobs."""

    same: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    """Same path, different size or version."""

    def to_dict(self) -> dict[str, Any]:
        """Return the changes for JSON output."""
        return {
            "same": self.same,
            "added": list(self.added),
            "removed": list(self.removed),
            "changed": list(self.changed),
        }

    @property
    def is_same(self) -> bool:
        """True if both jobs read the same files."""
        return not (self.added or self.removed or self.changed)


@dataclass(frozen=True)
class Comparison:
    """The differences between two jobs. A part without differences is empty."""

    jobs: tuple[str, str]
    status: tuple[str, str]
    spec: dict[str, Changed]
    """Changes by field, such as ``sink.path``. The value of a job that lacks the field is None."""
    model: dict[str, Changed]
    files: FileChanges
    rows: dict[str, tuple[int, int]]
    """``in``, ``out``, ``rejected`` and ``filtered`` of both jobs, including equal counts."""
    reasons: dict[str, tuple[int, int]]
    """Rejected rows of both jobs, by reason."""
    seconds: dict[str, tuple[float, float]]
    partitions: tuple[int, int]
    """Completed partitions of both jobs."""

    @property
    def is_same_work(self) -> bool:
        """True if spec, model and input are the same."""
        return not self.spec and not self.model and self.files.is_same

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison for JSON output."""
        return {
            "jobs": list(self.jobs),
            "status": list(self.status),
            "same_work": self.is_same_work,
            "spec": {name: change.to_dict() for name, change in self.spec.items()},
            "model": {name: change.to_dict() for name, change in self.model.items()},
            "files": self.files.to_dict(),
            "rows": {name: list(pair) for name, pair in self.rows.items()},
            "reasons": {name: list(pair) for name, pair in self.reasons.items()},
            "seconds": {name: [round(one, 3) for one in pair] for name, pair in self.seconds.items()},
            "partitions": list(self.partitions),
        }


def compare(one: JobDirectory, other: JobDirectory) -> Comparison:
    """Return the differences of ``other`` from ``one``."""
    reports = make_report(one), make_report(other)
    return Comparison(
        jobs=(one.id, other.id),
        status=(reports[0].status, reports[1].status),
        spec=changes(flatten(one.plan.spec.to_dict()), flatten(other.plan.spec.to_dict())),
        model=changes(one.record.model, other.record.model),
        files=file_changes(one.plan.files, other.plan.files),
        rows=_pairs(*(report.rows.to_dict() for report in reports)),
        reasons=_pairs(*(report.reasons for report in reports)),
        seconds=_times(*reports),
        partitions=(reports[0].partitions.done, reports[1].partitions.done),
    )


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten ``{"sink": {"path": "out"}}`` to ``{"sink.path": "out"}``. List positions become numbers."""
    if isinstance(value, Mapping):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, (list, tuple)) and any(isinstance(inner, (Mapping, list)) for inner in value):
        items = [(str(number), inner) for number, inner in enumerate(value)]
    else:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= flatten(inner, f"{name}.{key}" if name else key)
    return flat


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Changed]:
    """Return the names whose values differ, in the order of ``before``, then of ``after``."""
    names = dict.fromkeys((*before, *after))
    return {name: Changed(before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def file_changes(before: tuple[InputFile, ...], after: tuple[InputFile, ...]) -> FileChanges:
    """Return the differences between two lists of input files."""
    old, new = ({file.path: (file.size, content_version(file.version)) for file in files} for files in (before, after))
    both = [path for path in old if path in new]
    changed = tuple(path for path in both if old[path] != new[path])
    return FileChanges(
        same=len(both) - len(changed),
        added=tuple(path for path in new if path not in old),
        removed=tuple(path for path in old if path not in new),
        changed=changed,
    )


def comparison_text(comparison: Comparison) -> str:
    """Return at most a few screens of text: the differences, and the counts of both jobs."""
    lines = [f"{comparison.jobs[0]} -> {comparison.jobs[1]}"]
    lines += [f"  status     {comparison.status[0]} -> {comparison.status[1]}"]
    for title, part in (("spec", comparison.spec), ("model", comparison.model)):
        lines += [f"  {title:<10} {name}: {change.before} -> {change.after}" for name, change in part.items()]
    for sign, paths in (
        ("+", comparison.files.added),
        ("-", comparison.files.removed),
        ("~", comparison.files.changed),
    ):
        lines += [f"  file       {sign} {path}" for path in paths[:_SHOWN]]
        lines += [f"  file       {sign} and {len(paths) - _SHOWN:,} more"] if len(paths) > _SHOWN else []
    if comparison.is_same_work:
        lines += [f"  work       the same spec and model over the same {plural(comparison.files.same, 'file')}"]
    lines += [f"  rows       {_change_text(name, pair)}" for name, pair in comparison.rows.items()]
    lines += [f"  rejects    {_change_text(name, pair)}" for name, pair in comparison.reasons.items()]
    lines += [f"  seconds    {name}: {pair[0]:.2f} -> {pair[1]:.2f}" for name, pair in comparison.seconds.items()]
    return "\n".join(lines)


def _change_text(name: str, pair: tuple[int, int]) -> str:
    difference = pair[1] - pair[0]
    return f"{name}: {pair[0]:,} -> {pair[1]:,}" + (f" ({difference:+,})" if difference else "")


def _pairs(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    return {name: (one.get(name, 0), other.get(name, 0)) for name in dict.fromkeys((*one, *other))}


def _times(one: Report, other: Report) -> dict[str, tuple[float, float]]:
    before, after = asdict(one.seconds), asdict(other.seconds)
    return {name: (before[name], after[name]) for name in before}
