"""`Receipt`: the small JSON that marks a partition as done, with the counts of its rows.

`Receipts` holds the receipts of a job by round and partition. `SpooledReceipts` holds many of them in little memory.

`Totals` are the sums over the receipts of a job, from one pass over them. Pure.
"""

from __future__ import annotations

import json
import pickle
import struct
import sys
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from tempfile import SpooledTemporaryFile
from typing import Any

from pipeline.common.agreement import Agreement, merged
from pipeline.common.checksum import from_stored
from pipeline.common.pickling import fast_pickle
from pipeline.common.rows import RowCounts
from pipeline.common.step_output import MessageCount
from pipeline.errors import StateCorrupt
from pipeline.models.engines import EngineUse

SCHEMA_VERSION = 3
"""Version of the stored form of a receipt. Receipts of version 2 had SHA-256 for a checksum; they are read."""


@fast_pickle
@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that a worker wrote, under the only name by which it is ever opened."""

    name: str
    """Relative to the round's folder, such as ``data/00003-<unique>.parquet``."""
    rows: int
    bytes: int
    checksum: str
    """See `pipeline.common.checksum`."""


@fast_pickle
@dataclass(frozen=True, slots=True)
class FragmentCounts:
    """Row counts of one range of one input file."""

    path: str
    row_start: int
    row_stop: int
    rows: RowCounts


@fast_pickle
@dataclass(frozen=True, slots=True)
class Timings:
    """Wall time of an attempt by activity, in seconds. Reading overlaps scoring, so the parts may exceed ``total``."""

    read: float = 0.0
    steps: float = 0.0
    score: float = 0.0
    write: float = 0.0
    model_load: float = 0.0
    total: float = 0.0

    def __add__(self, other: Timings) -> Timings:
        return Timings(
            self.read + other.read,
            self.steps + other.steps,
            self.score + other.score,
            self.write + other.write,
            self.model_load + other.model_load,
            self.total + other.total,
        )


@fast_pickle
@dataclass(frozen=True, slots=True)
class Receipt:
    """A committed partition. The first receipt that is stored for a partition counts."""

    partition: str
    plan: str
    """Digest of the plan that has the partition."""
    model: str
    """Digest of the model version that scored the partition."""
    attempt: str
    """Unique name of the attempt; part of the names of its files."""
    data: DataFile | None
    """None if no row was output."""
    rejects: DataFile | None
    """None if no row was rejected."""
    rows: RowCounts
    files: tuple[FragmentCounts, ...]
    """Row counts per fragment, in the order of the partition."""
    seconds: Timings = Timings()
    worker: str = ""
    batch_rows: int = 0
    """Rows per batch at the end; fewer than planned if memory ran short."""
    peak_memory: int = 0
    """Peak resident bytes of the worker process until then; 0 if unknown."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Rejected rows per reason."""
    splits: tuple[str, ...] = ()
    """Ids of the parts that replace this partition. The receipt of a split partition has no rows."""
    split_points: tuple[int, ...] = ()
    """First row of every part but the first, counted over the partition's fragments; empty unless it was split."""
    engine: EngineUse | None = None
    """Engine that evaluated the model; None if the partition was split."""
    round: int = 0
    """Number of the round; its files lie in ``rounds/<round>``."""
    before: dict[str, int] = field(default_factory=dict)
    """Input rows that an earlier round had rejected, per reason. Empty if the rows come from input files."""
    device: str = ""
    """UUID of the GPU that scored rows; empty if CPUs scored all of them. Left out of the stored form then."""
    device_peak: int = 0
    """Peak bytes of device memory of the worker process until then; left out of the stored form without a GPU."""

    agreements: dict[str, Agreement] = field(default_factory=dict)
    """Comparison of each challenger, by its output column; left out of the stored form if empty."""
    model_loads: int = 0
    """Loads of models by key into memory; left out of the stored form without any."""
    made: bool = False
    """True if a step made the rows of those of other partitions, too; ``files`` is empty then. Left out of the stored
    form if False."""
    content: dict[str, Any] = field(default_factory=dict)
    """Digest of such rows; see `pipeline.common.content`. Left out of the stored form if empty."""
    ended: float = 0.0
    """End of the attempt, in seconds since the epoch by the worker's clock; 0.0, and left out of the stored form, if
    unknown."""
    sketches: dict[str, Any] = field(default_factory=dict)
    """Distributions of scores and features, see `pipeline.common.sketch`; left out of the stored form if empty."""
    messages: tuple[MessageCount, ...] = ()
    """Prints and warnings of steps and models, by their place in the code; left out of the stored form if empty."""

    def to_json_bytes(self) -> bytes:
        """The receipt as stored: one line of JSON, with a schema version."""
        # The file ranges, of which there may be thousands, are left out here and added below in a short form;
        # `asdict` would copy every number of the sketches.
        record = asdict(replace(self, files=(), sketches={}))
        record["sketches"] = self.sketches
        if not self.device:
            del record["device"], record["device_peak"]
        if not self.agreements:
            del record["agreements"]
        if not self.model_loads:
            del record["model_loads"]
        if not self.ended:
            del record["ended"]
        if not self.sketches:
            del record["sketches"]
        if not self.messages:
            del record["messages"]
        if not self.made:
            del record["made"], record["content"]
        record["rows"] = self.rows.to_dict()
        record["files"] = [[f.path, f.row_start, f.row_stop, f.rows.to_dict()] for f in self.files]
        return json.dumps({"schema_version": SCHEMA_VERSION, **record}, sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes, *, where: str = "") -> Receipt:
        """Inverse of `to_json_bytes`.

        :raises StateCorrupt: for anything but a complete receipt.
        """
        try:
            record: dict[str, Any] = json.loads(data)
            if (version := record.pop("schema_version")) not in (2, SCHEMA_VERSION):
                raise ValueError(f"schema_version {version}")
            record["rows"] = RowCounts.from_dict(record["rows"])
            files = record["files"]
            record["files"] = tuple(FragmentCounts(sys.intern(p), a, b, RowCounts.from_dict(r)) for p, a, b, r in files)
            # A driver holds the receipts of all partitions: equal texts are held once.
            for key in {"plan", "model", "worker", "device"} & record.keys():
                record[key] = sys.intern(record[key])
            record["seconds"] = Timings(**record["seconds"])
            record["splits"] = tuple(record["splits"])
            record["split_points"] = tuple(record["split_points"])
            if record.get("engine") is not None:
                record["engine"] = EngineUse.from_dict(record["engine"])
            agreements = record.get("agreements", {})
            record["agreements"] = {name: Agreement.from_dict(part) for name, part in agreements.items()}
            record["messages"] = tuple(map(MessageCount.from_dict, record.get("messages", ())))
            for key in ("data", "rejects"):
                record[key] = DataFile(**from_stored(record[key])) if record[key] is not None else None
            return Receipt(**record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateCorrupt(
                "a receipt is damaged",
                where=where,
                found=f"{type(error).__name__}: {error}",
                expected=f"the JSON that a worker wrote, schema_version {SCHEMA_VERSION}",
                next_step="remove the file and resume: its partition is scored again",
            ) from error


SPOOLED = 4 << 20
"""Maximum bytes that a `SpooledReceipts` holds in memory; more go to a temporary file without a name."""
_LENGTH = struct.Struct("<I")


class Receipts:
    """Receipts by round and partition. If a partition has several, the last receipt is kept."""

    def __init__(self, receipts: Iterable[Receipt] = ()) -> None:
        self._kept: dict[int, dict[str, Any]] = {}
        self._splits: set[tuple[int, str]] = set()
        for receipt in receipts:
            self.add(receipt)

    def add(self, receipt: Receipt) -> None:
        """Add a receipt."""
        self._kept.setdefault(receipt.round, {})[receipt.partition] = self._keep(receipt)
        (self._splits.add if receipt.splits else self._splits.discard)((receipt.round, receipt.partition))

    def partitions(self, round: int) -> Collection[str]:
        """Return the ids of the partitions of a round that have a receipt."""
        return self._kept.get(round, {}).keys()

    def splits(self, round: int) -> dict[str, Receipt]:
        """Return the receipts of the split partitions of a round, by id of the partition."""
        return {partition: self.get(round, partition) for of, partition in self._splits if of == round}

    def is_split(self, round: int, partition: str) -> bool:
        """True if the receipt of the partition records a split."""
        return (round, partition) in self._splits

    def get(self, round: int, partition: str) -> Receipt:
        """Return the receipt of a partition.

        :raises KeyError: when the partition has no receipt.
        """
        return self._give(self._kept[round][partition])

    def sorted(self, key: Callable[[str], Any]) -> ReceiptView:
        """Return all receipts by round, then by ``key`` of the partition's id."""
        return ReceiptView(self, {round: tuple(sorted(held, key=key)) for round, held in sorted(self._kept.items())})

    def __iter__(self) -> Iterator[Receipt]:
        for held in self._kept.values():
            yield from map(self._give, held.values())

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def _keep(self, receipt: Receipt) -> Any:
        return receipt

    def _give(self, held: Any) -> Receipt:
        receipt: Receipt = held
        return receipt


class SpooledReceipts(Receipts):
    """Receipts in little memory: each access reads the receipt from a temporary file.

    A driver holds the receipts of all partitions, and reads them at the end. A receipt takes 2 kB as an object. Here
    a receipt takes 130 bytes, and 20 µs to read. Not for several threads at once.
    """

    def __init__(self, receipts: Iterable[Receipt] = ()) -> None:
        # The file has no name, so no other process can write to it.
        self._file = SpooledTemporaryFile(max_size=SPOOLED)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._end = 0
        super().__init__(receipts)

    def _keep(self, receipt: Receipt) -> int:
        data, offset = pickle.dumps(receipt, pickle.HIGHEST_PROTOCOL), self._end
        self._file.seek(offset)
        self._file.write(_LENGTH.pack(len(data)))
        self._file.write(data)
        self._end += _LENGTH.size + len(data)
        return offset

    def _give(self, offset: Any) -> Receipt:
        self._file.seek(offset)
        (length,) = _LENGTH.unpack(self._file.read(_LENGTH.size))
        receipt: Receipt = pickle.loads(self._file.read(length))
        return receipt


class ReceiptView(Collection[Receipt]):
    """A selection of `Receipts`, in an order. Each receipt is read during iteration."""

    def __init__(self, source: Receipts, names: Mapping[int, Collection[str]]) -> None:
        self._source = source
        self.names = names
        """Ids of partitions by round."""

    def __iter__(self) -> Iterator[Receipt]:
        return (self._source.get(round, name) for round, names in self.names.items() for name in names)

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def __contains__(self, receipt: object) -> bool:
        return any(receipt == one for one in self)


@dataclass(frozen=True)
class DeviceTotals:
    """Work of one GPU."""

    rows: int = 0
    """Rows whose result came from the GPU; repeated batches count each time."""
    peak_bytes: int = 0
    """Peak bytes of device memory of a process."""

    @staticmethod
    def of(receipt: Receipt) -> DeviceTotals:
        """Return the work of the GPU of a receipt."""
        return DeviceTotals(receipt.engine.device_rows if receipt.engine else 0, receipt.device_peak)

    def __add__(self, other: DeviceTotals) -> DeviceTotals:
        return DeviceTotals(self.rows + other.rows, max(self.peak_bytes, other.peak_bytes))


@dataclass(frozen=True)
class Totals:
    """Sums over receipts, from one pass: there may be very many receipts, and each is read from a file."""

    rows: RowCounts
    retried_rows: int
    """Input rows that earlier rounds had rejected."""
    reasons: Counter[str]
    """Rejected rows minus those that an earlier round had rejected, per reason."""
    seconds: Timings
    durations: array[float]
    """Seconds per partition, in the order of the receipts."""
    smallest_batch: int | None
    """Smallest final batch size of any partition, in rows; None if no receipt has a batch size."""
    engine: EngineUse | None
    """None if no receipt has an engine."""
    output_bytes: int
    devices: Mapping[str, DeviceTotals] = field(default_factory=dict)
    """Work of each GPU, by its UUID."""
    agreements: Mapping[str, Agreement] = field(default_factory=dict)
    """Comparison of each challenger, by its output column."""
    model_loads: int = 0
    """Loads of models by key into memory."""
    peak_memory: int = 0
    """Largest resident memory of a worker process in bytes; 0: unknown."""

    @staticmethod
    def of(receipts: Iterable[Receipt]) -> Totals:
        """Return the totals of ``receipts``."""
        rows_in = out = rejected = filtered = retried = output_bytes = loads = peak = 0
        seconds, durations = Timings(), array("d")
        reasons: Counter[str] = Counter()
        smallest: int | None = None
        engine: EngineUse | None = None
        devices: dict[str, DeviceTotals] = {}
        agreements: dict[str, Agreement] = {}
        for receipt in receipts:
            rows = receipt.rows
            rows_in, out = rows_in + rows.input, out + rows.output
            rejected, filtered = rejected + rows.rejected, filtered + rows.filtered
            if receipt.reasons or receipt.before:
                reasons.update(receipt.reasons)
                reasons.subtract(receipt.before)
                retried += sum(receipt.before.values())
            seconds += receipt.seconds
            durations.append(receipt.seconds.total)
            if receipt.batch_rows:
                smallest = min(smallest or receipt.batch_rows, receipt.batch_rows)
            if receipt.engine is not None:
                engine = receipt.engine if engine is None else engine + receipt.engine
            output_bytes += receipt.data.bytes if receipt.data else 0
            loads += receipt.model_loads
            peak = max(peak, receipt.peak_memory)
            if receipt.device:
                devices[receipt.device] = devices.get(receipt.device, DeviceTotals()) + DeviceTotals.of(receipt)
            if receipt.agreements:
                agreements = merged(agreements, receipt.agreements)
        total = RowCounts(rows_in, out, rejected, filtered)
        return Totals(
            total,
            retried,
            reasons,
            seconds,
            durations,
            smallest,
            engine,
            output_bytes,
            devices,
            agreements,
            loads,
            peak,
        )
