"""Figures of a report, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from pipeline.common.rows import RowCounts
from pipeline.common.units import format_count, format_seconds
from pipeline.errors import PipelineError
from pipeline.jobs.ledger import RoundSummary
from pipeline.models.engines import EngineUse

SHOWN_ROUNDS = 3
"""Number of rounds of retries shown in a text, counted from the last."""


@dataclass(frozen=True)
class ModelId:
    """The model version that scored a job."""

    name: str
    version: str
    digest: str
    """SHA-256 of the file."""
    rounds: str = ""
    """Boosting rounds that were scored, where some were selected or early stopping named a best one."""

    def to_dict(self) -> dict[str, str]:
        """Return the fields for JSON; ``rounds`` only where it says something."""
        return {name: value for name, value in asdict(self).items() if name != "rounds" or value}

    def __str__(self) -> str:
        parts = [self.name, f"version {self.version}" if self.version else ""]
        text = " ".join(part for part in parts if part)
        return f"{text} (sha256 {self.digest[:16]})" if self.digest else text


@dataclass(frozen=True)
class JobTimings:
    """Seconds of a job, to the millisecond. The phases are sums over partitions, which run concurrently."""

    total: float = 0.0
    """Wall time of all drivers."""
    provision: float = 0.0
    """Part of ``total`` spent waiting for workers."""
    read: float = 0.0
    steps: float = 0.0
    score: float = 0.0
    write: float = 0.0
    model_load: float = 0.0

    @property
    def phases(self) -> dict[str, float]:
        """The sums over partitions, by phase."""
        return {name: value for name, value in asdict(self).items() if name not in ("total", "provision")}


@dataclass(frozen=True)
class RunningFigures:
    """What a driver that runs now has reached."""

    rows_per_second: float = 0.0
    """Rate of the last batches; before the first one, of the partitions that are done since the round began."""
    seconds_left: float | None = None
    """Seconds until the last row is scored, at that rate; None while nothing is done."""
    workers: int = 0
    """Workers at the start; 0 before they are connected."""
    dashboard: str = ""
    """URL of the scheduler's dashboard."""

    def speed(self) -> str:
        """Return the rate and what remains; empty while nothing is done."""
        if self.seconds_left is None:
            return ""
        return f"{format_count(self.rows_per_second)} rows/s now, about {format_seconds(self.seconds_left)} left"


@dataclass(frozen=True)
class PartitionCounts:
    """Partitions of a job. A split partition is replaced by its parts."""

    done: int
    planned: int


@dataclass(frozen=True)
class StageReport:
    """Result of one stage of a job."""

    stage: str
    """Name of its folder below ``steps``."""
    steps: str
    """Numbers of its steps, such as ``0-1``."""
    status: str
    """``sealed`` once its rows are all done, else the status of its own job."""
    rows: RowCounts
    done: int
    """Completed partitions."""
    planned: int
    seconds: float
    """Seconds summed over partitions."""
    bytes: int
    """Bytes of its files."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON output."""
        return {**asdict(self), "rows": self.rows.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(**{**record, "rows": RowCounts.from_dict(record["rows"])})


@dataclass(frozen=True)
class Skew:
    """Unevenness of the work."""

    before: float
    """Rows of the largest input file / mean rows of a file."""
    after: float
    """Rows of the largest partition / mean rows of a partition."""
    slowest_seconds: float
    """Wall time of the slowest partition."""
    mean_seconds: float


@dataclass(frozen=True)
class BatchRows:
    """Rows per batch."""

    planned: int
    remembered: int | None = None
    """Batch size taken from an earlier job with this model on such workers; None if there is none."""
    smallest: int | None = None
    """Smallest batch size with which a partition ended; None before the first partition is done."""


@dataclass(frozen=True)
class StragglerCounts:
    """Mitigations of partitions that ran far too long."""

    backups: int = 0
    """Partitions that got a copy on another worker."""
    split_slow: int = 0
    """Partitions on slow workers whose remaining rows were scored by other workers."""
    split_frozen: int = 0
    """Partitions split as a whole because their worker did not answer."""
    split_idle_workers: int = 0
    """Partitions that were not slow, shared with idle workers."""
    reassigned: int = 0
    """Partitions given to another worker before they started."""
    won: int = 0
    """Mitigations that finished before the slow attempt."""
    seconds_won: float = 0.0
    """Seconds that the mitigations saved in all, compared with the estimates."""

    @property
    def helped(self) -> int:
        """Partitions that ran too long and got help."""
        return self.backups + self.split_slow + self.split_frozen


@dataclass(frozen=True)
class ShadowUse:
    """Agreement of a challenger with the column that it was compared with."""

    column: str
    """Output column of the challenger."""
    other: str
    rows: int
    """Rows whose two scores were compared."""
    agreed: int | None
    """Rows with the same decision: the same side of 0.5 (predictions) or 0 (margins), or the same label. None for
    scores without a decision."""
    mean: float
    """Mean difference challenger - other."""
    mean_absolute: float
    largest: float
    """Largest absolute difference."""
    missing: int
    """Rows in which one of the two scores is null or not finite."""
    errors: int
    """Rows that the challenger could not score."""
    seconds: float = 0.0
    """Seconds of the challenger's predictions, over all partitions."""
    other_seconds: float = 0.0
    """Seconds of the predictions of ``other``; 0.0 if no ``score`` step made it."""
    histogram: tuple[tuple[int, int, int], ...] = ()
    """Bucket of the challenger's score, bucket of the other, rows; see `pipeline.common.agreement.buckets`."""

    def text(self) -> str:
        """Describe the agreement in a line."""
        parts = (
            [f"{self.rows:,} rows compared"] if self.agreed is None else [f"{self._share} of {self.rows:,} rows agree"]
        )
        parts += [f"mean difference {self.mean:+.3g}, absolute {self.mean_absolute:.3g}, largest {self.largest:.3g}"]
        parts += [f"{self.missing:,} without a score"] if self.missing else []
        parts += [f"{self.errors:,} that it could not score"] if self.errors else []
        if self.seconds and self.other_seconds:
            parts.append(f"predicts in {self.seconds / self.other_seconds:.2f} × the time")
        return f"{self.column} against {self.other}: {'; '.join(parts)}"

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> ShadowUse:
        """Return the use whose fields ``record`` has."""
        return ShadowUse(**{**record, "histogram": tuple(map(tuple, record.get("histogram", ())))})

    @property
    def _share(self) -> str:
        share = (self.agreed or 0) / self.rows if self.rows else 0.0
        return f"{int(share * 10_000) / 100:.2f} %"  # rounded down: 100 % means all


@dataclass(frozen=True)
class EngineEvidence:
    """The engine that evaluated the model, and the evidence for that choice, over all partitions."""

    use: EngineUse
    tolerance: float
    """Largest difference of margins that counts as equal; 0.0 requires equal bits."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of ``use``, with ``speedup`` and ``tolerance``."""
        record = self.use.to_dict()
        return {**record, "speedup": round(self.use.speedup, 3), "tolerance": self.tolerance}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        use = {name: value for name, value in record.items() if name not in ("speedup", "tolerance")}
        return cls(EngineUse.from_dict(use), record["tolerance"])


@dataclass(frozen=True)
class DeviceUse:
    """Work of one GPU."""

    uuid: str
    name: str
    """Name of the product; the UUID if no worker reported it."""
    driver: str
    """Version of the driver; empty if no worker reported it."""
    rows: int
    """Rows whose result came from the GPU."""
    peak_bytes: int
    """Peak bytes of device memory of a worker process."""

    def __add__(self, other: DeviceUse) -> DeviceUse:
        return replace(self, rows=self.rows + other.rows, peak_bytes=max(self.peak_bytes, other.peak_bytes))


@dataclass(frozen=True)
class JobError:
    """The error that failed a job."""

    kind: str
    """Name of the class."""
    message: str
    where: str = ""
    found: str = ""
    expected: str = ""
    next: str = ""
    exit_code: int = 1

    @classmethod
    def from_error(cls, error: PipelineError) -> Self:
        """Copy the texts of ``error``."""
        return cls(**error.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the error, without empty ones."""
        return {name: value for name, value in asdict(self).items() if value != ""}


def rounds_text(rounds: tuple[RoundSummary, ...]) -> str:
    """Return the results of the last `SHOWN_ROUNDS` retries."""
    texts = [
        f"round {summary.round} ({summary.reason}): "
        f"{summary.recovered:,} of {summary.retried:,} rejected rows recovered"
        for summary in rounds
        if summary.retried
    ]
    return "; ".join(texts[-SHOWN_ROUNDS:])
