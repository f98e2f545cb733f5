"""The lease of a job: the right to drive, decided by counters and the own monotonic clock."""

from __future__ import annotations

import itertools
import json
import os
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from pipeline.errors import DiskFull, Fenced, JobLocked
from pipeline.jobs import lease as lease_module
from pipeline.jobs.lease import (
    Holder,
    LeaseSnapshot,
    Verdict,
    acquire_lease,
    has_ended,
    highest_epoch,
    hold_lease,
    identify,
    judge_lease,
    read_lease,
)
from pipeline.storage.local import LocalStore
from pipeline.storage.store import open_store
from pipeline.testing.fake_clock import FakeClock
from pipeline.testing.stores import Faults, FaultyStore, disk_full

HOLDER = Holder(3, "a" * 32, "node7", 4711, "", "2026-01-01T12:00:00Z", 30.0)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    found = open_store(tmp_path / "job-1", private=True, fsync=False)
    assert isinstance(found, LocalStore)
    return found


def leave_behind(store: LocalStore, **changes: object) -> Holder:
    """Write the lease of a driver that vanished on another machine."""
    holder = replace(HOLDER, **{"epoch": 1, **changes})
    store.put_if_absent(f"lease/{holder.epoch}.json", holder.to_json_bytes())
    store.replace(f"lease/{holder.epoch}.beat", f"{holder.name} 7\n".encode())
    return holder


@pytest.mark.parametrize(
    ("sight", "waited", "is_dead", "expected"),
    [
        (LeaseSnapshot(0), 0.0, False, Verdict.FREE),
        (LeaseSnapshot(3, HOLDER, "a released"), 0.0, False, Verdict.FREE),
        (LeaseSnapshot(3, HOLDER, "a 7"), 0.0, True, Verdict.DEAD),
        (LeaseSnapshot(3, HOLDER, "a 7"), 0.0, False, Verdict.WAIT),
        (LeaseSnapshot(3, HOLDER, "a 7"), 29.9, False, Verdict.WAIT),
        (LeaseSnapshot(3, HOLDER, "a 7"), 30.0, False, Verdict.STALE),
        (LeaseSnapshot(3, HOLDER, "a 8"), 30.0, False, Verdict.LIVE),
        (LeaseSnapshot(4, HOLDER, "a 7"), 30.0, False, Verdict.LIVE),
        # The holder beats for its own setting: it must be given that long.
        (LeaseSnapshot(3, replace(HOLDER, lease_seconds=60.0), "a 7"), 59.9, False, Verdict.WAIT),
        (LeaseSnapshot(3, replace(HOLDER, lease_seconds=1.0), "a 7"), 29.9, False, Verdict.WAIT),
        # A damaged record does not lock a job for ever.
        (LeaseSnapshot(3, None, "a 7"), 30.0, False, Verdict.STALE),
    ],
)
def test_decisions(sight: LeaseSnapshot, waited: float, is_dead: bool, expected: Verdict) -> None:
    """The verdict depends on holder, heartbeat, the time waited and the lease seconds alone."""
    first = LeaseSnapshot(3, HOLDER, "a 7")
    assert judge_lease(sight, first=first, waited=waited, lease_seconds=30.0, is_dead=is_dead) is expected


def test_released_leases_are_taken_at_once_with_rising_epochs(store: LocalStore) -> None:
    """A released lease is acquired without waiting, with the next epoch."""
    for epoch in (1, 2, 3):
        with hold_lease(store) as lease:
            assert (lease.epoch, lease.acquired) == (epoch, Verdict.FREE)
            lease.check()
    assert read_lease(store).is_released


def test_a_live_driver_locks_the_job_and_is_named(store: LocalStore) -> None:
    """A heartbeat during the wait raises `JobLocked`, which names the holder's process."""
    clock = FakeClock(1000.0)
    with hold_lease(store) as lease:
        clock.during_pause[2] = lease.write_heartbeat
        with pytest.raises(JobLocked) as caught:
            acquire_lease(store, clock=clock, pause=clock.pause)
        lease.check()
    assert caught.value.exit_code == 6
    assert clock.pauses == 3
    assert f"process {os.getpid()} on {lease.holder.host}" in caught.value.found
    assert "resume job-1" in caught.value.next_step


def test_silence_on_another_machine_is_taken_over_after_lease_seconds(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A lease of another machine without heartbeat is acquired after 30 s, with one warning."""
    leave_behind(store)
    clock = FakeClock(1000.0)
    with caplog.at_level("WARNING"):
        lease = acquire_lease(store, lease_seconds=30.0, clock=clock, pause=clock.pause)
    assert (lease.epoch, lease.acquired) == (2, Verdict.STALE)
    assert 30.0 <= clock.now - 1000.0 < 31.0
    assert [record.message for record in caplog.records] == [
        "process 4711 on node7, started 2026-01-01T12:00:00Z may be running this job; "
        "this driver takes over after 30 s without a heartbeat"
    ]


@pytest.mark.fault(45)
def test_a_wall_clock_that_jumps_changes_nothing(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that jumps by an hour does not change the wait: only the monotonic clock counts."""
    hour = 3600.0
    jumps = itertools.cycle((hour, -hour))
    real = time.time

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.fromtimestamp(time.time(), tz)  # type: ignore[arg-type]

    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    monkeypatch.setattr(lease_module, "datetime", Jumping)
    leave_behind(store)
    clock = FakeClock(1000.0)
    lease = acquire_lease(store, lease_seconds=30.0, clock=clock, pause=clock.pause)
    assert 30.0 <= clock.now - 1000.0 < 31.0
    clock.during_pause[clock.pauses] = lease.write_heartbeat
    with pytest.raises(JobLocked):
        acquire_lease(store, lease_seconds=30.0, clock=clock, pause=clock.pause)


def test_of_two_that_wait_for_a_stale_lease_one_gets_it(store: LocalStore) -> None:
    """If two drivers wait for a stale lease, one acquires the lease, and the other gets `JobLocked`."""
    leave_behind(store)
    first, second = FakeClock(1000.0), FakeClock(1000.0)
    # The first takes the job in the very moment in which the second has waited for long enough.
    second.during_pause[149] = lambda: acquire_lease(store, clock=first, pause=first.pause)
    with pytest.raises(JobLocked):
        acquire_lease(store, clock=second, pause=second.pause)
    assert highest_epoch(store) == 2


def test_losing_the_race_for_an_epoch_is_a_lock(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that loses the race for an epoch gets `JobLocked`."""
    put = store.put_if_absent

    def slow(name: str, data: bytes) -> bool:
        monkeypatch.setattr(store, "put_if_absent", put)
        acquire_lease(store)
        return put(name, data)

    monkeypatch.setattr(store, "put_if_absent", slow)
    with pytest.raises(JobLocked):
        acquire_lease(store)
    assert highest_epoch(store) == 1


@pytest.mark.fault(12)
def test_a_driver_that_slept_through_a_takeover_is_fenced(store: LocalStore) -> None:
    """A paused driver whose lease was acquired by another is `Fenced`, and cannot change the new lease."""
    paused = acquire_lease(store)
    paused.check()
    clock = FakeClock(1000.0)
    other = acquire_lease(store, clock=clock, pause=clock.pause)
    with pytest.raises(Fenced) as caught:
        paused.check()
    assert caught.value.exit_code == 6
    assert f"epoch 2, process {os.getpid()}" in caught.value.found
    other.check()
    # What it does on waking touches nothing of the new holder.
    before = {name: store.read(f"lease/{name}") for name in store.list("lease")}
    paused.write_heartbeat()
    paused.release()
    assert {name: store.read(f"lease/{name}") for name in store.list("lease")} == before


def test_the_heartbeat_notices_a_takeover(store: LocalStore) -> None:
    """A heartbeat sets ``is_lost`` when a higher epoch exists."""
    lease = acquire_lease(store)
    store.put_if_absent("lease/2.json", replace(HOLDER, epoch=2).to_json_bytes())
    assert not lease.is_lost
    lease.write_heartbeat()
    assert lease.is_lost


def test_the_thread_beats_until_the_end(store: LocalStore) -> None:
    """The heartbeat counts up from 1, ends with ``released``, and leaves no thread."""
    beats, enough = [], threading.Event()
    replace_verb = store.replace

    def noted(name: str, data: bytes) -> None:
        replace_verb(name, data)
        beats.append(data)
        if len(beats) >= 4:
            enough.set()

    store.replace = noted  # type: ignore[method-assign]
    with hold_lease(store, lease_seconds=0.06):
        assert enough.wait(20)
    counts = [beat.split()[1] for beat in beats]
    assert counts[:4] == [b"1", b"2", b"3", b"4"]
    assert counts[-1] == b"released"
    assert not [thread for thread in threading.enumerate() if thread.name == "pipeline-lease"]


def test_ended_process_is_recognised(store: LocalStore) -> None:
    """A holder has ended only if its process on this machine is gone, even if the number is used again."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = leave_behind(store, pid=child.pid, process=identify(child.pid))
    assert holder.process
    assert not has_ended(holder)
    # Another process with the same number, later.
    assert has_ended(replace(holder, process=holder.process + "1"))
    # Another machine, another container, or none that can be told.
    assert not has_ended(replace(holder, process="other/" + holder.process))
    assert not has_ended(replace(holder, process=""))
    assert not has_ended(None)
    child.kill()
    # Not waited for yet: a zombie does nothing any more either.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(holder)
    child.communicate()
    assert has_ended(holder)
    clock = FakeClock(1000.0)
    lease = acquire_lease(store, clock=clock, pause=clock.pause)
    assert (lease.epoch, lease.acquired, clock.pauses) == (2, Verdict.DEAD, 0)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 1, "epoch": 1}'])
def test_a_damaged_record_only_costs_the_wait(store: LocalStore, content: bytes) -> None:
    """A damaged lease record can be acquired after the full wait."""
    store.replace("lease/1.json", content)
    clock = FakeClock(1000.0)
    assert acquire_lease(store, clock=clock, pause=clock.pause).acquired is Verdict.STALE


def test_records_survive_json() -> None:
    """A holder is read back from its JSON unchanged."""
    assert Holder.from_json(HOLDER.to_json_bytes()) == HOLDER
    assert json.loads(HOLDER.to_json_bytes())["schema_version"] == 1


def test_a_full_disk_is_no_lease(store: LocalStore) -> None:
    """A full disk raises `DiskFull` and acquires no lease."""

    class Full(LocalStore):
        def put_if_absent(self, name: str, data: bytes) -> bool:
            raise DiskFull("there is no space left on the storage")

    with pytest.raises(DiskFull):
        acquire_lease(Full(Path(store.root)))
    assert read_lease(store) == LeaseSnapshot(0)


def test_a_release_that_cannot_be_written_hides_nothing(store: LocalStore) -> None:
    """A release that fails does not mask the error of the block."""
    faulty = FaultyStore(store, Faults(None, fault=disk_full, is_permanent=True))

    def drive() -> None:
        with hold_lease(faulty):  # type: ignore[arg-type]
            faulty.faults.fail_at = faulty.faults.count
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drive()
    assert faulty.faults.has_failed
    assert not read_lease(store).is_released


def test_lease_files_are_private_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with hold_lease(open_store(tmp_path / "job-1", private=True)):
            pass
    finally:
        os.umask(before)
    paths = [tmp_path / "job-1", *(tmp_path / "job-1").rglob("*")]
    assert len(paths) == 4
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
