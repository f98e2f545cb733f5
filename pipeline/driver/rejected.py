"""The rows of a job that are still rejected, as files and partitions of a plan, for a round that tries them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.common.rows import Fragment, InputFile, RowGroup
from pipeline.errors import StateCorrupt
from pipeline.jobs.ledger import Ledger, rejects_place
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.splits import sub_fragment
from pipeline.plan.packing import pack
from pipeline.plan.recipe import REJECT_FILE
from pipeline.storage.store import Store

_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class RejectedRows:
    """Rows to try again."""

    files: tuple[InputFile, ...]
    """The files of rejects that hold them."""
    partitions: tuple[tuple[Fragment, ...], ...]
    """The fragments of each partition: neighbouring rows that came from one input file."""

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(fragment.rows for fragments in self.partitions for fragment in fragments)


def find_rejected(store: Store, ledger: Ledger, *, threads: int) -> RejectedRows:
    """The rows that are still rejected, packed like those of input files.

    :param store: of the job directory.
    :param threads: of all workers together.
    :raises StateCorrupt: when a file of rejects is missing or damaged.
    """
    receipts = {rejects_place(one): one for one in ledger.done if ledger.left(one)}
    files = {place: _read_file(store, place, receipt) for place, receipt in receipts.items()}
    packed = pack([file.groups for file in files.values()], threads=threads)
    partitions = []
    for fragments in packed:
        cut = [
            part
            for fragment in fragments
            for part in _cut(fragment, files[fragment.path], left=ledger.left(receipts[fragment.path]))
        ]
        if cut:
            partitions.append(tuple(cut))
    return RejectedRows(tuple(file.groups for file in files.values()), tuple(partitions))


@dataclass(frozen=True)
class _File:
    groups: InputFile
    origins: tuple[tuple[int, int, str], ...]
    """First row, row after the last, and input file, of each run of rows that came from one."""


def _read_file(store: Store, place: str, receipt: Receipt) -> _File:
    assert receipt.rejects is not None
    try:
        with store.open_input(place) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
            metadata = file.metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            origins = tuple(_runs(file))
    except (OSError, pa.ArrowException) as error:
        raise StateCorrupt(
            "a file of rejects cannot be read",
            where=store.url(place),
            found=f"{type(error).__name__}: {error}",
            expected=f"{receipt.rejects.rows:,} rows, as its receipt says",
            next_step="restore the file, or run the job spec again as a new job",
        ) from error
    sizes = tuple(RowGroup(one.num_rows, one.total_byte_size, one.total_byte_size) for one in groups)
    version = f"sha256:{receipt.rejects.sha256}"
    return _File(InputFile(place, receipt.rejects.bytes, version, sizes), origins)


def _runs(file: pq.ParquetFile) -> Iterator[tuple[int, int, str]]:
    """First row, row after the last, and input file, of each run of rows of one input file; read batch by batch."""
    start = stop = 0
    current: str | None = None
    for batch in file.iter_batches(_BATCH_ROWS, columns=[REJECT_FILE]):
        encoded = pc.run_end_encode(batch.column(0))
        first = stop
        for end, path in zip(encoded.run_ends.to_pylist(), encoded.values.to_pylist(), strict=True):
            if current is not None and path != current:
                yield start, stop, current
                start = stop
            current, stop = path, first + end
    if current is not None:
        yield start, stop, current


def _cut(fragment: Fragment, file: _File, *, left: Sequence[tuple[int, int]]) -> Iterator[Fragment]:
    """The parts of ``fragment`` that are left, each from one input file."""
    for low, high in left:
        for start, stop, origin in file.origins:
            first, last = max(fragment.row_start, low, start), min(fragment.row_stop, high, stop)
            if first < last:
                part = sub_fragment(fragment, file.groups, row_start=first, row_stop=last)
                yield Fragment(part.path, first, last, part.group_start, part.group_stop, part.bytes, part.keys, origin)
