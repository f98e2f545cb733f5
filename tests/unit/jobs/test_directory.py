"""The job directory: created once, resumed by digest, read back in full."""

from __future__ import annotations

import json
import os
import stat
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.errors import PlanMismatch, RefusedForSafety, StateCorrupt
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.listing import find_job, list_jobs
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.record import new_job_id
from pipeline.jobs.splits import done_partitions, effective_partitions, halves, split_receipt
from pipeline.jobs.status import Status
from pipeline.plan.plan import Partition
from pipeline.storage.local import LocalStore
from pipeline.testing.jobs import SmallJob, write_receipt, write_receipts
from pipeline.testing.stores import Faults, FaultyStore, io_error

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_job_id_is_pure_and_sortable() -> None:
    """A new id is the job's name, the UTC time and the given entropy, and nothing else."""
    assert new_job_id("churn-nightly", now=NOON, entropy="a1b2") == "churn-nightly-20260101-120000-a1b2"
    assert new_job_id("x", now=NOON.astimezone(None), entropy="0") == "x-20260101-120000-0"


@pytest.mark.parametrize("bad", ["", "../x", "A", ".x", "a/b", "a b", "x" * 101, "a\0"])
def test_bad_ids_are_refused(tmp_path: Path, job: SmallJob, bad: str) -> None:
    """An invalid id is rejected before any folder is created."""
    with pytest.raises(RefusedForSafety):
        JobDirectory.create(tmp_path / "jobs", job.plan, job=bad)
    assert not (tmp_path / "jobs").exists()


def test_create_writes_the_layout(tmp_path: Path, directory: JobDirectory, job: SmallJob) -> None:
    """A new directory has the four files, private modes and the plan's digest."""
    root = tmp_path / "jobs" / "small-1"
    assert sorted(os.listdir(root)) == ["events.jsonl", "job.json", "plan.parquet", "spec.yaml"]
    record = json.loads((root / "job.json").read_text())
    assert record["job"] == "small-1"
    assert record["plan"] == job.plan.digest
    assert record["rows"] == 75
    assert "name: small" in (root / "spec.yaml").read_text()
    for path in [root, *root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_open_reads_the_same_plan(directory: JobDirectory, job: SmallJob) -> None:
    again = JobDirectory.open(directory.root)
    assert again.record == directory.record
    assert again.plan == job.plan
    assert again.status() is Status.PLANNED


def test_same_plan_resumes_and_another_is_refused(tmp_path: Path, directory: JobDirectory, job: SmallJob) -> None:
    """The same plan under an existing id resumes the job; another plan raises `PlanMismatch`."""
    jobs = tmp_path / "jobs"
    assert JobDirectory.open_or_create(jobs, job.plan, job="small-1").record == directory.record
    assert JobDirectory.create(jobs, job.plan, job="small-1").record == directory.record
    other = replace(job.plan, keep=())
    for make in (JobDirectory.open_or_create, JobDirectory.create):
        with pytest.raises(PlanMismatch, match="another plan"):
            make(jobs, other, job="small-1")
    assert JobDirectory.open(directory.root).plan == job.plan


def test_racing_creators_get_one_job(tmp_path: Path, job: SmallJob) -> None:
    """Racing creators with the stored plan get the job, and all others `PlanMismatch`."""
    plans = [job.plan, replace(job.plan, keep=())] * 3
    barrier, got, refused = threading.Barrier(len(plans)), [], []  # type: ignore[var-annotated]

    def create(number: int) -> None:
        barrier.wait()
        try:
            made = JobDirectory.create(
                tmp_path / "jobs", plans[number], job="raced", options=JobOptions(import_paths=(str(number),))
            )
            got.append((number, made.record))
        except PlanMismatch:
            refused.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = JobDirectory.open(tmp_path / "jobs" / "raced")
    assert len(got) == 3
    assert len(refused) == 3
    assert {record.plan for _, record in got} == {stored.plan.digest}
    assert all(record == stored.record for _, record in got)


def test_another_cut_of_the_same_work_resumes_the_stored_one(
    tmp_path: Path, directory: JobDirectory, job: SmallJob
) -> None:
    """A plan that differs only in its partitions resumes the job with the stored partitions."""
    one = Partition("00000", tuple(part.fragments[0] for part in job.plan.partitions))
    other = replace(job.plan, partitions=(one,))
    assert other.digest != job.plan.digest
    again = JobDirectory.open_or_create(tmp_path / "jobs", other, job="small-1")
    assert again.plan == job.plan
    assert JobDirectory.create(tmp_path / "jobs", other, job="small-1").plan == job.plan


def test_no_job_json_is_no_job(tmp_path: Path) -> None:
    """A folder without ``job.json`` is not a job directory."""
    with pytest.raises(StateCorrupt, match="not a job directory"):
        JobDirectory.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 9}', b'{"schema_version": 1}'])
@pytest.mark.fault(43)
def test_damaged_job_json(directory: JobDirectory, content: bytes) -> None:
    """A damaged ``job.json`` raises `StateCorrupt` and names the file."""
    directory.store.replace("job.json", content)
    with pytest.raises(StateCorrupt, match=r"job\.json"):
        JobDirectory.open(directory.root)


@pytest.mark.fault(43)
def test_damaged_plan(directory: JobDirectory) -> None:
    """A truncated ``plan.parquet`` raises `StateCorrupt` and names the file."""
    data = directory.store.read("plan.parquet")
    directory.store.replace("plan.parquet", data[: len(data) // 2])
    with pytest.raises(StateCorrupt, match=r"plan\.parquet"):
        _ = JobDirectory.open(directory.root).plan


@pytest.mark.fault(43)
def test_plan_of_another_job(tmp_path: Path, directory: JobDirectory, job: SmallJob) -> None:
    """A plan whose digest differs from ``job.json`` raises `StateCorrupt`."""
    other = JobDirectory.create(tmp_path / "jobs", replace(job.plan, keep=()), job="other")
    directory.store.replace("plan.parquet", other.store.read("plan.parquet"))
    with pytest.raises(StateCorrupt, match="not the plan"):
        _ = JobDirectory.open(directory.root).plan


def test_folder_of_another_user_is_refused(directory: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(RefusedForSafety, match="another user"):
        JobDirectory.open(directory.root)


def test_status_follows_the_table(directory: JobDirectory) -> None:
    """A transition outside the table raises, and the status stays."""
    event = directory.set_status(Status.RUNNING, reason="3 workers")
    assert (event.before, event.after, event.reason) == ("PLANNED", "RUNNING", "3 workers")
    with pytest.raises(StateCorrupt, match="RUNNING -> SUCCEEDED"):
        directory.set_status(Status.SUCCEEDED)
    assert JobDirectory.open(directory.root).status() is Status.RUNNING


def test_events_survive_a_torn_line(directory: JobDirectory) -> None:
    """A torn last line of ``events.jsonl`` is skipped, and later events are read."""
    directory.set_status(Status.RUNNING)
    text = directory.store.read("events.jsonl")
    directory.store.replace("events.jsonl", text + b'{"time": "2026-01-01T12:00:00Z", "event": "sta')
    assert directory.status() is Status.RUNNING
    directory.events.append("partition", partition="00000", outcome="done")
    directory.set_status(Status.PUBLISHING)
    events = JobDirectory.open(directory.root).events.read()
    assert [event["event"] for event in events] == ["status", "status", "partition", "status"]
    assert all(event["time"].endswith("Z") for event in events)


def test_receipts_come_in_source_order(directory: JobDirectory, job: SmallJob) -> None:
    for partition in reversed(job.plan.partitions):
        write_receipt(directory, job, partition)
    assert [receipt.partition for receipt in directory.receipts.all()] == ["00000", "00001", "00002"]
    assert done_partitions(job.plan, directory.receipts.all()) == {"00000", "00001", "00002"}


def test_receipts_on_an_object_store(job: SmallJob) -> None:
    """Receipts are written, read and found on an object store as on a disk."""
    directory = JobDirectory.create("memory://jobs", job.plan, job="remote-1")
    write_receipts(directory, job)
    assert [receipt.rows.output for receipt in directory.receipts.all()] == [30, 5, 40]
    assert find_job("memory://jobs", "remote").id == "remote-1"


@pytest.mark.parametrize("content", [b"", b"{}", b'{"schema_version": 1, "par', b"null"])
@pytest.mark.fault(43)
def test_damaged_receipt_names_the_file(directory: JobDirectory, job: SmallJob, content: bytes) -> None:
    write_receipts(directory, job)
    directory.store.replace("rounds/0/receipts/00001.json", content)
    with pytest.raises(StateCorrupt, match=r"00001\.json"):
        directory.receipts.all()


@pytest.mark.fault(43)
def test_receipt_of_another_plan_or_name(directory: JobDirectory, job: SmallJob) -> None:
    """A receipt with another plan or partition than its file name raises `StateCorrupt`."""
    receipt = write_receipt(directory, job, job.plan.partitions[0])
    place = "rounds/0/receipts/00001.json"
    for wrong in (receipt, replace(receipt, partition="00001", plan="0" * 64)):
        directory.store.replace(place, wrong.to_json_bytes())
        with pytest.raises(StateCorrupt, match=r"00001\.json"):
            directory.receipts.all()


def test_receipt_of_no_partition(directory: JobDirectory, job: SmallJob) -> None:
    """A receipt of a partition that is not in the plan raises `StateCorrupt`."""
    receipt = write_receipt(directory, job, job.plan.partitions[0])
    directory.store.replace("rounds/0/receipts/00077.json", replace(receipt, partition="00077").to_json_bytes())
    with pytest.raises(StateCorrupt, match="00077"):
        done_partitions(job.plan, directory.receipts.all())


def _split(directory: JobDirectory, partition: Partition) -> Receipt:
    receipt = split_receipt(partition.id, (partition.rows // 2,), plan=directory.record.plan, model="", attempt="split")
    assert directory.store.put_if_absent(f"rounds/0/receipts/{partition.id}.json", receipt.to_json_bytes())
    return receipt


def test_splits_resolve_to_halves_of_halves(directory: JobDirectory, job: SmallJob) -> None:
    """A split part may be split again; ids, rows and row groups follow."""
    files = {file.path: file for file in job.plan.files}
    first = job.plan.partitions[0]
    _split(directory, first)
    pair = halves(first, files)
    assert pair is not None
    _split(directory, pair[1])
    effective = effective_partitions(job.plan, directory.receipts.all())
    assert [part.id for part in effective] == ["00000.0", "00000.1.0", "00000.1.1", "00001", "00002"]
    assert [part.rows for part in effective] == [15, 7, 8, 5, 40]
    ranges = [(f.row_start, f.row_stop, f.group_start, f.group_stop) for p in effective[:3] for f in p.fragments]
    assert ranges == [(0, 15, 0, 2), (15, 22, 1, 3), (22, 30, 2, 3)]
    write_receipt(directory, job, effective[1])
    assert done_partitions(job.plan, directory.receipts.all()) == {"00000.1.0"}


def test_a_row_cannot_be_split(job: SmallJob) -> None:
    """A partition of one row has no halves."""
    fragment = replace(job.plan.partitions[0].fragments[0], row_start=3, row_stop=4)
    assert halves(Partition("00000", (fragment,)), {file.path: file for file in job.plan.files}) is None


def test_report_is_replaced(directory: JobDirectory) -> None:
    """A report is replaced as a whole; a damaged report reads as none."""
    assert directory.read_report() is None
    directory.write_report({"status": "SUCCEEDED"})
    assert directory.read_report() == {"status": "SUCCEEDED"}
    directory.store.replace("report.json", b"{")
    assert directory.read_report() is None


def test_storage_fault_while_creating_leaves_no_job(tmp_path: Path, job: SmallJob) -> None:
    """A storage error during creation leaves no job in the list."""
    root = tmp_path / "jobs" / "j-1"
    store = FaultyStore(LocalStore(root, private=True), Faults(0, fault=io_error))
    with pytest.raises(OSError, match="error"):
        JobDirectory.create(tmp_path / "jobs", job.plan, job="j-1", store=store)  # type: ignore[arg-type]
    assert list_jobs(tmp_path / "jobs") == ()
