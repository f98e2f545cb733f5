"""The ledger: counts over all rounds, remaining rejects, and receipts that no longer count."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.common.rows import QuarantinedFile, RowCounts
from pipeline.common.units import utc_now
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.rounds import RoundReason, make_record
from pipeline.jobs.splits import halves, split_receipt
from pipeline.report.build import make_report
from pipeline.report.rejects import read_rejected, summarise
from pipeline.service.gc import sweep_job
from pipeline.testing.jobs import REASON, SmallJob, commit, open_retry, small_job, write_receipt, write_receipts


@pytest.fixture
def job(tmp_path: Path) -> SmallJob:
    """Return a job of 75 rows in files of 30, 5 and 40; the ids 0, 10, … 70 are bad."""
    return small_job(tmp_path / "lake", sink=str(tmp_path / "out"), bad_every=10, pruned=0)


def rejected_places(directory: JobDirectory) -> list[tuple[int, str, int]]:
    """Return id, file and row number of the rows still rejected."""
    rows = pa.Table.from_batches(list(read_rejected(directory))).to_pylist()
    return [(row["id"], Path(row["_file"]).name, row["_row"]) for row in rows]


def test_ledger_of_round_0_sums_its_receipts(directory: JobDirectory, job: SmallJob) -> None:
    """Without a retry, the ledger sums the receipts of round 0, and every reject counts."""
    receipts = write_receipts(directory, job)
    ledger = directory.ledger()
    assert tuple(ledger.done) == receipts
    assert ledger.todo == ()
    assert ledger.rows == RowCounts(75, 67, 8, 0)
    assert ledger.reasons == {REASON: 8}
    assert [ledger.still_rejected_ranges(receipt) for receipt in receipts] == [[(0, 3)], [(0, 1)], [(0, 4)]]
    assert ledger.summaries() == ()


def test_retry_that_recovers_all_rejects(directory: JobDirectory, job: SmallJob) -> None:
    """A retry that recovers all rejects commits manifest 2 with files of both rounds."""
    write_receipts(directory, job)
    assert commit(directory) == 1
    opened = open_retry(directory)
    assert [partition.rows for partition in opened.plan.partitions] == [8]
    assert [Path(part.rejected_from).name for part in opened.plan.partitions[0].fragments] == [
        "in-0.parquet",
        "in-1.parquet",
        "in-2.parquet",
    ]
    assert directory.ledger().rows == RowCounts(75, 67, 8, 0)
    assert [partition.id for partition in directory.ledger().todo] == ["00000"]
    write_receipts(directory, replace(job, bad_every=0))
    ledger = directory.ledger()
    assert ledger.rows == RowCounts(75, 75, 0, 0)
    assert ledger.reasons == {}
    assert [(one.round, one.reason, one.retried, one.recovered) for one in ledger.summaries()] == [(1, "retry", 8, 8)]
    manifest = directory.manifests.prepare(directory.ledger())
    assert commit(directory) == manifest.number == 2
    assert manifest.round == 1
    assert [file.round for file in manifest.files] == [0, 0, 0, 1]
    assert set(manifest.models) == {0, 1}
    assert manifest.rejects == ()
    tables = [pq.read_table(io.BytesIO(directory.store.read(file.name))) for file in manifest.files]
    assert sorted(pa.concat_tables(tables).column("id").to_pylist()) == list(range(75))


def test_rows_still_rejected_keep_file_and_row(directory: JobDirectory, job: SmallJob) -> None:
    """Rows that a retry rejects again keep the input file and row number of the source."""
    write_receipts(directory, job)
    open_retry(directory)
    write_receipts(directory, replace(job, bad_every=20))
    assert directory.ledger().rows == RowCounts(75, 71, 4, 0)
    expected = [
        (0, "in-0.parquet", 0), (20, "in-0.parquet", 20), (40, "in-2.parquet", 5), (60, "in-2.parquet", 25),
    ]  # fmt: skip
    assert rejected_places(directory) == expected
    again = open_retry(directory)
    assert [fragment.path for fragment in again.plan.partitions[0].fragments] == [
        "rounds/1/rejects/00000-a.parquet"
    ] * 2
    write_receipts(directory, replace(job, bad_every=60))
    assert rejected_places(directory) == [expected[0], expected[3]]
    assert directory.ledger().rows == RowCounts(75, 73, 2, 0)
    assert [one.recovered for one in directory.ledger().summaries()] == [4, 2]
    assert [file.name for file in directory.manifests.prepare(directory.ledger()).rejects] == [
        "rounds/2/rejects/00000-a.parquet"
    ]


def test_completed_parts_of_a_retry_count(directory: JobDirectory, job: SmallJob) -> None:
    """Completed parts of a retry count; a superseded part that ends late does not."""
    write_receipts(directory, job)
    first = open_retry(directory)
    ledger = directory.ledger()
    pair = halves(first.plan.partitions[0], {file.path: file for file in first.plan.files})
    assert pair is not None
    split = split_receipt("00000", (4,), plan=first.digest, model=first.plan.model.digest, attempt="s", round=1)
    directory.store.put_if_absent("rounds/1/receipts/00000.json", split.to_json_bytes())
    write_receipt(directory, replace(job, bad_every=0), pair[0], of=first)
    ledger = directory.ledger()
    assert [partition.id for partition in ledger.todo] == ["00000.1"]
    assert ledger.rows == RowCounts(75, 71, 4, 0)
    assert [row for row, *_ in rejected_places(directory)] == [40, 50, 60, 70]
    assert summarise(directory).total == 4
    # Another one, with something repaired, takes over what this one left, and a worker of this one comes too late.
    second = open_retry(directory, supersedes={1: ["00000.1"]})
    assert [partition.rows for partition in second.plan.partitions] == [4]
    write_receipt(directory, replace(job, bad_every=0), pair[1], of=first)
    assert directory.ledger().rows == RowCounts(75, 71, 4, 0)
    assert [partition.id for partition in directory.ledger().todo] == ["00000"]
    write_receipts(directory, replace(job, bad_every=0))
    assert directory.ledger().rows == RowCounts(75, 75, 0, 0)


def test_late_receipts_of_superseded_partitions_do_not_count(directory: JobDirectory, job: SmallJob) -> None:
    """Receipts of superseded partitions do not count, and their files are leftovers."""
    write_receipt(directory, job, job.plan.partitions[0])
    taken = job.plan.partitions[1:]
    plan = replace(job.plan, partitions=tuple(replace(one, id=f"{n:05d}") for n, one in enumerate(taken)))
    supersedes = {0: [partition.id for partition in taken]}
    made = make_record(plan, number=1, reason=RoundReason.RETRY, epoch=2, created="", supersedes=supersedes)
    opened = directory.rounds.open(made, plan)
    assert [partition.id for partition in directory.ledger().todo] == ["00000", "00001"]
    pair = halves(taken[1], {file.path: file for file in job.plan.files})
    assert pair is not None
    split = split_receipt("00002", (20,), plan=job.plan.digest, model=job.plan.model.digest, attempt="zombie")
    directory.store.put_if_absent("rounds/0/receipts/00002.json", split.to_json_bytes())
    for partition in (taken[0], *pair):
        write_receipt(directory, job, partition, attempt="zombie")
    assert directory.ledger().rows == RowCounts(30, 27, 3, 0)
    for partition in opened.plan.partitions:
        write_receipt(directory, job, partition, of=opened)
    assert directory.ledger().rows == RowCounts(75, 67, 8, 0)
    directory.manifests.prepare(directory.ledger())
    lost = {one.name for one in sweep_job(directory, now=utc_now()).leftovers}
    assert "rounds/0/data/00001-zombie.parquet" in lost
    assert "rounds/0/rejects/00002.1-zombie.parquet" in lost
    assert not any("-a.parquet" in name for name in lost)


def test_round_that_rescores_all_rows_replaces_earlier_rounds(directory: JobDirectory, job: SmallJob) -> None:
    """After a round that rescores all rows, receipts of earlier rounds no longer count."""
    write_receipts(directory, job)
    open_retry(directory)
    write_receipts(directory, replace(job, bad_every=20))
    model = replace(job.plan.model, digest="0" * 64, version="2")
    plan = replace(job.plan, model=model)
    made = make_record(
        plan, number=2, reason=RoundReason.ALIAS_CHANGE, epoch=3, created="", supersedes={}, rescore_all=True
    )
    directory.rounds.open(made, plan)
    ledger = directory.ledger()
    assert (ledger.base.number, ledger.last.number) == (2, 2)
    assert ledger.rows == RowCounts()
    assert len(ledger.todo) == 3
    write_receipts(directory, job)
    assert directory.ledger().rows == RowCounts(75, 67, 8, 0)
    manifest = directory.manifests.prepare(directory.ledger())
    assert manifest.model.version == "2"
    assert {file.round for file in manifest.files} == {2}
    assert make_report(directory).model.version == "2"


def test_rows_of_quarantined_files_are_in_no_count(directory: JobDirectory, job: SmallJob) -> None:
    """Rows of quarantined files are in no count until a retry has repaired the files."""
    write_receipts(directory, job)
    gone = QuarantinedFile(job.plan.files[1].path, "file:CorruptInput", "damaged", 5)
    plan = replace(job.plan, files=(), partitions=())
    made = make_record(
        plan,
        number=1,
        reason=RoundReason.FILES_QUARANTINED,
        epoch=2,
        created="",
        supersedes={0: ["00001"]},
        quarantined_files=[gone],
    )
    directory.rounds.open(made, plan)
    ledger = directory.ledger()
    assert ledger.rows == RowCounts(70, 63, 7, 0)
    assert ledger.planned_rows == 70
    assert ledger.quarantined_files == (gone,)
    assert directory.manifests.prepare(directory.ledger()).quarantined_files == (gone.path,)
    warnings = make_report(directory).warnings
    assert f"1 input file was quarantined, such as {gone.path} (5 rows): damaged" in warnings
    repaired = replace(job.plan, files=(job.plan.files[1],), partitions=(replace(job.plan.partitions[1], id="00000"),))
    again = make_record(
        repaired, number=2, reason=RoundReason.RETRY, epoch=3, created="", supersedes={}, repaired_files=[gone.path]
    )
    directory.rounds.open(again, repaired)
    assert directory.ledger().quarantined_files == ()
    assert directory.ledger().planned_rows == 75
    write_receipts(directory, job)
    assert directory.ledger().rows == RowCounts(75, 67, 8, 0)
