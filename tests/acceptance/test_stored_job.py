"""Job directories that an earlier commit wrote are resumed, retried and verified (``tests/data``)."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import runner
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job
from pipeline.jobs.status import Status
from pipeline.report.verify import verify
from tests.data.make_stored_job import ROOT, ROWS, STORED, settings


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stored jobs, where and when they were made. One test of this machine has the folder at a time."""
    with ROOT.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if ROOT.exists():
            shutil.rmtree(ROOT)
        shutil.copytree(STORED, ROOT)
        for name, time in json.loads((STORED / "times.json").read_text()).items():
            os.utime(ROOT / name, ns=(time, time))
        for folder in (ROOT / "jobs").iterdir():
            # Git keeps no modes, and a job directory that others may write is refused.
            folder.chmod(0o700)
        monkeypatch.chdir(ROOT)
        yield ROOT
        shutil.rmtree(ROOT)


def job(name: str) -> JobDirectory:
    return find_job(settings().directory, name)


def rows_in(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in folder.glob("*.parquet"))


def test_a_finished_job_is_verified(stored: Path) -> None:
    """All checks of the proof hold, a sample scored again among them."""
    verification = verify(job("finished"), sample=200, seed=1)
    assert verification.ok, verification.to_dict()


def test_a_finished_job_is_retried(stored: Path) -> None:
    """Rows that a contract rejected come out once the contract allows them, in a second manifest."""
    before = rows_in(stored / "scored-finished")
    report = runner.retry("finished", overrides=["contract.age.max=1000"], settings=settings())
    assert (report.rows.input, report.rows.output + report.rows.rejected) == (ROWS, ROWS)
    assert report.rows.output > before
    assert rows_in(stored / "scored-finished") == report.rows.output
    assert verify(job("finished"), sample=200, seed=1).ok


def test_an_interrupted_job_is_resumed(stored: Path) -> None:
    """Partitions that were done keep their receipts; the rest is scored, to the same number of rows."""
    receipts = {path.name: path.read_bytes() for path in (stored / "jobs/interrupted/rounds/0/receipts").iterdir()}
    assert job("interrupted").status() is Status.INTERRUPTED
    report = runner.resume("interrupted", settings=settings())
    assert report.ok
    folder = stored / "jobs/interrupted/rounds/0/receipts"
    assert {name: (folder / name).read_bytes() for name in receipts} == receipts
    assert len(list(folder.iterdir())) > len(receipts)
    assert rows_in(stored / "scored-interrupted") == rows_in(stored / "scored-finished")
    assert verify(job("interrupted"), sample=200, seed=1).ok
