"""A simulated world for one trigger: a clock, a disk that loses power, servers that are killed, jobs that take time.

Several servers look at the same trigger, also in the middle of each other's looks. The world keeps every record that
the trigger's log ever had, so that a test can say afterwards whether each was right.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from pipeline.errors import SpecError, StorageError
from pipeline.service.triggers.arrivals import ArrivedFile
from pipeline.service.triggers.decide import Success
from pipeline.service.triggers.evaluate import evaluate_trigger
from pipeline.service.triggers.log import Firing, Log
from pipeline.spec.triggers import ArrivalTrigger, Trigger
from pipeline.testing.memory_store import MemoryDisk, MemoryStore
from pipeline.testing.stores import Crash

FOLDER = ".triggers/t"


@dataclass
class SimulatedJob:
    """A job as its directory would tell of it."""

    id: str
    key: str
    firing: Firing
    begin: datetime
    end: datetime
    status: str
    """How it ends, once it is ``end``."""
    cancelled: datetime | None = None


@dataclass
class World:
    """All there is of one trigger."""

    trigger: Trigger
    now: datetime
    random: random.Random
    job_seconds: float = 600.0
    """Longest time a job takes."""
    disk: MemoryDisk = field(default_factory=lambda: _Disk())  # noqa: PLW0108 - it is defined below
    jobs: dict[str, SimulatedJob] = field(default_factory=dict)
    """By key."""
    files: dict[str, ArrivedFile] = field(default_factory=dict)
    """By path."""
    archive: dict[str, bytes] = field(default_factory=dict)
    """Records of the log that were removed."""
    looks: list[datetime] = field(default_factory=list)
    """When a look began that went to its end."""
    crashes: int = 0

    def server(self) -> Server:
        """One more process that looks at the trigger."""
        return Server(self)

    def tick(self) -> datetime:
        """The time; it goes on by a little with every question."""
        self.now += timedelta(milliseconds=1)
        return self.now

    def list_files(self, arrival: ArrivalTrigger, *, seen: object) -> tuple[ArrivedFile, ...]:
        """The files that are there now; once in a while the storage leaves one out."""
        there = [self.files[path] for path in sorted(self.files)]
        if there and self.random.random() < 0.02:
            there.remove(self.random.choice(there))
        return tuple(there)

    def history(self) -> list[dict[str, Any]]:
        """All records of the log, in order."""
        prefix = f"{FOLDER}/log/"
        found = {
            name: file.content
            for name, file in self.disk.files.items()
            if name.startswith(prefix) and name.endswith(".json")
        }
        found |= self.archive
        return [json.loads(found[name]) for name in sorted(found)]

    # What `pipeline.service.triggers.evaluate.Jobs` asks for

    def submit(self, firing: Firing) -> str:
        """Make the job of a firing, once; a process may die before that and after it."""
        self.disk.step()
        if self.random.random() < 0.02:
            raise StorageError("the storage failed")
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
        """How a job ended; empty while it goes on."""
        (one,) = (other for other in self.jobs.values() if other.id == job)
        return one.status if one.end <= self.now else ""

    def cancel(self, job: str) -> None:
        """End a job soon, if it is not over before that."""
        self.disk.step()
        (one,) = (other for other in self.jobs.values() if other.id == job)
        if one.end > self.now and one.cancelled is None:
            one.cancelled = self.now
            soon = self.now + timedelta(seconds=self.random.uniform(1, 30))
            if soon < one.end:
                one.end, one.status = soon, "CANCELLED"

    def successes(self, name: str) -> Sequence[Success]:
        """None: the world has one trigger."""
        return ()


class Server:
    """A process that looks at the trigger. Killed, it forgets everything."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._log = self._open()

    def _open(self) -> Log:
        return Log(_ArchivingStore(self.world), snapshot_every=20)

    def look(self) -> bool:
        """Look once; False when it was killed in it."""
        begin = self.world.now
        try:
            evaluate_trigger(
                self.world.trigger, self._log, jobs=self.world, clock=self.world.tick, look=self.world.list_files
            )
        except Crash:
            self._log = self._open()
            self.world.crashes += 1
            return False
        self.world.looks.append(begin)
        return True


class _Disk(MemoryDisk):
    """A disk on which something else may happen before any step."""

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
