"""Who was executing when a worker left. Pure: facts in, deaths out.

Dask blames every task that was assigned to a worker that died, also those that only waited there. Here a partition is
blamed only when its code had begun: the task tells the scheduler before it does anything else
(`pipeline.execution.evidence`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Cause = Literal["memory", "crash", "left", "recycled"]
"""Why a worker is gone: its nanny ended it for its memory; unasked; in good order; the driver had it restarted."""


@dataclass(frozen=True)
class Started:
    """A task begins to execute."""

    key: str
    worker: str
    """Address."""
    threads: int = 0
    """Tasks the worker does at a time; 0: unknown."""


@dataclass(frozen=True)
class MemoryRanOut:
    """A nanny is about to end its worker for its memory."""

    worker: str


@dataclass(frozen=True)
class WorkerLeft:
    """The scheduler has removed a worker."""

    worker: str
    is_expected: bool
    """It said before that it would go: its lifetime was over, or it was retired."""


Fact = Started | MemoryRanOut | WorkerLeft


@dataclass(frozen=True)
class Death:
    """A task was executing when its worker left."""

    key: str
    worker: str
    cause: Cause


@dataclass(frozen=True)
class Execution:
    """Where a task executes, and since when by the driver's clock."""

    worker: str
    since: float


@dataclass
class Ledger:
    """What executes where, told by facts in the order in which the scheduler had them."""

    _executing: dict[str, Execution] = field(default_factory=dict)
    _out_of_memory: set[str] = field(default_factory=set)
    _recycled: set[str] = field(default_factory=set)

    @property
    def executing(self) -> Mapping[str, Execution]:
        """By key."""
        return self._executing

    def learn(self, fact: Fact, *, now: float) -> tuple[Death, ...]:
        """Take a fact in; the tasks whose execution it ended."""
        if isinstance(fact, Started):
            if fact.threads == 1:
                # What ran there has ended, even if its result has not come yet: it is not to blame for what follows.
                for key in self._on(fact.worker):
                    del self._executing[key]
            self._executing[fact.key] = Execution(fact.worker, now)
            return ()
        if isinstance(fact, MemoryRanOut):
            self._out_of_memory.add(fact.worker)
            return ()
        cause = self._cause(fact)
        self._out_of_memory.discard(fact.worker)
        self._recycled.discard(fact.worker)
        keys = self._on(fact.worker)
        for key in keys:
            del self._executing[key]
        return tuple(Death(key, fact.worker, cause) for key in keys)

    def _on(self, worker: str) -> list[str]:
        return [key for key, execution in self._executing.items() if execution.worker == worker]

    def ended(self, key: str) -> None:
        """The task is over, or was taken back."""
        self._executing.pop(key, None)

    def will_recycle(self, worker: str) -> None:
        """The driver is about to have that worker restarted; nobody is to blame for that."""
        self._recycled.add(worker)

    def busy_workers(self) -> set[str]:
        """Addresses where something executes."""
        return {execution.worker for execution in self._executing.values()}

    def overdue(self, *, now: float, limit: float | None) -> tuple[str, ...]:
        """Keys of what has executed for longer than ``limit`` seconds."""
        if limit is None:
            return ()
        return tuple(key for key, execution in self._executing.items() if now - execution.since > limit)

    def _cause(self, fact: WorkerLeft) -> Cause:
        if fact.worker in self._recycled:
            return "recycled"
        if fact.worker in self._out_of_memory:
            return "memory"
        return "left" if fact.is_expected else "crash"
