"""A small job directory without a cluster or a model: input files, a plan by hand, and receipts with their files.

The "score" of a row is twice its id, so that a test knows the expected output.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.checksum import checksum_bytes
from pipeline.common.rows import Fragment, InputFile, RowCounts, RowGroup
from pipeline.driver.retry import find_rejected
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import acquire_lease
from pipeline.jobs.receipts import DataFile, FragmentCounts, Receipt, Timings
from pipeline.jobs.rounds import Round, RoundReason, make_record
from pipeline.jobs.status import Status
from pipeline.models.model import Feature, ModelVersion
from pipeline.plan.plan import Partition, Plan
from pipeline.plan.recipe import REJECT_FILE, REJECT_MESSAGE, REJECT_REASON, REJECT_ROW
from pipeline.report.build import make_report
from pipeline.sinks.parquet.sink import ParquetSink
from pipeline.spec.job_spec import JobSpec
from pipeline.storage.store import Store
from pipeline.storage.urls import is_local_path

SOURCE_SCHEMA = pa.schema([("id", pa.int64()), ("x", pa.float32())])
OUTPUT_SCHEMA = pa.schema([("id", pa.int64()), ("p", pa.float32())])
REASON = "contract:x:null"
_GROUP_ROWS = 10
_LEASE_SECONDS = 2.0
_MODEL_DIGEST = hashlib.sha256(b"model").hexdigest()


@dataclass(frozen=True)
class SmallJob:
    """The data of a job that `write_receipts` and tests need."""

    plan: Plan
    bad_every: int = 0
    """Ids divisible by this number are rejected; 0: none."""

    @cached_property
    def expected(self) -> pa.Table:
        """Expected output, in source order."""
        ids = [row for file in self.plan.files for row in _ids(file) if not self.is_bad(row)]
        return _output(np.array(ids, dtype=np.int64))

    def is_bad(self, row: int) -> bool:
        """Return True if the row with this id is rejected."""
        return bool(self.bad_every) and row % self.bad_every == 0


def small_job(
    folder: Path,
    *,
    sink: str | Mapping[str, Any],
    mode: str = "error",
    rows: Sequence[int] = (30, 5, 40),
    start: int = 0,
    bad_every: int = 0,
    pruned: int = 0,
    name: str = "small",
    **sink_fields: Any,
) -> SmallJob:
    """Write input files with the numbers of rows in ``rows`` into ``folder``, and plan one partition per file.

    :param sink: path of the sink, or its fields.
    :param start: id of the first row.
    :param pruned: number of row groups at the end of the last file that statistics rule out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: list[InputFile] = []
    for number, count in enumerate(rows):
        path = folder / f"in-{number}.parquet"
        ids = np.arange(start, start + count, dtype=np.int64)
        table = pa.table({"id": ids, "x": ids.astype(np.float32)}, schema=SOURCE_SCHEMA)
        pq.write_table(table, path, row_group_size=_GROUP_ROWS)
        is_last = number == len(rows) - 1
        files.append(_input_file(path, keep=-pruned if is_last and pruned else None))
        start += count
    partitions = tuple(Partition(f"{number:05d}", (_fragment(file),)) for number, file in enumerate(files))
    spec = JobSpec.model_validate(
        {
            "name": name,
            "source": {"path": str(folder)},
            "steps": [{"score": {"model": "model.ubj", "output": "p", "keep": ["id"]}}],
            "sink": {**({"path": sink} if isinstance(sink, str) else sink), "mode": mode, **sink_fields},
            "errors": {"max_fraction": 0.5},
        }
    )
    return SmallJob(_plan(spec, tuple(files), partitions), bad_every)


def open_retry(directory: JobDirectory, *, epoch: int = 1, **options: Any) -> Round:
    """Open a round that retries the rejected rows.

    :param options: further parameters of `make_record`.
    """
    ledger = directory.ledger()
    found = find_rejected(directory.store, ledger, threads=1)
    partitions = tuple(Partition(f"{number:05d}", fragments) for number, fragments in enumerate(found.partitions))
    plan = replace(ledger.last.plan, files=found.files, partitions=partitions, pruned_rows=0)
    options = {"supersedes": {}, "created": "2026-01-01T12:00:00.000Z", "reason": RoundReason.RETRY, **options}
    return directory.rounds.open(make_record(plan, number=directory.rounds.next_number(), epoch=epoch, **options), plan)


def write_receipt(
    directory: JobDirectory, job: SmallJob, partition: Partition, *, attempt: str = "a", of: Round | None = None
) -> Receipt:
    """Score a partition as a worker does: data, rejects, then the receipt if absent. Return the receipt that counts.

    :param of: round of the partition; default: the first. ``job`` decides which rows are bad, also in a retry.
    """
    store, round = directory.store, of.number if of else 0
    parts = [_read(fragment, store) for fragment in partition.fragments]
    files = tuple(
        FragmentCounts(
            fragment.path,
            fragment.row_start,
            fragment.row_stop,
            _counts(len(ids), sum(job.is_bad(row) for row in ids)),
        )
        for fragment, ids in zip(partition.fragments, parts, strict=True)
    )
    ids = np.array([row for part in parts for row in part], dtype=np.int64)
    bad = np.array([job.is_bad(row) for row in ids], dtype=bool)
    name = f"{partition.id}-{attempt}.parquet"
    data = _write(store, f"data/{name}", _output(ids[~bad]), round) if (~bad).any() else None
    rejected = _rejected(job, [row for part in parts for row in part if job.is_bad(row)])
    rejects = _write(store, f"rejects/{name}", rejected, round) if bad.any() else None
    is_again = bool(partition.fragments[0].rejected_from)
    receipt = Receipt(
        partition=partition.id,
        plan=of.digest if of else directory.record.plan,
        model=_MODEL_DIGEST,
        attempt=attempt,
        data=data,
        rejects=rejects,
        rows=RowCounts.total(file.rows for file in files),
        files=files,
        seconds=Timings(0.1, 0.0, 0.2, 0.1, 0.0, 0.4),
        reasons={REASON: int(bad.sum())} if bad.any() else {},
        round=round,
        before={REASON: len(ids)} if is_again else {},
        ended=1_800_000_000.0,
    )
    place = layout.receipt_path(round, partition.id)
    if store.put_if_absent(place, receipt.to_json_bytes()):
        return receipt
    return Receipt.from_json(store.read(place))


def write_receipts(directory: JobDirectory, job: SmallJob, *, attempt: str = "a") -> tuple[Receipt, ...]:
    """Write the receipts of all partitions of the last round that have none; return all receipts of the job."""
    ledger = directory.ledger()
    for partition in ledger.todo:
        write_receipt(directory, job, partition, attempt=attempt, of=ledger.last)
    return directory.receipts.all()


def drive(job: SmallJob, directory: JobDirectory, *, sink: ParquetSink) -> None:
    """Run a job to its end as a driver does: lease, receipts, commit, publish, report. Resumes an unfinished job.

    A lease left by a driver that died in this process is taken over without waiting.
    """
    if directory.is_ended:
        return
    ticks = itertools.count()
    lease = acquire_lease(
        directory.store, lease_seconds=_LEASE_SECONDS, clock=lambda: next(ticks), pause=lambda _: None
    )
    directory.events.append("driver", epoch=lease.epoch)
    directory.set_status(Status.RUNNING)
    receipts = write_receipts(directory, job)
    directory.set_status(Status.PUBLISHING)
    ledger = directory.ledger(receipts)
    manifest = directory.manifests.prepare(ledger)
    lease.check()
    sink.publish(directory.manifests.commit(manifest).manifest, directory, check_lease=lease.check)
    status = Status.SUCCEEDED_WITH_WARNINGS if job.bad_every else Status.SUCCEEDED
    directory.write_report(make_report(directory, ledger=ledger, status=status).to_dict())
    directory.set_status(status)
    lease.release()


def read_output(path: str | Path) -> pa.Table:
    """Read every Parquet file of a folder in name order, as a reader without knowledge of manifests does."""
    if is_local_path(str(path)):
        names = sorted(file for file in Path(path).iterdir() if file.suffix == ".parquet")
        tables = [pq.read_table(file, use_threads=False) for file in names]
    else:
        import fsspec

        system, base = fsspec.core.url_to_fs(str(path))
        tables = [pq.read_table(io.BytesIO(system.cat_file(name))) for name in sorted(system.glob(f"{base}/*.parquet"))]
    return pa.concat_tables(tables).replace_schema_metadata(None).combine_chunks()


def _plan(spec: JobSpec, files: tuple[InputFile, ...], partitions: tuple[Partition, ...]) -> Plan:
    version = ModelVersion(
        name="model",
        version=_MODEL_DIGEST[:12],
        uri="model.ubj",
        digest=_MODEL_DIGEST,
        flavor="xgboost",
        nbytes=1,
        features=(Feature("x"),),
        task="regression",
        outputs=1,
    )
    return Plan(
        spec=spec,
        model=version,
        files=files,
        partitions=partitions,
        source_columns=("id", "x"),
        source_schema=SOURCE_SCHEMA.serialize().to_pybytes(),
        output_schema=OUTPUT_SCHEMA.serialize().to_pybytes(),
        source_rules=(),
        score_rules=(),
        features=("x",),
        keep=("id",),
        outputs=("p",),
        batch_rows=1000,
        pruned_rows=sum(group.rows for file in files for group in file.row_groups if not group.selected),
        task_memory=1 << 20,
    )


def _input_file(path: Path, *, keep: int | None) -> InputFile:
    status, metadata = path.stat(), pq.read_metadata(path)
    sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    wanted = len(sizes[:keep])
    groups = tuple(RowGroup(rows, rows * 12, rows * 12, number < wanted) for number, rows in enumerate(sizes))
    return InputFile(str(path), status.st_size, f"mtime:{status.st_mtime_ns}", groups)


def _fragment(file: InputFile) -> Fragment:
    wanted = [group for group in file.row_groups if group.selected]
    rows = sum(group.rows for group in wanted)
    return Fragment(file.path, 0, rows, 0, len(wanted), rows * 12)


def _ids(file: InputFile) -> list[int]:
    return _read(_fragment(file))


def _read(fragment: Fragment, store: Store | None = None) -> list[int]:
    data = store.read(fragment.path) if store and fragment.rejected_from else Path(fragment.path).read_bytes()
    return list(_ids_of(data)[fragment.row_start : fragment.row_stop])


@lru_cache(maxsize=256)
def _ids_of(data: bytes) -> tuple[int, ...]:
    """Return the ids of a Parquet file of some rows; sweeps read the same few files thousands of times."""
    table = pq.read_table(io.BytesIO(data), columns=["id"], use_threads=False)
    return tuple(table.column("id").to_pylist())


def _counts(rows: int, bad: int) -> RowCounts:
    return RowCounts(rows, rows - bad, bad, 0)


def _output(ids: np.ndarray) -> pa.Table:
    return pa.table({"id": ids, "p": (2 * ids).astype(np.float32)}, schema=OUTPUT_SCHEMA)


def _rejected(job: SmallJob, ids: list[int]) -> pa.Table:
    """Return the rows as rejects, each with its real input file and row number."""
    places = {row: (file.path, number) for file in job.plan.files for number, row in enumerate(_ids(file))}
    return pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "x": pa.nulls(len(ids), pa.float32()),
            REJECT_FILE: [places[row][0] for row in ids],
            REJECT_ROW: pa.array([places[row][1] for row in ids], pa.int64()),
            REJECT_REASON: [REASON] * len(ids),
            REJECT_MESSAGE: ["x is null"] * len(ids),
        }
    )


def _write(store: Store, name: str, table: pa.Table, round: int) -> DataFile:
    sink = io.BytesIO()
    pq.write_table(table, sink, write_page_checksum=True)
    data = sink.getvalue()
    # An earlier attempt of the same name may have died here; real attempts have unique names.
    store.remove(layout.round_file(round, name))
    with store.open_output(layout.round_file(round, name)) as output:
        output.write(data)
    return DataFile(name, table.num_rows, len(data), checksum_bytes(data))


def commit(directory: JobDirectory) -> int:
    """Commit a manifest of all receipts of a job. Return its number."""
    return directory.manifests.commit(directory.manifests.prepare(directory.ledger())).manifest.number
