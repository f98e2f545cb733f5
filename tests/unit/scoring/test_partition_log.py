"""The log of what steps printed in a partition."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.common.step_output import OutputLine
from pipeline.scoring.partition_log import REMOTE_SECONDS, PartitionLog
from pipeline.storage.store import open_store
from pipeline.testing.fake_clock import FakeClock
from pipeline.testing.memory_store import MemoryDisk, MemoryStore

NAME = "logs/partitions/00003-a1.jsonl"
LINE = OutputLine("features:build", "print", "features.py:9", "3 rows", "2026-01-01T00:00:00Z")


def test_without_lines_there_is_no_file(tmp_path: Path) -> None:
    PartitionLog(lambda: open_store(str(tmp_path)), NAME).close()
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_on_disk_at_once(tmp_path: Path) -> None:
    log = PartitionLog(lambda: open_store(str(tmp_path), private=True), NAME)
    log.write(LINE)
    stored = json.loads((tmp_path / NAME).read_text())
    assert stored["text"] == "3 rows"
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600
    log.close(left_out=2)
    assert json.loads((tmp_path / NAME).read_text().splitlines()[1]) == {"text": "2 further lines were left out"}


def test_an_object_store_gets_lines_after_some_seconds() -> None:
    store, clock = MemoryStore(MemoryDisk(), "mem://job"), FakeClock(0.0)
    log = PartitionLog(lambda: store, NAME, clock=clock)
    log.write(LINE)
    log.flush()
    assert not store.exists(NAME)
    clock.now += REMOTE_SECONDS
    log.flush()
    assert len(store.read(NAME).splitlines()) == 1
    log.write(LINE)
    log.close()
    assert len(store.read(NAME).splitlines()) == 2


def test_a_store_that_fails_ends_the_log_only(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    log = PartitionLog(lambda: open_store(str(tmp_path)), NAME)
    log.write(LINE)
    log.write(LINE)
    log.close()
