"""Rounds: opening, records, and rounds of fenced drivers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.common.rows import QuarantinedFile, RowCounts
from pipeline.common.units import utc_now
from pipeline.errors import Fenced, StateCorrupt
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.event_log import EventLog
from pipeline.jobs.round_log import RoundLog
from pipeline.jobs.rounds import RoundReason, RoundRecord, make_record
from pipeline.jobs.status import Status
from pipeline.plan.plan import Partition
from pipeline.service.gc import sweep_job
from pipeline.testing.jobs import SmallJob, commit, open_retry, small_job, write_receipts


@pytest.fixture
def job(tmp_path: Path) -> SmallJob:
    """Return a job of 75 rows in files of 30, 5 and 40; the ids 0, 10, … 70 are bad."""
    return small_job(tmp_path / "lake", sink=str(tmp_path / "out"), bad_every=10, pruned=0)


def test_a_job_has_ended_when_its_last_manifest_covers_its_last_round(directory: JobDirectory, job: SmallJob) -> None:
    """A job with a later round than its last manifest has not ended, whatever its status."""
    write_receipts(directory, job)
    assert not directory.is_ended
    directory.set_status(Status.PUBLISHING)
    commit(directory)
    directory.set_status(Status.SUCCEEDED_WITH_WARNINGS)
    assert directory.is_ended
    open_retry(directory)
    # The driver that opened it may have died before it wrote a status.
    assert directory.status().is_success
    assert not directory.is_ended


def test_only_one_driver_opens_a_round(directory: JobDirectory, job: SmallJob) -> None:
    """Opening the same round twice gives one round; another epoch is `Fenced`."""
    write_receipts(directory, job)
    opened = open_retry(directory, epoch=4)
    assert opened.record is not None
    assert directory.rounds.open(opened.record, opened.plan).number == 1
    with pytest.raises(Fenced):
        directory.rounds.open(replace(opened.record, epoch=5), opened.plan)


@pytest.mark.fault(61)
class TestFencing:
    """Rounds of a driver that was paused, and replaced meanwhile."""

    def test_a_fenced_driver_opens_no_round(self, directory: JobDirectory, job: SmallJob) -> None:
        """The lease is checked right before the record is stored."""
        write_receipts(directory, job)
        with directory.hold() as lease:
            directory.store.put_if_absent("lease/2.json", b"{}")
            with pytest.raises(Fenced):
                open_retry(directory, epoch=lease.epoch)
        assert len(JobDirectory.open(directory.root).rounds.all()) == 1

    def test_a_round_opened_too_late_is_void(self, directory: JobDirectory, job: SmallJob) -> None:
        """The driver was paused between its check and the record; the job has succeeded meanwhile."""
        write_receipts(directory, job)
        with directory.hold() as late:
            assert late.epoch == 1
        successor = JobDirectory.open(directory.root)
        with successor.hold():
            successor.set_status(Status.PUBLISHING)
            commit(successor)
            successor.set_status(Status.SUCCEEDED)
        directory.events = EventLog(directory.store)
        directory.rounds = RoundLog(directory.store, directory.rounds.first, events=directory.events)
        open_retry(directory, epoch=late.epoch)
        again = JobDirectory.open(directory.root)
        assert [one.number for one in again.rounds.all()] == [0]
        assert again.is_ended
        assert again.ledger().rows == RowCounts(75, 67, 8, 0)
        # The next round has a number of its own.
        with again.hold() as lease:
            assert open_retry(again, epoch=lease.epoch).number == 2
        assert [one.number for one in JobDirectory.open(directory.root).ledger().rounds] == [0, 2]

    def test_a_round_that_the_next_driver_saw_counts(self, directory: JobDirectory, job: SmallJob) -> None:
        """A driver that died after it had opened a round; its successor scores the round."""
        write_receipts(directory, job)
        with directory.hold() as lease:
            open_retry(directory, epoch=lease.epoch)
        with JobDirectory.open(directory.root).hold() as lease:
            assert (lease.epoch, lease.holder.rounds) == (2, 1)
        assert len(JobDirectory.open(directory.root).rounds.all()) == 2

    def test_a_job_that_succeeded_continues_with_an_open_round(self, directory: JobDirectory, job: SmallJob) -> None:
        """Nothing is beyond repair: not even a round on a job that says SUCCEEDED."""
        write_receipts(directory, job)
        directory.set_status(Status.PUBLISHING)
        commit(directory)
        directory.set_status(Status.SUCCEEDED)
        with pytest.raises(StateCorrupt, match="invalid status transition"):
            directory.set_status(Status.PROVISIONING)
        open_retry(directory)
        directory.set_status(Status.PROVISIONING)


def test_records_are_read_back_and_damage_is_refused(directory: JobDirectory, job: SmallJob) -> None:
    """Round records are read back unchanged; a damaged or missing record raises `StateCorrupt`."""
    write_receipts(directory, job)
    opened = open_retry(directory, supersedes={0: ["00001"]}, changes=["a -> b"])
    again = JobDirectory.open(directory.root)
    assert again.rounds.all()[1].record == opened.record
    assert again.rounds.all()[1].plan == opened.plan
    place = "rounds/1.json"
    data = directory.store.read(place)
    directory.store.replace(place, data[:40])
    with pytest.raises(StateCorrupt, match="record of a round is damaged"):
        JobDirectory.open(directory.root).rounds.all()
    directory.store.replace("rounds/3.json", data)
    directory.store.replace(place, data)
    with pytest.raises(StateCorrupt, match="record of a round is missing"):
        JobDirectory.open(directory.root).rounds.all()


def test_a_plan_that_was_never_put_on_record_is_a_leftover(directory: JobDirectory, job: SmallJob) -> None:
    """A plan file without a round record is a leftover."""
    write_receipts(directory, job)
    open_retry(directory)
    directory.store.replace("rounds/2-0123456789abcdef.parquet", b"x")
    found = sweep_job(directory, now=utc_now()).leftovers
    assert [one.name for one in found] == ["rounds/2-0123456789abcdef.parquet"]


def test_a_receipt_of_another_round_is_refused(directory: JobDirectory, job: SmallJob) -> None:
    """A receipt in the folder of another round raises `StateCorrupt`."""
    receipt = write_receipts(directory, job)[0]
    open_retry(directory)
    directory.store.replace("rounds/1/receipts/00000.json", receipt.to_json_bytes())
    with pytest.raises(StateCorrupt, match="does not belong"):
        directory.receipts.all()


def test_json_of_a_record(job: SmallJob) -> None:
    """A round record is read back from its JSON; empty entries of ``supersedes`` are dropped."""
    made = make_record(
        replace(job.plan, partitions=(Partition("00000", ()),)),
        number=7,
        reason=RoundReason.RETRY,
        epoch=1,
        created="",
        supersedes={0: ["00001"], 3: []},
        quarantined_files=[QuarantinedFile("/a", "file:CorruptInput", "bad", None, (("day", "1"),))],
    )
    assert made.supersedes == {0: ("00001",)}
    assert RoundRecord.from_json(made.to_json_bytes(), where="") == made
