"""`Receipt`: the small JSON that says a partition is done, and what became of its rows."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.common.pickling import quickly_pickled
from pipeline.common.rows import RowCounts
from pipeline.errors import StateCorrupt
from pipeline.models.engines import EngineUse


@quickly_pickled
@dataclass(frozen=True, slots=True)
class DataFile:
    """A file a worker wrote, by the only name it is ever opened under."""

    name: str
    """Relative to the stage's folder, such as ``data/00003-<unique>.parquet``."""
    rows: int
    bytes: int
    sha256: str


@quickly_pickled
@dataclass(frozen=True, slots=True)
class FileRows:
    """What became of the rows of one range of one input file."""

    path: str
    row_start: int
    row_stop: int
    rows: RowCounts


@quickly_pickled
@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the wall time of an attempt went. Reading overlaps scoring, so that the parts may exceed ``total``."""

    read: float = 0.0
    steps: float = 0.0
    score: float = 0.0
    write: float = 0.0
    model_load: float = 0.0
    total: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.read + other.read,
            self.steps + other.steps,
            self.score + other.score,
            self.write + other.write,
            self.model_load + other.model_load,
            self.total + other.total,
        )


@quickly_pickled
@dataclass(frozen=True, slots=True)
class Receipt:
    """A committed partition. The first one put for a partition is the one that counts."""

    partition: str
    plan: str
    """Digest of the plan it belongs to."""
    model: str
    """Digest of the model version that scored it."""
    attempt: str
    """Unique name of the attempt; part of its files' names."""
    data: DataFile | None
    """None when no row came out."""
    rejects: DataFile | None
    """None when no row was rejected."""
    rows: RowCounts
    files: tuple[FileRows, ...]
    """Per fragment, in the order of the partition."""
    seconds: Seconds = Seconds()
    worker: str = ""
    batch_rows: int = 0
    """Rows per batch at the end; smaller than planned when memory ran short."""
    peak_memory: int = 0
    """Most resident bytes the worker process had had by then; 0 where that cannot be told."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Rejected rows per reason."""
    splits: tuple[str, ...] = ()
    """Ids of the parts that took this partition's place; then there are no rows here."""
    cuts: tuple[int, ...] = ()
    """First row of every part but the first, counted over the partition's fragments; empty: halves."""
    engine: EngineUse | None = None
    """What evaluated the model; None in receipts of older versions."""
    stage: int = 0
    """Number of the round; its files lie in ``stages/<stage>``."""
    before: dict[str, int] = field(default_factory=dict)
    """Rows in that an earlier round had rejected, per reason it had; empty where the rows come from input files."""

    def to_json(self) -> bytes:
        """As stored, one line, with a schema version."""
        # Without the ranges of files, of which there may be thousands: what follows is as long as that.
        record = asdict(replace(self, files=()))
        record["rows"] = self.rows.details()
        record["files"] = [[f.path, f.row_start, f.row_stop, f.rows.details()] for f in self.files]
        return json.dumps({"schema_version": 1, **record}, sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes, *, where: str = "") -> Receipt:
        """Inverse of `to_json`.

        :raises StateCorrupt: for anything that is not a whole receipt.
        """
        try:
            record: dict[str, Any] = json.loads(data)
            if record.pop("schema_version") != 1:
                raise ValueError("unknown schema_version")
            record["rows"] = RowCounts.from_details(record["rows"])
            files = record["files"]
            record["files"] = tuple(FileRows(sys.intern(p), a, b, RowCounts.from_details(r)) for p, a, b, r in files)
            # A driver holds the receipts of all partitions: what is the same in each is held once.
            for key in {"plan", "model", "worker"} & record.keys():
                record[key] = sys.intern(record[key])
            record["seconds"] = Seconds(**record["seconds"])
            record["splits"] = tuple(record["splits"])
            record["cuts"] = tuple(record.get("cuts", ()))
            if record.get("engine") is not None:
                record["engine"] = _engine_use(record["engine"])
            for key in ("data", "rejects"):
                record[key] = DataFile(**record[key]) if record[key] is not None else None
            return Receipt(**record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateCorrupt(
                "a receipt is damaged",
                where=where,
                found=f"{type(error).__name__}: {error}",
                expected="the JSON a worker wrote",
                next_step="remove the file and resume: its partition is scored again",
            ) from error


def _engine_use(record: dict[str, Any]) -> EngineUse:
    return EngineUse(**{**record, "kernels": tuple(record["kernels"]), "reasons": tuple(record["reasons"])})
