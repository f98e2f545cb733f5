"""`Manifest`: the numbered list of files that make up an output. Writing it is the commit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import ReconciliationFailed, StateCorrupt
from pipeline.model import ModelVersion
from pipeline.receipt import DataFile, Receipt
from pipeline.rows import RowCounts

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of a partition."""

    partition: str
    name: str
    """Relative to the job directory, such as ``stages/0/data/00003-<unique>.parquet``."""
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ManifestModel:
    """The model version that scored every row of it."""

    name: str
    version: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What one commit of a job consists of."""

    number: int
    """1 for the first commit of the job."""
    job: str
    plan: str
    """Digest of the plan."""
    model: ManifestModel
    schema: str
    """Arrow schema of the output, as its IPC bytes in hexadecimal digits."""
    files: tuple[ManifestFile, ...]
    """Output, in source order."""
    rejects: tuple[ManifestFile, ...]
    rows: RowCounts
    created: str
    """UTC, ISO 8601."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Rejected rows per reason."""

    def to_json(self) -> bytes:
        """As stored: one object, indented one step, with a schema version."""
        record = asdict(self)
        record["rows"] = self.rows.details()
        return json.dumps({"schema_version": SCHEMA_VERSION, **record}, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes, *, where: str = "") -> Manifest:
        """Inverse of `to_json`.

        :raises StateCorrupt: for anything that is not a whole manifest.
        """
        try:
            record: dict[str, Any] = json.loads(data)
            if record.pop("schema_version") != SCHEMA_VERSION:
                raise ValueError("unknown schema_version")
            record["rows"] = RowCounts.from_details(record["rows"])
            record["model"] = ManifestModel(**record["model"])
            for key in ("files", "rejects"):
                record[key] = tuple(ManifestFile(**file) for file in record[key])
            return Manifest(**record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateCorrupt(
                "a manifest is damaged",
                where=where,
                found=f"{type(error).__name__}: {error}",
                expected="the JSON a commit wrote",
                next_step="restore the file; nothing is published from this job as it is",
            ) from error

    def is_same_output(self, other: Manifest) -> bool:
        """Whether both name the same rows; when they were made does not count."""
        return asdict(self) | {"created": ""} == asdict(other) | {"created": ""}


def make_manifest(
    receipts: Iterable[Receipt],
    *,
    number: int,
    job: str,
    plan: str,
    model: ModelVersion,
    schema: bytes,
    pruned_rows: int,
    created: str,
    stage: int = 0,
) -> Manifest:
    """The manifest of ``receipts``: those of every partition that was not split, in source order.

    :param pruned_rows: rows that statistics proved unwanted; no partition has them, and they count as filtered.
    :raises ReconciliationFailed: when the rows do not add up.
    """
    done = [receipt for receipt in receipts if not receipt.splits]
    pruned = RowCounts(rows_in=pruned_rows, filtered=pruned_rows)
    rows = RowCounts.total(receipt.rows for receipt in done) + pruned
    files = tuple(_file(receipt.partition, receipt.data, stage=stage) for receipt in done if receipt.data)
    rejects = tuple(_file(receipt.partition, receipt.rejects, stage=stage) for receipt in done if receipt.rejects)
    reconcile(rows, files=files, rejects=rejects)
    reasons: dict[str, int] = {}
    for receipt in done:
        for reason, count in receipt.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return Manifest(
        number=number,
        job=job,
        plan=plan,
        model=ManifestModel(model.name, model.version, model.digest),
        schema=schema.hex(),
        files=files,
        rejects=rejects,
        rows=rows,
        created=created,
        reasons=dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
    )


def reconcile(rows: RowCounts, *, files: Iterable[ManifestFile], rejects: Iterable[ManifestFile]) -> None:
    """Check that every row is in exactly one place and that the files hold as many as are counted.

    :raises ReconciliationFailed: when not.
    """
    out, rejected = sum(file.rows for file in files), sum(file.rows for file in rejects)
    if rows.is_reconciled and out == rows.out and rejected == rows.rejected:
        return
    raise ReconciliationFailed(
        "the rows do not add up; nothing was published",
        found=f"{rows.rows_in:,} in, {rows.out:,} out, {rows.rejected:,} rejected, {rows.filtered:,} filtered; "
        f"the files hold {out:,} out and {rejected:,} rejected",
        expected="rows in = rows out + rejected + filtered, and as many in the files",
        next_step="this is a defect of this package, not of your data: keep the job directory and report it",
    )


def _file(partition: str, file: DataFile, *, stage: int) -> ManifestFile:
    return ManifestFile(partition, f"stages/{stage}/{file.name}", file.rows, file.bytes, file.sha256)
