"""`FanOutCommit`: the children's manifests that make up the output of a fan-out. Numbered; created if absent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.common.rows import RowCounts
from pipeline.common.units import iso_time, utc_now
from pipeline.errors import ReconciliationFailed, StateCorrupt
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory


@dataclass(frozen=True)
class ChildCommit:
    """Manifest that one child has published."""

    job: str
    manifest: int
    rows: dict[str, int]


@dataclass(frozen=True)
class FanOutCommit:
    """The content of ``commits/<n>.json``."""

    number: int
    """1 for the first commit."""
    job: str
    rows: RowCounts
    """Rows of all children together."""
    children: tuple[ChildCommit, ...]
    created: str
    """UTC, ISO 8601."""

    def to_json_bytes(self) -> bytes:
        """The commit as stored."""
        record: dict[str, Any] = {"schema_version": 1, **asdict(self), "rows": self.rows.to_dict()}
        return json.dumps(record, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes, *, where: str) -> FanOutCommit:
        """Inverse of `to_json_bytes`.

        :raises StateCorrupt: for anything else.
        """
        try:
            record = json.loads(data)
            if record.pop("schema_version") != 1:
                raise ValueError("unknown schema_version")
            children = tuple(ChildCommit(**child) for child in record.pop("children"))
            return FanOutCommit(**{**record, "rows": RowCounts.from_dict(record["rows"])}, children=children)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateCorrupt(
                "a commit of a fan-out is damaged",
                where=where,
                found=f"{type(error).__name__}: {error}",
                next_step="remove the file and resume: it is written again",
            ) from error


def last_commit(job: JobDirectory) -> FanOutCommit | None:
    """Return the last commit of a fan-out; None if there is none."""
    numbers = layout.numbers_of(job.store.list(layout.COMMITS))
    if not numbers:
        return None
    name = layout.commit_path(numbers[-1])
    return FanOutCommit.from_json(job.store.read(name), where=job.store.url(name))


def commit_fan_out(job: JobDirectory, children: Sequence[JobDirectory]) -> FanOutCommit:
    """Commit the published manifests of all children. If the last commit has the same manifests, return that commit.

    :raises ReconciliationFailed: when the rows of the children do not add up.
    """
    parts = []
    for child in children:
        manifest = child.manifests.last()
        if manifest is None:
            raise StateCorrupt(
                "a child has no manifest", where=child.root, next_step=f"python -m pipeline resume {child.id}"
            )
        parts.append(ChildCommit(child.id, manifest.number, manifest.rows.to_dict()))
    rows = RowCounts.total(RowCounts.from_dict(part.rows) for part in parts)
    if not rows.is_reconciled:
        raise ReconciliationFailed(
            "the rows of the children do not add up",
            where=f"job {job.id}",
            found=f"{rows.input:,} in, {rows.output:,} out, {rows.rejected:,} rejected, {rows.filtered:,} filtered",
            expected="rows in = rows out + rejected + filtered",
            next_step="this is a defect of this package: keep the job directory and report it",
        )
    last = last_commit(job)
    if last is not None and last.children == tuple(parts):
        return last
    commit = FanOutCommit(last.number + 1 if last else 1, job.id, rows, tuple(parts), iso_time(utc_now()))
    name = layout.commit_path(commit.number)
    if job.store.put_if_absent(name, commit.to_json_bytes()):
        return commit
    return FanOutCommit.from_json(job.store.read(name), where=job.store.url(name))
