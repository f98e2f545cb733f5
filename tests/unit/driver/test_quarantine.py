"""An input file turns out bad while a job runs: partitions with its rows are scored again without it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.common.rows import RowCounts
from pipeline.common.secrets import redact_error
from pipeline.driver.quarantine import open_quarantine_round
from pipeline.errors import CorruptInput, InputChanged, StepFailed, TooManyRejects
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.splits import sub_fragment
from pipeline.plan.plan import Partition
from pipeline.testing.jobs import SmallJob, open_retry, small_job, write_receipt, write_receipts


def make(tmp_path: Path, *, max_files: int | None = None) -> tuple[JobDirectory, SmallJob]:
    """Files of 30, 5 and 40 rows; partition 0 has two thirds of the first, partition 1 all the rest."""
    job = small_job(tmp_path / "lake", sink=str(tmp_path / "out"), bad_every=10)
    first, second, third = (partition.fragments[0] for partition in job.plan.partitions)
    file = job.plan.files[0]
    cut = [sub_fragment(first, file, row_start=start, row_stop=stop) for start, stop in ((0, 20), (20, 30))]
    errors = {"max_fraction": 0.5, "files": "quarantine", **({} if max_files is None else {"max_files": max_files})}
    spec = type(job.plan.spec).model_validate({**job.plan.spec.to_dict(), "errors": errors})
    partitions = (Partition("00000", (cut[0],)), Partition("00001", (cut[1], second, third)))
    job = replace(job, plan=replace(job.plan, spec=spec, partitions=partitions))
    return JobDirectory.create(tmp_path / "jobs", job.plan, job="small-1"), job


def error_about(job: SmallJob, number: int, kind: type[CorruptInput | InputChanged] = CorruptInput) -> CorruptInput:
    return kind("an input file is damaged", where=job.plan.files[number].path, found="garbage")  # type: ignore[return-value]


def test_a_partition_that_is_done_is_done_again_without_the_file(tmp_path: Path) -> None:
    directory, job = make(tmp_path)
    write_receipt(directory, job, job.plan.partitions[0])
    opened = open_quarantine_round(directory, directory.ledger(), error_about(job, 0), epoch=1)
    assert opened is not None
    assert opened.record is not None
    assert opened.record.supersedes == {0: ("00000", "00001")}
    assert [[Path(part.path).name for part in one.fragments] for one in opened.plan.partitions] == [
        ["in-1.parquet", "in-2.parquet"]
    ]
    write_receipts(directory, job)
    ledger = directory.ledger()
    assert ledger.rows == RowCounts(45, 40, 5, 0)
    assert [(Path(file.path).name, file.reason, file.rows) for file in ledger.quarantined_files] == [
        ("in-0.parquet", "file:CorruptInput", 30)
    ]
    assert ledger.quarantined_files[0].message == "an input file is damaged: garbage"
    directory.manifests.prepare(directory.ledger())


@pytest.mark.fault(99)
def test_masked_path_is_still_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders such as ``token=…``, or a weak password that is a word of the path: the worker masks the message."""
    for name, secret in (("token=abcd1234", ""), ("plain", "customers")):
        monkeypatch.setenv("PGPASSWORD", secret)
        folder = tmp_path / f"{name}-customers"
        folder.mkdir()
        directory, job = make(folder)
        error = redact_error(error_about(job, 0))
        assert isinstance(error, CorruptInput)
        sent = pickle.loads(pickle.dumps(error))
        assert "[secret]" in sent.where
        assert "[secret]" in str(sent)
        assert job.plan.files[0].path not in str(sent)
        opened = open_quarantine_round(directory, directory.ledger(), sent, epoch=1)
        assert opened is not None
        assert [file.path for file in directory.ledger().quarantined_files] == [job.plan.files[0].path]


def test_completed_partitions_of_other_files_stay(tmp_path: Path) -> None:
    directory, job = make(tmp_path)
    write_receipt(directory, job, job.plan.partitions[0])
    opened = open_quarantine_round(directory, directory.ledger(), error_about(job, 2), epoch=1)
    assert opened is not None
    assert opened.record is not None
    assert opened.record.supersedes == {0: ("00001",)}
    write_receipts(directory, job)
    assert directory.ledger().rows == RowCounts(35, 31, 4, 0)


def test_single_round_quarantines_all_changed_files(tmp_path: Path) -> None:
    directory, job = make(tmp_path)
    Path(job.plan.files[1].path).unlink()
    Path(job.plan.files[2].path).write_bytes(b"other")
    opened = open_quarantine_round(directory, directory.ledger(), error_about(job, 1, InputChanged), epoch=1)
    assert opened is not None
    assert {Path(file.path).name: file.reason for file in directory.ledger().quarantined_files} == {
        "in-1.parquet": "file:InputChanged",
        "in-2.parquet": "file:InputChanged",
    }
    assert [partition.rows for partition in opened.plan.partitions] == [20, 10]


def test_rejects_that_were_tried_again_go_with_the_file_they_came_from(tmp_path: Path) -> None:
    """Round 1 repairs rejects of a partition; a file of that partition turns out bad in what round 1 was left to do."""
    directory, job = make(tmp_path)
    write_receipt(directory, job, job.plan.partitions[0])
    # A retry takes the rejects of partition 0, and partition 1, which was not done.
    rejects = open_retry(directory)
    both = (*rejects.plan.partitions, Partition("00001", job.plan.partitions[1].fragments))
    plan = replace(rejects.plan, partitions=both, files=(*rejects.plan.files, *job.plan.files))
    from pipeline.jobs.rounds import RoundReason, make_record

    supersedes = {0: ["00001"], 1: ["00000"]}
    second = directory.rounds.open(
        make_record(plan, number=2, reason=RoundReason.RETRY, epoch=1, created="", supersedes=supersedes), plan
    )
    write_receipt(directory, replace(job, bad_every=0), both[0], of=second)
    assert directory.ledger().rows == RowCounts(20, 20, 0, 0)
    opened = open_quarantine_round(directory, directory.ledger(), error_about(job, 0), epoch=1)
    assert opened is not None
    assert opened.record is not None
    # Partition 0 of round 0 has rows of the file, and what came of its rejects goes with it.
    assert opened.record.supersedes == {0: ("00000",), 2: ("00000", "00001")}
    write_receipts(directory, job)
    ledger = directory.ledger()
    assert ledger.rows == RowCounts(45, 40, 5, 0)
    assert ledger.todo == ()
    directory.manifests.prepare(directory.ledger())


def test_other_errors_and_other_policies_are_not_its_business(tmp_path: Path) -> None:
    directory, job = make(tmp_path)
    ledger = directory.ledger()
    assert open_quarantine_round(directory, ledger, StepFailed("no", where=job.plan.files[0].path), epoch=1) is None
    assert (
        open_quarantine_round(directory, ledger, CorruptInput("no", where="rounds/0/rejects/x.parquet"), epoch=1)
        is None
    )
    closed = small_job(tmp_path / "closed", sink=str(tmp_path / "out"))
    other = JobDirectory.create(tmp_path / "jobs", closed.plan, job="small-2")
    assert open_quarantine_round(other, other.ledger(), error_about(closed, 0), epoch=1) is None


def test_more_than_are_allowed(tmp_path: Path) -> None:
    directory, job = make(tmp_path, max_files=0)
    with pytest.raises(TooManyRejects):
        open_quarantine_round(directory, directory.ledger(), error_about(job, 0), epoch=1)
    assert len(directory.rounds.all()) == 1
