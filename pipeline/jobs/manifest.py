"""`Manifest`: the numbered list of files that make up an output. Writing it is the commit."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pipeline.common.checksum import from_stored
from pipeline.common.rows import RowCounts
from pipeline.errors import ReconciliationFailed, StateCorrupt
from pipeline.jobs import layout
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.receipts import DataFile, Receipt
from pipeline.jobs.rounds import model_details
from pipeline.plan.stages import SealedInput

SCHEMA_VERSION = 2
"""Manifests of version 1 had SHA-256 for a checksum; they are read."""
_LISTS = ("files", "rejects")
"""Fields that are lists of files."""


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of a partition."""

    partition: str
    name: str
    """Relative to the job directory, such as ``rounds/0/data/00003-<unique>.parquet``."""
    rows: int
    bytes: int
    checksum: str
    """See `pipeline.common.checksum`."""

    @property
    def round(self) -> int:
        """Number of the round that wrote the file."""
        return layout.round_of(self.name)


@dataclass(frozen=True)
class ManifestModel:
    """A model version that scored rows of the output."""

    name: str
    version: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """The content of one commit of a job."""

    number: int
    """1 for the first commit of the job."""
    job: str
    plan: str
    """Digest of the plan."""
    model: ManifestModel
    """Model version of the first round that counts. A retry may use another version, see ``models``."""
    schema: str
    """Arrow schema of the output, as its IPC bytes in hexadecimal digits."""
    files: tuple[ManifestFile, ...]
    """Output files by round, in source order."""
    rejects: tuple[ManifestFile, ...]
    """Files of rows that are still rejected."""
    rows: RowCounts
    created: str
    """UTC, ISO 8601."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Rejected rows per reason."""
    round: int = 0
    """Number of the last round that the manifest covers."""
    models: dict[int, ManifestModel] = field(default_factory=dict)
    """Model version of each round that has output files."""
    quarantined_files: tuple[str, ...] = ()
    """Input files that were quarantined. No count includes their rows."""
    inputs: tuple[SealedInput, ...] = ()
    """Of a stage: the manifests whose files it reads. Of a job of stages: the manifest of each stage, in order. Left
    out of the stored form if empty."""

    def to_json_bytes(self) -> bytes:
        """The manifest as stored: one JSON object with a schema version, a line per field and per file."""
        record = {field.name: getattr(self, field.name) for field in fields(self)} | {"rows": self.rows.to_dict()}
        text = io.BytesIO()
        text.write(f'{{\n "schema_version": {SCHEMA_VERSION}'.encode())
        for name, value in record.items():
            if name == "inputs" and not value:
                continue
            text.write(f',\n "{name}": '.encode())
            if name in _LISTS:
                _write_files(text, value)
            else:
                text.write(json.dumps(value, default=asdict).encode())
        text.write(b"\n}\n")
        return text.getvalue()

    @staticmethod
    def from_json(data: bytes, *, where: str = "") -> Manifest:
        """Inverse of `to_json_bytes`.

        :raises StateCorrupt: for anything but a complete manifest.
        """
        try:
            record: dict[str, Any] = json.loads(data)
            if record.pop("schema_version") not in (1, SCHEMA_VERSION):
                raise ValueError("unknown schema_version")
            record["rows"] = RowCounts.from_dict(record["rows"])
            record["model"] = ManifestModel(**record["model"])
            record["models"] = {int(n): ManifestModel(**model) for n, model in record.get("models", {}).items()}
            record["quarantined_files"] = tuple(record.get("quarantined_files", ()))
            record["inputs"] = tuple(SealedInput(**one) for one in record.get("inputs", ()))
            for key in _LISTS:
                record[key] = tuple(ManifestFile(**from_stored(file)) for file in record[key])
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
        """True if both manifests name the same rows. ``created``, ``round`` and ``models`` are not compared."""
        names = {field.name for field in fields(self)} - {"created", "round", "models"}
        return all(getattr(self, name) == getattr(other, name) for name in names)


def _write_files(text: io.BytesIO, files: Iterable[ManifestFile]) -> None:
    """Write the files one by one: there may be very many."""
    names = [field.name for field in fields(ManifestFile)]
    separator = "\n  "
    text.write(b"[")
    for file in files:
        text.write(f"{separator}{json.dumps({name: getattr(file, name) for name in names})}".encode())
        separator = ",\n  "
    text.write(b"\n ]")


def make_manifest(ledger: Ledger, *, number: int, job: str, plan: str, created: str) -> Manifest:
    """Make the manifest of ``ledger``, once every partition is done.

    :param plan: Digest of the job's plan.
    :raises ReconciliationFailed: when the rows do not add up.
    """
    files: list[ManifestFile] = []
    rejects: list[ManifestFile] = []
    for receipt in ledger.done:
        if receipt.data:
            files.append(_file(receipt, receipt.data))
        if receipt.rejects and ledger.still_rejected_ranges(receipt):
            rejects.append(_file(receipt, receipt.rejects))
    reconcile(ledger.rows, files=files, rejects=rejects)
    base = ledger.base.plan
    return Manifest(
        number=number,
        job=job,
        plan=plan,
        model=ManifestModel(**model_details(base)),
        schema=base.output_schema.hex(),
        files=tuple(files),
        rejects=tuple(rejects),
        rows=ledger.rows,
        created=created,
        reasons=ledger.reasons,
        round=ledger.last.number,
        models={
            n: ManifestModel(**model_details(ledger.round(n).plan)) for n in sorted({file.round for file in files})
        },
        quarantined_files=tuple(file.path for file in ledger.quarantined_files),
        inputs=ledger.inputs,
    )


def reconcile(rows: RowCounts, *, files: Iterable[ManifestFile], rejects: Iterable[ManifestFile]) -> None:
    """Check that every row is counted exactly once, and that the files hold as many rows as are counted.

    :raises ReconciliationFailed: when the numbers differ.
    """
    out, rejected = sum(file.rows for file in files), sum(file.rows for file in rejects)
    if rows.is_reconciled and out == rows.output and rejected == rows.rejected:
        return
    raise ReconciliationFailed(
        "the rows do not add up; nothing was published",
        found=f"{rows.input:,} in, {rows.output:,} out, {rows.rejected:,} rejected, {rows.filtered:,} filtered; "
        f"the files hold {out:,} out and {rejected:,} rejected",
        expected="rows in = rows out + rejected + filtered, and as many in the files",
        next_step="this is a defect of this package, not of your data: keep the job directory and report it",
    )


def _file(receipt: Receipt, file: DataFile) -> ManifestFile:
    return ManifestFile(
        receipt.partition, layout.round_file(receipt.round, file.name), file.rows, file.bytes, file.checksum
    )
