"""What was rejected and why, for a person to look at: read from the receipts and the files they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.checkpoint import JobDirectory
from pipeline.errors import StateCorrupt
from pipeline.receipt import Receipt
from pipeline.recipe import REJECT_COLUMNS, REJECT_FILE, REJECT_MESSAGE, REJECT_REASON, REJECT_ROW

EXAMPLES = 3
_BATCH_ROWS = 4096


@dataclass(frozen=True)
class RejectExample:
    """One rejected row."""

    file: str
    row: int
    """Number of the row in its file, from 0."""
    message: str
    values: Mapping[str, Any]
    """Its input columns."""


@dataclass(frozen=True)
class RejectGroup:
    """All rows that were rejected for one reason."""

    reason: str
    count: int
    examples: tuple[RejectExample, ...]
    """The first ones, in source order."""


@dataclass(frozen=True)
class RejectSummary:
    """All rejects of a job."""

    groups: tuple[RejectGroup, ...]
    """Most frequent first."""
    files: tuple[str, ...]
    """Paths or URLs of the Parquet files that hold them."""
    total: int

    def details(self) -> dict[str, Any]:
        """As JSON output shows it; values that JSON has no form for become text."""
        return {
            "schema_version": 1,
            "total": self.total,
            "groups": [
                {"reason": group.reason, "count": group.count, "examples": [_details(one) for one in group.examples]}
                for group in self.groups
            ],
            "files": list(self.files),
        }


def summarise(job: JobDirectory, *, examples: int = EXAMPLES) -> RejectSummary:
    """Counts per reason, and the first ``examples`` rows of each. Files are read only until these are found.

    :raises StateCorrupt: when a file that a receipt names is missing or damaged.
    """
    receipts = [receipt for receipt in job.receipts() if receipt.rejects is not None]
    counts: dict[str, int] = {}
    for receipt in receipts:
        for reason, count in receipt.reasons.items():
            counts[reason] = counts.get(reason, 0) + count
    found: dict[str, list[RejectExample]] = {reason: [] for reason in counts}
    for receipt in receipts:
        missing = {reason for reason in receipt.reasons if len(found[reason]) < min(examples, counts[reason])}
        if missing:
            _collect(job, receipt, found, missing, examples=examples)
    groups = tuple(
        RejectGroup(reason, count, tuple(found[reason]))
        for reason, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    )
    files = tuple(job.store.url(_place(receipt)) for receipt in receipts)
    return RejectSummary(groups, files, sum(counts.values()))


def first_examples(summary: RejectSummary) -> dict[str, str]:
    """One line per reason: where its first row is, and what was wrong with it."""
    firsts = {group.reason: group.examples[0] for group in summary.groups if group.examples}
    return {reason: f"{one.file} row {one.row}: {one.message}" for reason, one in firsts.items()}


def _collect(
    job: JobDirectory, receipt: Receipt, found: dict[str, list[RejectExample]], missing: set[str], *, examples: int
) -> None:
    place = _place(receipt)
    try:
        with job.store.open_input(place) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                reasons = batch.column(REJECT_REASON).to_pylist()
                for position, reason in enumerate(reasons):
                    if reason in missing:
                        found[reason].append(_example(batch.slice(position, 1)))
                        if len(found[reason]) >= examples:
                            missing.discard(reason)
                if not missing:
                    return
    except (OSError, pa.ArrowException, KeyError) as error:
        raise StateCorrupt(
            "a file of rejects cannot be read",
            where=job.store.url(place),
            found=f"{type(error).__name__}: {error}",
            expected="the file that its receipt names",
            next_step=f"remove the receipt of partition {receipt.partition} and resume: it is scored again",
        ) from error


def _example(row: pa.RecordBatch) -> RejectExample:
    values = row.to_pylist()[0]
    own = {name: value for name, value in values.items() if name not in REJECT_COLUMNS}
    return RejectExample(str(values[REJECT_FILE]), int(values[REJECT_ROW]), str(values[REJECT_MESSAGE]), own)


def _place(receipt: Receipt) -> str:
    return f"stages/0/{receipt.rejects.name}" if receipt.rejects else ""


def _details(example: RejectExample) -> dict[str, Any]:
    values = {name: _plain(value) for name, value in example.values.items()}
    return {"file": example.file, "row": example.row, "message": example.message, "values": values}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)
