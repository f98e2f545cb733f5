"""A Dask cluster that a test plays step by step: without processes, threads or waiting.

`FakeCluster` is passed as the client. Its tasks are keys, and their results are `FakeReceipt`. `DispatcherRun` drives a
dispatcher on it, one turn at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from pipeline.common.rows import Fragment
from pipeline.common.step_output import OutputLine
from pipeline.events import RunningPartition
from pipeline.execution import step_messages
from pipeline.execution.dispatcher import Dispatcher
from pipeline.execution.protocols import AttemptResult, Mitigation, SplitResult
from pipeline.execution.worker_events import ALL_TOPIC, LEAVING_TOPIC, MEMORY_TOPIC, PROGRESS_TOPIC, STARTED_TOPIC
from pipeline.plan.plan import Partition
from pipeline.scoring.progress import ProgressSnapshot
from pipeline.testing.fake_clock import FakeClock

NEVER = "never"
"""Outcome of a task that ends only when a test ends it."""
Split = Callable[..., SplitResult | None]


@dataclass(frozen=True)
class FakeReceipt:
    """Receipt of a partition, as far as a dispatcher reads it."""

    partition: str
    splits: tuple[str, ...] = ()


@dataclass(eq=False)
class FakeFuture:
    """A submitted task."""

    key: str
    workers: tuple[str, ...] = ()
    """Workers on which the task may run; empty: any."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Resources that the task asks for."""
    outcome: Any = None
    is_cancelled: bool = False
    is_released: bool = False
    callbacks: list[Callable[[Any], None]] = field(default_factory=list)

    def finish(self, outcome: Any) -> None:
        """End with a result, or with an exception."""
        self.outcome = outcome
        for callback in self.callbacks:
            callback(self)

    def result(self, timeout: float) -> Any:
        """Return the result or raise the exception."""
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call ``callback`` at the end; at once for a task that has ended."""
        self.callbacks.append(callback)
        if self.outcome is not None:
            callback(self)

    def release(self) -> None:
        """Release the result."""
        self.is_released = True

    def cancel(self, *, force: bool = False) -> None:
        """Cancel the task."""
        self.is_cancelled = True


class FakeCluster:
    """Client, scheduler and workers in one.

    :param workers: names of the workers.
    :param threads: threads of each worker.
    :param outcomes: outcomes of the attempts at a partition, in order: a result, an exception or `NEVER`. An attempt
        without one gets ``default``.
    :param default: `NEVER`, or None: the attempt ends at once with the receipt of its partition.
    """

    scheduler = SimpleNamespace(identity="identity", restart_workers="restart_workers")

    def __init__(
        self,
        *workers: str,
        threads: int = 1,
        outcomes: Mapping[str, Sequence[Any]] | None = None,
        default: Any = None,
    ) -> None:
        self.status = "running"
        self.threads = threads
        self.workers = dict.fromkeys(workers, "running")
        """Status of each worker, as the scheduler has it."""
        self.answers = True
        """True if the scheduler answers."""
        self.last_heartbeat: dict[str, float] = {}
        """Time of a worker's last heartbeat. Default: 1000."""
        self.resources: dict[str, Mapping[str, float]] = {}
        """Resources that a worker offers. Default: none."""
        self.progress: dict[str, ProgressSnapshot | None] = {}
        """Answers to calls into workers. A worker without one is frozen."""
        self.calls: list[tuple[str, tuple[Any, ...], str]] = []
        """Calls into workers: function, arguments, worker."""
        self.submitted: list[list[str]] = []
        """Keys of each submission."""
        self.futures: dict[str, FakeFuture] = {}
        self.restarted: list[str] = []
        self.on_restart: Callable[[], object] = lambda: None
        self._outcomes = {partition: list(results) for partition, results in (outcomes or {}).items()}
        self._default = default
        self._topics: dict[str, Callable[[tuple[float, Any]], None]] = {}

    # The client methods that a dispatcher uses

    def compute(
        self,
        keys: Sequence[str],
        *,
        retries: int,
        workers: Sequence[str] = (),
        allow_other_workers: bool = False,
        resources: Mapping[str, float] | None = None,
    ) -> list[FakeFuture]:
        """Submit tasks."""
        self.submitted.append(list(keys))
        futures = [FakeFuture(key, tuple(workers), resources or {}, self._outcome(key)) for key in keys]
        self.futures.update({future.key: future for future in futures})
        return futures

    def _outcome(self, key: str) -> Any:
        queued = self._outcomes.get(partition_of(key)) if not key.endswith("!") else None
        outcome = queued.pop(0) if queued else self._default
        if outcome == NEVER:
            return None
        return FakeReceipt(partition_of(key)) if outcome is None else outcome

    def sync(self, call: str, callback_timeout: float, **arguments: Any) -> Any:
        """Call a function of the scheduler."""
        if not self.answers:
            raise TimeoutError
        if call == "restart_workers":
            self.restarted += arguments["workers"]
            self.on_restart()
            return None
        return {
            "workers": {
                name: {
                    "nthreads": self.threads,
                    "status": status,
                    "last_seen": self.last_heartbeat.get(name, 1000.0),
                    "resources": self.resources.get(name, {}),
                }
                for name, status in self.workers.items()
            }
        }

    def run(self, function: Callable[..., Any], *arguments: Any, workers: list[str], on_error: str) -> dict[str, Any]:
        """Call a function in a worker.

        :raises TimeoutError: for a frozen worker, for which a real client would wait forever.
        """
        (worker,) = workers
        self.calls.append((function.__name__, arguments, worker))
        if worker not in self.progress:
            raise TimeoutError
        return {worker: self.progress[worker]}

    def subscribe_topic(self, topic: str, handler: Callable[[tuple[float, Any]], None]) -> None:
        """Subscribe to events of the scheduler."""
        self._topics[topic] = handler

    def unsubscribe_topic(self, topic: str) -> None:
        """Unsubscribe."""
        del self._topics[topic]

    # Events that a test plays

    def start_task(self, key: str, worker: str) -> None:
        """Let a task start."""
        self._log(STARTED_TOPIC, key=key, worker=worker)

    def advance_task(self, key: str, rows_done: int) -> None:
        """Let a task report the rows of its finished batches."""
        self._log(PROGRESS_TOPIC, key=key, rows_done=rows_done)

    def warn(self, key: str, text: str, *, worker: str = "a") -> None:
        """Let the step in a task warn."""
        place = ":".join(text.split(":")[:2])
        self._log(step_messages.TOPIC, key=key, step="f:build", kind="warning", place=place, text=text, worker=worker)

    def lose_worker(self, worker: str, *, is_expected: bool = False) -> None:
        """Let a worker leave: by a crash, or as announced."""
        self._log(ALL_TOPIC, action="remove-worker", worker=worker, expected=is_expected)

    def announce_leaving(self, worker: str, *, lifetime: float = 60.0, reason: str = "deadline") -> None:
        """Let a worker announce that it stops its partitions."""
        self._log(LEAVING_TOPIC, worker=worker, lifetime=lifetime, reason=reason)

    def kill_for_memory(self, worker: str) -> None:
        """Let a nanny kill its worker."""
        self._log(MEMORY_TOPIC, worker=worker)
        self.lose_worker(worker)

    def finish(self, key: str, outcome: Any = None) -> None:
        """Let a task end. Default outcome: the receipt of its partition."""
        self.futures[key].finish(FakeReceipt(partition_of(key)) if outcome is None else outcome)

    def _log(self, topic: str, **message: Any) -> None:
        self._topics[topic]((0.0, message))

    def calls_of(self, function: str) -> list[tuple[tuple[Any, ...], str]]:
        """Return arguments and worker of the calls of a function."""
        return [(arguments, worker) for name, arguments, worker in self.calls if name == function]


def partition_of(key: str) -> str:
    """Return the partition of a task of `FakeTasks`."""
    return key.rstrip("!").partition("~")[0]


@dataclass
class FakeTasks:
    """A `TaskSource` whose tasks are keys: ``p4``, then ``p4~2``, …; isolated: ``p4!``."""

    split_partition: Split = lambda partition, receipt, *, parts=2: None
    isolated: list[str] = field(default_factory=list)
    """Partitions that were isolated."""
    _counts: dict[str, int] = field(default_factory=dict)

    def submit(self, partitions: Sequence[Partition], /) -> list[Any]:
        """Return a key per partition."""
        return [self._key(partition.id) for partition in partitions]

    def _key(self, partition: str) -> str:
        count = self._counts[partition] = self._counts.get(partition, 0) + 1
        return partition if count == 1 else f"{partition}~{count}"

    def submit_isolated(self, partitions: Sequence[Partition], /) -> list[Any]:
        """Return a key per partition."""
        self.isolated += [partition.id for partition in partitions]
        return [f"{partition.id}!" for partition in partitions]

    def split(self, partition: Partition, receipt: Any, /, *, parts: int = 2) -> SplitResult | None:
        """Call ``split_partition``."""
        return self.split_partition(partition, receipt, parts=parts)

    def read(self, result: Any, /) -> Any:
        """Return the result itself."""
        return result


@dataclass
class FakeListener:
    """A `DispatchListener` that keeps the events it receives."""

    results: list[AttemptResult] = field(default_factory=list)
    mitigations: list[Mitigation] = field(default_factory=list)
    running: list[tuple[RunningPartition, ...]] = field(default_factory=list)
    messages: list[OutputLine] = field(default_factory=list)

    def attempt_finished(self, result: AttemptResult, /) -> None:
        """Keep a result."""
        self.results.append(result)

    def mitigation(self, mitigation: Mitigation, /) -> None:
        """Keep a mitigation."""
        self.mitigations.append(mitigation)

    def advanced(self, running: Sequence[RunningPartition], /) -> None:
        """Keep the progress of running partitions."""
        self.running.append(tuple(running))

    def step_message(self, line: OutputLine, /, *, worker: str, partition: str) -> None:
        """Keep a message of a step."""
        self.messages.append(line)

    def poll(self) -> None:
        """Do nothing."""

    def outcomes(self, partition: str) -> list[str]:
        """Return the outcomes of the attempts at a partition and its parts."""
        return [str(result.outcome) for result in self.results if result.partition.id.startswith(partition)]


def make_partitions(*names: str, rows: int = 1) -> list[Partition]:
    """Return partitions of one fragment."""
    return [Partition(name, (Fragment("f", 0, rows, 0, 1, rows),)) for name in names]


class DispatcherRun:
    """A dispatcher on a fake cluster, run by the test.

    :param options: fields of `Dispatcher`.
    """

    def __init__(
        self, cluster: FakeCluster, partitions: Sequence[Partition], *, split: Split | None = None, **options: Any
    ) -> None:
        self.cluster, self.partitions = cluster, partitions
        self.clock = FakeClock()
        self.tasks = FakeTasks(split) if split else FakeTasks()
        self.listener = FakeListener()
        self.receipts: list[Any] = []
        self.dispatcher = Dispatcher(
            cluster,
            self.tasks,
            self.listener,
            clock=self.clock,
            tick=0.0,
            background=lambda call: call(),
            **options,
        )

    def start(self) -> None:
        """Submit the first partitions."""
        self.dispatcher.start(self.partitions)
        self.step()

    def step(self, turns: int = 1, *, seconds: float = 0.0) -> None:
        """Let ``turns`` turns of the dispatcher pass, each after ``seconds``."""
        for _ in range(turns):
            self.clock.advance(seconds)
            self.receipts += self.dispatcher.step()

    def end(self, *, turns: int = 20, seconds: float = 0.0) -> None:
        """Run until no work is left."""
        for _ in range(turns):
            if not self.dispatcher.has_work:
                break
            self.step(seconds=seconds)
        assert not self.dispatcher.has_work, f"not done after {turns} turns"
        self.dispatcher.close()

    @property
    def done(self) -> list[str]:
        """Partitions with a receipt, sorted."""
        return sorted(receipt.partition for receipt in self.receipts)
