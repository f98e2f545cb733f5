"""Two drivers, their workers and zombies in any order, with pauses, deaths and power cuts, on a disk that forgets.

Hypothesis chooses the order. Whatever it is: no row is there twice, none is lost, one number is one manifest, what was
acknowledged survives, and in the end any driver can finish the job.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipeline.common.checksum import checksum_bytes
from pipeline.errors import Fenced, JobLocked, PipelineError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import Lease, acquire_lease
from pipeline.jobs.manifest import Manifest
from pipeline.jobs.status import Status
from pipeline.sinks.parquet import layout
from pipeline.sinks.parquet.sink import ParquetSink
from pipeline.testing.jobs import SmallJob, small_job, write_receipt
from pipeline.testing.memory_store import MemoryDisk, MemoryStore
from pipeline.testing.stores import Crash

JOB = "small-1"
LEASE_SECONDS = 30.0
DRIVERS = (0, 1)
drivers = st.sampled_from(DRIVERS)


@dataclass
class Driver:
    """State of one driver, which is gone, asleep, or awake."""

    lease: Lease | None = None
    is_awake: bool = True
    manifest: Manifest | None = None
    """Checked, and about to be committed."""
    committed: Manifest | None = None
    is_published: bool = False


@dataclass
class Attempt:
    """A worker that has written its data and is about to put its receipt, at once or in an hour."""

    name: str
    receipt: bytes
    files: tuple[str, ...]


class HeldBack(MemoryStore):
    """A worker's store that stops before the receipt."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        self.held = (name, data)
        return True


Rule = Callable[..., None]


def powered(action: Rule) -> Rule:
    """The power may go in the middle of ``action``."""

    @wraps(action)
    def struck(self: TwoDrivers, **choices: object) -> None:
        try:
            action(self, **choices)
        except Crash:
            self.restart()

    return struck


class TwoDrivers(RuleBasedStateMachine):
    """One job directory and one sink on one disk."""

    fsync = True

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.job: SmallJob = small_job(Path(self.folder.name), sink="memory://two/out", rows=(4, 3, 5), bad_every=6)
        self.disk = MemoryDisk()
        self.drivers = [Driver() for _ in DRIVERS]
        self.attempts: list[Attempt] = []
        self.count = 0
        self.now = 1000.0
        self.promised: dict[str, bytes] = {}
        """Acknowledged file -> its content."""
        self.epoch = 0
        """The highest that a driver got."""
        self.chance = 0
        """Which of the changes that were not synced survive the next power cut, as bits."""

    def store(self, kind: type[MemoryStore] = MemoryStore) -> MemoryStore:
        return kind(self.disk, f"jobs/{JOB}", fsync=self.fsync)

    @initialize()
    def create(self) -> None:
        JobDirectory.create("jobs", self.job.plan, job=JOB, store=self.store())

    def directory(self) -> JobDirectory:
        return JobDirectory.open("", store=self.store())

    def promise(self, name: str) -> None:
        self.promised[name] = self.store().read(name)

    # Drivers

    @rule(number=drivers)
    @powered
    def acquire_lease(self, number: int) -> None:
        """A driver starts; the other one's heart beats if it is awake."""
        driver, other = self.drivers[number], self.drivers[1 - number]
        if driver.lease is not None:
            return
        is_locked = other.lease is not None and other.is_awake and not other.lease.fenced()

        def pause(seconds: float) -> None:
            self.now += seconds
            if other.lease is not None and other.is_awake:
                other.lease.write_heartbeat()

        try:
            lease = acquire_lease(self.store(), lease_seconds=LEASE_SECONDS, clock=lambda: self.now, pause=pause)
        except JobLocked:
            assert is_locked
        else:
            assert not is_locked
            assert lease.epoch > self.epoch
            self.drivers[number], self.epoch = Driver(lease), lease.epoch
            self.promise(f"lease/{lease.epoch}.json")

    def awake(self, number: int) -> Driver | None:
        driver = self.drivers[number]
        return driver if driver.lease is not None and driver.is_awake else None

    @rule(number=drivers)
    def take_over(self, number: int) -> None:
        """The other driver falls asleep, wherever it is, for longer than the lease."""
        self.drivers[1 - number].is_awake = False
        self.acquire_lease(number=number)

    @rule(number=drivers)
    def wake(self, number: int) -> None:
        self.drivers[number].is_awake = True

    @rule(number=drivers)
    def kill(self, number: int) -> None:
        self.drivers[number] = Driver()

    @rule(number=drivers, partition=st.integers(0, 2))
    @powered
    def start_partition(self, number: int, partition: int) -> None:
        """A worker does a partition, up to its receipt. Its driver may be fenced: nothing stops the worker."""
        if self.awake(number) is None:
            return
        self.count += 1
        store = self.store(HeldBack)
        assert isinstance(store, HeldBack)
        directory = JobDirectory.open("", store=store)
        receipt = write_receipt(directory, self.job, self.job.plan.partitions[partition], attempt=f"a{self.count}")
        files = tuple(f"rounds/0/{file.name}" for file in (receipt.data, receipt.rejects) if file)
        self.attempts.append(Attempt(*store.held, files))

    @precondition(lambda self: self.attempts)
    @rule(choice=st.integers(0, 10))
    @powered
    def land(self, choice: int) -> None:
        """A worker puts its receipt; if another one's is there, it takes its files away."""
        attempt = self.attempts.pop(choice % len(self.attempts))
        store = self.store()
        if store.put_if_absent(attempt.name, attempt.receipt):
            self.promise(attempt.name)
            return
        assert store.read(attempt.name) != attempt.receipt
        for name in attempt.files:
            store.remove(name)

    @rule(number=drivers)
    def finish_partitions(self, number: int) -> None:
        """All that is left, so that what comes after it is reached often."""
        for partition in range(len(self.job.plan.partitions)):
            self.start_partition(number=number, partition=partition)
        while self.attempts:
            self.land(choice=0)

    @rule(number=drivers)
    @powered
    def prepare(self, number: int) -> None:
        """All is done: a driver makes the manifest, and looks at its lease."""
        driver = self.awake(number)
        if driver is None or driver.lease is None:
            return
        directory = self.directory()
        receipts = directory.receipts.all()
        if len(receipts) < len(self.job.plan.partitions) or directory.status().is_success:
            return
        try:
            driver.lease.check()
        except Fenced:
            self.drivers[number] = Driver()
            return
        assert driver.lease.epoch == self.epoch, "a driver that was taken over from writes a status"
        directory.set_status(Status.PUBLISHING)
        # Each has seen the partitions end in another order.
        driver.manifest = directory.manifests.prepare(directory.ledger(receipts if number else reversed(receipts)))

    @rule(number=drivers)
    @powered
    def commit(self, number: int) -> None:
        """The commit, however long after the look: the other may have taken over, committed and published."""
        driver = self.awake(number)
        if driver is None or driver.manifest is None:
            return
        committed = self.directory().manifests.commit(driver.manifest)
        driver.committed, driver.manifest = committed.manifest, None
        self.promise(f"manifests/{committed.manifest.number}.json")

    @rule(number=drivers)
    @powered
    def publish(self, number: int) -> None:
        """Without a look before: a driver that slept just after it."""
        driver = self.awake(number)
        if driver is None or driver.committed is None:
            return
        sink = ParquetSink(lambda path: MemoryStore(self.disk, "out", fsync=self.fsync))
        sink.publish(driver.committed, self.directory())
        driver.is_published = True

    @rule(number=drivers)
    @powered
    def finish(self, number: int) -> None:
        driver = self.awake(number)
        if driver is None or driver.lease is None or not driver.is_published:
            return
        self.drivers[number] = Driver()
        with suppress(Fenced):
            driver.lease.check()
            assert driver.lease.epoch == self.epoch, "a driver that was taken over from writes a status"
            if not self.directory().status().is_success:
                self.directory().set_status(Status.SUCCEEDED_WITH_WARNINGS)
            driver.lease.release()

    # Power

    @rule(steps=st.integers(0, 150), chance=st.integers(0, 2**16 - 1))
    def arm(self, steps: int, chance: int) -> None:
        """The power will go in the middle of what comes next, or of what comes after that."""
        self.disk.steps_left, self.chance = steps, chance

    def restart(self) -> None:
        """Everybody is gone, and what was not synced survives by chance."""
        places = count()
        self.disk.restart(survives=lambda name: bool(self.chance >> next(places) % 16 & 1))
        self.drivers = [Driver() for _ in DRIVERS]
        self.attempts = []

    # What must hold

    @invariant()
    def acknowledged_things_stay(self) -> None:
        for name, content in self.promised.items():
            assert self.look(f"jobs/{JOB}/{name}") == content, name

    def look(self, path: str) -> bytes | None:
        """A file, read by somebody who has a power supply of his own."""
        file = self.disk.files.get(path)
        return None if file is None else file.content

    @invariant()
    def the_output_is_whole_or_not_there(self) -> None:
        manifest = self.look(f"out/{layout.MANIFEST}")
        if manifest is None:
            return
        state = layout.SinkState.from_json(manifest, where="")
        assert len(state.publications) == 1
        tables = []
        for file in state.files:
            data = self.look(f"out/{file.name}")
            assert data is not None
            assert checksum_bytes(data) == file.checksum
            tables.append(pq.read_table(io.BytesIO(data)))
        rows = pa.concat_tables(tables).replace_schema_metadata(None).combine_chunks()
        assert rows == self.job.expected

    @invariant()
    def there_is_one_manifest_and_one_success(self) -> None:
        names = [name for name in self.disk.files if name.startswith(f"jobs/{JOB}/manifests/") and "/." not in name]
        assert names in ([], [f"jobs/{JOB}/manifests/1.json"])
        events = self.look(f"jobs/{JOB}/events.jsonl") or b""
        assert events.count(b'"after": "SUCCEEDED_WITH_WARNINGS"') <= 1

    def teardown(self) -> None:
        """In the end one driver finishes the job, whatever state it is in."""
        try:
            if self.disk.files:
                self.converge()
        finally:
            self.folder.cleanup()

    def converge(self) -> None:
        self.disk.steps_left = None
        self.drivers = [Driver(), Driver(self.drivers[1].lease, is_awake=False)]
        self.acquire_lease(number=0)
        self.finish_partitions(number=0)
        for step in (self.prepare, self.commit, self.publish, self.finish):
            step(number=0)
        assert self.directory().status() is Status.SUCCEEDED_WITH_WARNINGS
        self.acknowledged_things_stay()
        self.the_output_is_whole_or_not_there()
        assert self.look(f"out/{layout.SUCCESS}") is not None


TestTwoDrivers = TwoDrivers.TestCase
TestTwoDrivers.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTwoDrivers.pytestmark = [pytest.mark.fault(12, 31)]


STEPS = ("prepare", "commit", "publish", "finish")


@pytest.mark.parametrize("seconds_steps", range(5))
@pytest.mark.parametrize("firsts_steps", range(4))
@pytest.mark.fault(12)
def test_a_takeover_at_every_point(firsts_steps: int, seconds_steps: int) -> None:
    """The first driver sleeps after so many steps, the second gets so far, then the first wakes and goes on."""
    machine = TwoDrivers()
    machine.create()
    machine.acquire_lease(number=0)
    machine.finish_partitions(number=0)
    try:
        for number, steps in ((0, STEPS[:firsts_steps]), (1, STEPS[:seconds_steps]), (0, STEPS[firsts_steps:])):
            if number == 1:
                machine.take_over(number=1)
            machine.wake(number=number)
            for step in steps:
                getattr(machine, step)(number=number)
                machine.acknowledged_things_stay()
                machine.the_output_is_whole_or_not_there()
                machine.there_is_one_manifest_and_one_success()
    finally:
        machine.teardown()


class Forgetful(TwoDrivers):
    """The same without fsync, to show that the machine above would notice."""

    fsync = False


@pytest.mark.fault(31)
def test_without_fsync_something_is_lost() -> None:
    quick = settings(TestTwoDrivers.settings, max_examples=200, derandomize=True, phases=[Phase.generate])
    with pytest.raises((AssertionError, PipelineError)):
        run_state_machine_as_test(Forgetful, settings=quick)


@pytest.mark.parametrize("chance", [0, 1, 0xFFFF])
@pytest.mark.parametrize("verb", ["put_if_absent", "replace"])
@pytest.mark.fault(31)
def test_a_power_cut_at_every_step_leaves_all_or_nothing(verb: str, chance: int) -> None:
    outcomes = []
    for steps in range(10):
        disk = MemoryDisk()
        store = MemoryStore(disk, "here")
        store.replace("other", b"before")
        disk.steps_left = steps
        is_done = False
        with suppress(Crash):
            getattr(store, verb)("name", b"content")
            is_done = True
        disk.restart(survives=lambda name: bool(chance))
        left = store.read("name") if store.exists("name") else None
        assert left in (None, b"content")
        assert left is not None or not is_done
        assert store.read("other") == b"before"
        outcomes.append(left)
    assert outcomes[0] is None
    assert outcomes[-1] == b"content"


def test_a_power_cut_takes_what_was_not_synced() -> None:
    disk = MemoryDisk()
    store = MemoryStore(disk, "here", fsync=False)
    store.put_if_absent("name", b"content")
    disk.restart()
    assert not store.exists("name")
    store.put_if_absent("name", b"content")
    disk.restart(survives=lambda name: True)
    assert store.read("name") == b"", "a name may survive without what it names"
