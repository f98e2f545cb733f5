"""Simulate a world for one trigger: clock, disk with power cuts, servers that are killed, jobs that take time.

Several servers evaluate the same trigger, also in the middle of each other's evaluations. The world keeps every record
that the trigger's log ever had, so that a test can check each record afterwards.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from pipeline.errors import CorruptInput, SpecError, StorageError
from pipeline.service.triggers.arrivals import ArrivedFile
from pipeline.service.triggers.decide import Success
from pipeline.service.triggers.evaluate import BadFiles, evaluate_trigger
from pipeline.service.triggers.log import Firing, Log
from pipeline.spec.triggers import ArrivalTrigger, Trigger
from pipeline.testing.memory_store import MemoryDisk, MemoryStore
from pipeline.testing.stores import Crash

FOLDER = ".triggers/t"


@dataclass
class SimulatedJob:
    """A job with the state that its directory would show."""

    id: str
    key: str
    firing: Firing
    begin: datetime
    end: datetime
    status: str
    """Status of the job from ``end`` on."""
    cancelled: datetime | None = None


@dataclass
class World:
    """All state around one trigger."""

    trigger: Trigger
    now: datetime
    random: random.Random
    job_seconds: float = 600.0
    """Longest duration of a job."""
    disk: MemoryDisk = field(default_factory=lambda: _Disk())  # noqa: PLW0108 - it is defined below
    jobs: dict[str, SimulatedJob] = field(default_factory=dict)
    """Jobs by key."""
    files: dict[str, ArrivedFile] = field(default_factory=dict)
    """Files by path."""
    bad: set[str] = field(default_factory=set)
    """Paths of files for which no job can be created."""
    archive: dict[str, bytes] = field(default_factory=dict)
    """Records removed from the log."""
    evaluations: list[datetime] = field(default_factory=list)
    """Start times of the completed evaluations of the trigger."""
    crashes: int = 0

    def server(self) -> SimulatedServer:
        """Return a new process that evaluates the trigger."""
        return SimulatedServer(self)

    def tick(self) -> datetime:
        """Return the time; each call advances the clock by 1 ms."""
        self.now += timedelta(milliseconds=1)
        return self.now

    def list_files(self, arrival: ArrivalTrigger, *, seen: object) -> tuple[ArrivedFile, ...]:
        """Return the current files; with a probability of 2 % the storage omits one."""
        there = [self.files[path] for path in sorted(self.files)]
        if there and self.random.random() < 0.02:
            there.remove(self.random.choice(there))
        return tuple(there)

    def history(self) -> list[dict[str, Any]]:
        """Return all records of the log, in order."""
        prefix = f"{FOLDER}/log/"
        found = {
            name: file.content
            for name, file in self.disk.files.items()
            if name.startswith(prefix) and name.endswith(".json")
        }
        found |= self.archive
        return [json.loads(found[name]) for name in sorted(found)]

    # The methods of `pipeline.service.triggers.evaluate.Jobs`

    def submit(self, firing: Firing) -> str:
        """Create the job of a firing, once; a process may die before and after it."""
        self.disk.step()
        if self.random.random() < 0.02:
            raise StorageError("the storage failed")
        bad = {file: "a damaged file" for file in firing.files if file.path in self.bad}
        if bad:
            raise BadFiles(CorruptInput("a damaged file"), bad)
        if firing.id.endswith("7") and len(firing.id) == 24:
            raise SpecError("such a job cannot be")
        if firing.id not in self.jobs:
            length = timedelta(seconds=self.random.uniform(1, self.job_seconds))
            status = self.random.choices(["SUCCEEDED", "SUCCEEDED_WITH_WARNINGS", "FAILED"], [8, 1, 1])[0]
            job = f"job-{len(self.jobs)}"
            self.jobs[firing.id] = SimulatedJob(job, firing.id, firing, self.now, self.now + length, status)
        self.disk.step()
        return self.jobs[firing.id].id

    def ended(self, job: str) -> str:
        """Return the final status of a job; empty while it runs."""
        (one,) = (other for other in self.jobs.values() if other.id == job)
        return one.status if one.end <= self.now else ""

    def cancel(self, job: str) -> None:
        """End a job within 30 seconds, unless it ends before that."""
        self.disk.step()
        (one,) = (other for other in self.jobs.values() if other.id == job)
        if one.end > self.now and one.cancelled is None:
            one.cancelled = self.now
            soon = self.now + timedelta(seconds=self.random.uniform(1, 30))
            if soon < one.end:
                one.end, one.status = soon, "CANCELLED"

    def successes(self, name: str) -> Sequence[Success]:
        """Return nothing: the world has one trigger."""
        return ()


class SimulatedServer:
    """A process that evaluates the trigger, and forgets everything when killed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._log = self._open()

    def _open(self) -> Log:
        return Log(_ArchivingStore(self.world), snapshot_every=20)

    def evaluate(self) -> bool:
        """Evaluate the trigger once; return False if the server was killed meanwhile."""
        begin = self.world.now
        try:
            evaluate_trigger(
                self.world.trigger, self._log, jobs=self.world, clock=self.world.tick, scan=self.world.list_files
            )
        except Crash:
            self._log = self._open()
            self.world.crashes += 1
            return False
        self.world.evaluations.append(begin)
        return True


class _Disk(MemoryDisk):
    """A disk on which another action may happen before any step."""

    def __init__(self) -> None:
        super().__init__()
        self.before_step: Callable[[], None] | None = None

    def step(self) -> None:
        meanwhile, self.before_step = self.before_step, None
        if meanwhile is not None:
            meanwhile()
        super().step()


class _ArchivingStore(MemoryStore):
    def __init__(self, world: World) -> None:
        super().__init__(world.disk, FOLDER)
        self._world = world

    def remove(self, name: str) -> None:
        file = self.disk.files.get(self._key(name))
        if file is not None and name.startswith("log/"):
            self._world.archive.setdefault(self._key(name), file.content)
        super().remove(name)
