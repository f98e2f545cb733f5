"""The lock of a sink: one holder, freed by any end of its process, and errors that name the holder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.errors import Fenced, OutputConflict
from pipeline.sinks import lock
from pipeline.sinks.lock import lock_path, sink_lock


def test_lock_leaves_nothing_and_makes_missing_parents(tmp_path: Path) -> None:
    sink = tmp_path / "new" / "out"
    with sink_lock(sink, job="a") as is_locked:
        assert is_locked
        assert lock_path(sink).exists()
    assert os.listdir(sink.parent) == []


def test_lock_has_one_holder_at_a_time(tmp_path: Path) -> None:
    """Eight threads that lock and remove the file again and again are never inside together."""
    inside: list[int] = []
    most: list[int] = []

    def publish(number: int) -> None:
        for _ in range(50):
            with sink_lock(tmp_path / "out", job=str(number), pause=lambda _: None):
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 400
    assert max(most) == 1


@pytest.mark.fault(68)
def test_the_error_names_the_holder(tmp_path: Path) -> None:
    ticks = iter(range(100))
    with sink_lock(tmp_path / "out", job="a-1"), pytest.raises(OutputConflict) as caught:  # noqa: SIM117
        with sink_lock(tmp_path / "out", job="b-1", timeout=5, clock=lambda: next(ticks), pause=lambda _: None):
            pytest.fail("two holders")
    assert caught.value.exit_code == 6
    assert f"job a-1, process {os.getpid()} on " in caught.value.found
    assert "resume b-1" in caught.value.next_step


@pytest.mark.fault(68)
def test_a_driver_that_waits_gives_up_after_a_takeover(tmp_path: Path) -> None:
    def fenced() -> None:
        raise Fenced("another driver has taken this job over")

    with sink_lock(tmp_path / "out", job="a-1"), pytest.raises(Fenced):  # noqa: SIM117
        with sink_lock(tmp_path / "out", job="a-1", check_lease=fenced, pause=lambda _: None):
            pytest.fail("two holders")


HOLDER = """
import sys
from pathlib import Path
from pipeline.sinks.lock import sink_lock
with sink_lock(Path(sys.argv[1]), job="dead-1"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.fault(68)
def test_a_process_that_dies_frees_its_lock(tmp_path: Path) -> None:
    """Killed, it leaves the file, which the next holder takes and removes."""
    sink = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(sink)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OutputConflict, match="publishing") as caught:  # noqa: SIM117
            with sink_lock(sink, job="b-1", timeout=0):
                pytest.fail("two holders")
        assert f"process {process.pid} on " in caught.value.found
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert lock_path(sink).exists()
    with sink_lock(sink, job="b-1", timeout=0) as is_locked:
        assert is_locked
    assert os.listdir(tmp_path) == []


@pytest.mark.fault(68)
def test_file_system_without_locks_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with sink_lock(tmp_path / "out", job="a-1") as is_locked:
        assert not is_locked
    assert "no file locks" in caplog.text


def test_a_folder_whose_parent_cannot_be_written_is_locked_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = tmp_path / "out"
    sink.mkdir()
    open_file = os.open

    def read_only(path: str, flags: int, *args: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open_file(path, flags, *args)

    monkeypatch.setattr(lock.os, "open", read_only)
    with sink_lock(sink, job="a-1") as is_locked:
        assert is_locked
        with pytest.raises(OutputConflict, match="publishing"), sink_lock(sink, job="b-1", timeout=0):
            pytest.fail("two holders")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(sink) == []
