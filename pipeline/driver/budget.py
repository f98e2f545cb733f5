"""`BudgetMonitor`: add up what a job spends while it runs, and ask for a stop once its budget is used up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pipeline.events import RunningPartition
from pipeline.jobs.budget import BudgetUse, Spending, budget_of, cost_of, read_spending, receipts_of, whole_job
from pipeline.jobs.cancellation import Stop, StopReason
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.receipts import Receipt
from pipeline.spec.budget import Budget

logger = logging.getLogger(__name__)
SECONDS = 1.0
"""Seconds between two looks at the machines with workers."""
WRITE_SECONDS, REMOTE_SECONDS = 2.0, 15.0
"""Seconds between two records of the spending, on a file system and on an object store."""


@dataclass
class BudgetMonitor:
    """The spending of a whole job, as one driver sees it. Threads share it."""

    job: JobDirectory
    """The whole job."""
    epoch: str
    """Name of this driver's record."""
    stop: Stop
    limits: Budget | None = None
    clock: Callable[[], float] = time.monotonic
    before_seconds: float = 0.0
    """Node-seconds of earlier drivers."""
    node_seconds: float = 0.0
    """Node-seconds of this driver."""
    _costs: dict[tuple[str, int, str], float] = field(default_factory=dict)
    """Cost of each receipt, by job or stage, round and partition."""
    _running: dict[str, dict[str, float]] = field(default_factory=dict)
    """Cost of the partitions that run, by job or stage."""
    _written: float | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @staticmethod
    def open(job: JobDirectory, *, epoch: int, stop: Stop) -> BudgetMonitor:
        """Return the monitor of the whole job of ``job``, with what its earlier runs have spent."""
        root = whole_job(job)
        name = str(epoch) if root.id == job.id else f"{job.id}-{epoch}"
        monitor = BudgetMonitor(root, name, stop, budget_of(root))
        if monitor.limits is not None:
            monitor.before_seconds = read_spending(root.store, without=name).node_seconds
            for receipt in receipts_of(root):
                monitor._costs[receipt.plan, receipt.round, receipt.partition] = cost_of(receipt)
            monitor.record()
        return monitor

    @property
    def is_active(self) -> bool:
        """True if the job has a budget."""
        return self.limits is not None

    @property
    def use(self) -> BudgetUse:
        """Spending until now."""
        with self._lock:
            cost = sum(self._costs.values()) + sum(sum(costs.values()) for costs in self._running.values())
            hours = (self.before_seconds + self.node_seconds) / 3600.0
        limits = self.limits
        return BudgetUse(cost, hours, *((limits.cost, limits.node_hours) if limits is not None else ()))

    def add(self, job: str, receipt: Receipt) -> None:
        """Count a receipt.

        :param job: directory of the job or stage.
        """
        if self.limits is None:
            return
        with self._lock:
            self._running.get(job, {}).pop(receipt.partition, None)
            self._costs[receipt.plan, receipt.round, receipt.partition] = cost_of(receipt)
        self.check()

    def advanced(self, job: str, running: Iterable[RunningPartition]) -> None:
        """Take over what the running partitions of a job or stage have spent."""
        if self.limits is None:
            return
        with self._lock:
            self._running[job] = {part.partition: part.cost for part in running if part.cost}
        self.check()

    def ended(self, job: str) -> None:
        """Forget the running partitions of a job or stage: none runs any more."""
        with self._lock:
            self._running.pop(job, None)

    def check(self) -> None:
        """Request a stop if a limit is reached."""
        if self.limits is None or self.stop.is_requested:
            return
        use = self.use
        if use.exhausted:
            self.stop.request(StopReason.BUDGET, message=use.text())
            logger.warning("the budget is used up (%s): no more partitions are started", use.text())

    @contextmanager
    def metering(self, client: Any) -> Iterator[None]:
        """Count the machines of the workers of ``client`` while the block runs, and record the spending."""
        if self.limits is None:
            yield
            return
        is_over = threading.Event()
        thread = threading.Thread(target=self._meter, args=(client, is_over), name="pipeline-budget", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join(10.0)
            self.record()

    def _meter(self, client: Any, is_over: threading.Event) -> None:
        before, nodes = self.clock(), self._nodes(client, 0)
        while not is_over.wait(SECONDS):
            now, found = self.clock(), self._nodes(client, nodes)
            self.count(nodes, now - before)
            before, nodes = now, found
        self.count(nodes, self.clock() - before)

    def count(self, nodes: int, seconds: float) -> None:
        """Count ``seconds`` of ``nodes`` machines, and record the spending if it is time to."""
        with self._lock:
            self.node_seconds += nodes * seconds
        self.check()
        every = WRITE_SECONDS if self.job.store.is_local else REMOTE_SECONDS
        if self._written is None or self.clock() - self._written >= every:
            self.record()

    def record(self) -> None:
        """Store what is spent. An error is only logged: no job fails for it."""
        if self.limits is None:
            return
        self._written = self.clock()
        try:
            Spending(self.use.cost, self.node_seconds).write(self.job.store, self.epoch)
        except Exception as error:
            logger.warning("the spending could not be recorded: %s: %s", type(error).__name__, error)

    @staticmethod
    def _nodes(client: Any, known: int) -> int:
        """Return the machines that have workers; ``known`` if the scheduler does not say."""
        try:
            workers = client.scheduler_info(n_workers=-1)["workers"]
            return len({urlsplit(address).hostname or address for address in workers})
        except Exception:
            return known
