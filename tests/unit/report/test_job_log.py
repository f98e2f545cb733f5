"""The log of a driver: lines for programs on disk, and for people on the screen."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.common.rows import RowCounts
from pipeline.common.step_output import OutputLine
from pipeline.errors import SchemaDrift
from pipeline.events import JobEnded, PartitionEnded, StepMessage, notify
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.report.job_log import record_log
from pipeline.scoring.partition_log import PartitionLog
from pipeline.service.logs import LogReader
from pipeline.service.queue import Start, Submission, put_submission
from pipeline.storage.store import open_store
from pipeline.testing.jobs import small_job, write_receipts
from pipeline.testing.memory_store import MemoryDisk, MemoryStore


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    small = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    return JobDirectory.create(tmp_path / "jobs", small.plan, job="small-1")


def done(partition: str) -> PartitionEnded:
    return PartitionEnded("small-1", 0, partition, "done", RowCounts(30, 27, 3, 0), 0.4, worker="node7:1")


def drive(job: JobDirectory, *, epoch: int = 1) -> None:
    """Emit the events of a driver."""
    with suppress(SchemaDrift), record_log(job.store, epoch=epoch) as log:
        notify((log,), done("00000"))
        job.events.append("partition", partition="00001", outcome="retry", attempt=1, reason="disk")
        logging.getLogger("pipeline.somewhere").warning("the store is slow: %s", "5 s")
        logging.getLogger("distributed.worker").info("nobody wants to know")
        notify((log,), JobEnded("small-1", "FAILED", RowCounts(), "", "", report={"error": {"kind": "SchemaDrift"}}))
        raise SchemaDrift("a column is gone", where="in-0.parquet")


def test_lines_on_disk_are_json_and_say_when_and_how_bad(job: JobDirectory) -> None:
    drive(job)
    lines = [json.loads(line) for line in job.store.read("logs/1.jsonl").splitlines()]
    assert lines[0]["schema_version"] == 1
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert [line["level"] for line in lines] == ["INFO", "INFO", "WARNING", "ERROR", "ERROR"]
    assert lines[1]["partition"] == "00000"
    assert lines[1]["worker"] == "node7:1"
    assert "raise SchemaDrift" in lines[-1]["traceback"]


def test_modes_are_those_of_the_job_directory(job: JobDirectory) -> None:
    drive(job)
    path = Path(job.root, "logs/1.jsonl")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_secrets_are_masked(job: JobDirectory) -> None:
    with record_log(job.store, epoch=1):
        logging.getLogger("pipeline").warning("at s3://bucket/x?AWSAccessKeyId=a&password=hunter2hunter2")
    assert b"hunter2" not in job.store.read("logs/1.jsonl")


def test_loggers_are_left_as_they_were(job: JobDirectory) -> None:
    before = list(logging.getLogger("pipeline").handlers)
    drive(job)
    assert logging.getLogger("pipeline").handlers == before


def test_a_log_that_cannot_be_written_ends_no_job(job: JobDirectory, caplog: pytest.LogCaptureFixture) -> None:
    os.chmod(job.root, 0o700)
    Path(job.root, "logs").write_text("a file where the folder should be")
    with record_log(job.store, epoch=1) as log:
        notify((log,), done("00000"))
    assert "cannot be written" in caplog.text


def test_an_object_store_gets_it_in_one_piece() -> None:
    store = MemoryStore(MemoryDisk(), "mem://job")
    with record_log(store, epoch=3) as log:
        notify((log,), done("00000"))
    assert len(store.read("logs/3.jsonl").splitlines()) == 2


def test_events_and_logs_are_one_story(job: JobDirectory) -> None:
    drive(job)
    job.set_status(Status.FAILED, reason="a column is gone")
    said = [line.message for line in LogReader(job).read()]
    wanted = [
        "PLANNED",
        "partition 00000: done, 30 in",
        "partition 00001: retry after attempt 1: disk",
        "the store is slow: 5 s",
        "SchemaDrift",
        "the driver ends: SchemaDrift: a column is gone",
        "FAILED: a column is gone",
    ]
    assert [next(line for line in said if line.startswith(text)) for text in wanted]
    times = [line.time for line in LogReader(job).read()]
    assert times == sorted(times)
    assert "nobody wants to know" not in " ".join(said)


def test_only_errors_or_only_a_partition(job: JobDirectory) -> None:
    drive(job)
    assert {line.level for line in LogReader(job, errors=True).read()} == {"WARNING", "ERROR"}
    assert [line.partition for line in LogReader(job, partition="00001").read()] == ["00001"]
    assert LogReader(job, partition="0000").read() == []


def test_log_is_read_incrementally(job: JobDirectory) -> None:
    reader = LogReader(job)
    assert len(reader.read()) == 1
    assert reader.read() == []
    drive(job)
    assert len(reader.read()) == 5
    drive(job, epoch=2)
    assert len(reader.read()) == 5


def test_receipt_is_logged_for_its_partition(job: JobDirectory, tmp_path: Path) -> None:
    write_receipts(job, small_job(tmp_path / "lake", sink=str(tmp_path / "out")))
    assert LogReader(job).receipts() == []
    (line,) = LogReader(job, partition="00001").receipts()
    assert "5 in = 5 out" in line.message


def test_prints_of_steps_are_in_the_log_of_their_partition(job: JobDirectory) -> None:
    for attempt, partition in (("a1", "00001"), ("b2", "00001.0"), ("c3", "00002")):
        log = PartitionLog(lambda: job.store, f"logs/partitions/{partition}-{attempt}.jsonl")
        log.write(OutputLine("f:build", "print", "f.py:9", f"in {partition}", "2026-01-01T00:00:00Z"))
        log.write(OutputLine("f:build", "warning", "f.py:9", "f.py:9: UserWarning: old", "2026-01-01T00:00:01Z"))
        log.close()
    reader = LogReader(job, partition="00001")
    assert [line.message for line in reader.read()] == [
        "f:build (f.py:9): in 00001",
        "f:build (f.py:9): in 00001.0",
        "f:build: f.py:9: UserWarning: old",
        "f:build: f.py:9: UserWarning: old",
    ]
    assert reader.read() == []
    assert "f:build" not in " ".join(line.message for line in LogReader(job).read())
    with record_log(job.store, epoch=1) as driver:
        notify((driver,), StepMessage("small-1", "00001", "w", "f:build", "print", "f.py:9", "3 rows"))
    assert "f:build prints (f.py:9): 3 rows" in [line.message for line in LogReader(job).read()]


def test_output_of_a_driver_that_never_started_is_shown(job: JobDirectory) -> None:
    from pipeline.jobs.lease import identify

    put_submission(job.store, Submission(1, "", "me", "by hand", "key"))
    gone = identify(os.getpid()).rpartition("/")[0] + "/0"
    job.store.replace("starts/1.json", Start(1, 1, "", "submit", "h", os.getpid(), gone).to_json_bytes())
    job.store.replace("starts/1.out", b"ImportError: no module named pandas\n")
    lines = [line for line in LogReader(job, errors=True).read() if line.source == "output"]
    assert [line.message for line in lines] == ["ImportError: no module named pandas"]


def test_a_line_that_was_cut_short_is_passed_over(job: JobDirectory) -> None:
    open_store(job.root).append("logs/1.jsonl", '{"time": "2026-01-01T00:00:00.000Z", "mess')
    assert len(LogReader(job).read()) == 1


def test_numbers_of_events_are_for_people(job: JobDirectory) -> None:
    job.events.append("straggler", partition="00003", seconds=2.026345074999881, remaining=53.89710807762426, won=False)
    job.events.append("cluster", workers=2, threads=2, dashboard="http://127.0.0.1:41093/status")
    lines = [line.message for line in LogReader(job).read()]
    assert "straggler: partition 00003, seconds 2.03 s, remaining 53.9 s, won False" in lines
    assert "connected: 2 workers, 2 threads, http://127.0.0.1:41093/status" in lines
