from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.scheduler import KilledWorker

from pipeline.errors import (
    DiskFull,
    InfrastructureError,
    NoWorkers,
    OutOfMemory,
    OutputExists,
    PartitionFailed,
    PartitionStuck,
    PipelineError,
    SchedulerLost,
    SchedulerUnresponsive,
    SchemaDrift,
    StepFailed,
    StorageError,
)
from pipeline.execution.attempts import AttemptResult, SplitResult
from pipeline.execution.dispatcher import Dispatcher
from pipeline.execution.failures import (
    Fail,
    Isolate,
    LeaveToDask,
    Retry,
    Split,
    after_failure,
    after_worker_loss,
    overdue,
)
from pipeline.execution.health import DispatchPolicy
from pipeline.execution.worker_events import Cause
from pipeline.jobs.cancellation import Stop, StopReason
from pipeline.plan.plan import Partition


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SchemaDrift("x"), SchemaDrift),
        (DiskFull("x"), DiskFull),
        (StepFailed("x"), StepFailed),
        (OutputExists("x"), OutputExists),
    ],
)
def test_what_will_be_wrong_again_fails_at_once(error: Exception, kind: type[PipelineError]) -> None:
    decision = after_failure(error, partition="00001", attempt=1, attempts=3)
    assert isinstance(decision, Fail)
    assert isinstance(decision.error, kind)


def killed() -> KilledWorker:
    return KilledWorker("key", SimpleNamespace(address="tcp://w"), 1)


@pytest.mark.parametrize("error", [StorageError("x"), OSError("x"), killed()])
@pytest.mark.fault(23)
def test_infrastructure_is_tried_again_with_growing_delays_until_attempts_are_used(error: Exception) -> None:
    decisions = [after_failure(error, partition="00001", attempt=n, attempts=3) for n in (1, 2, 3)]
    last = Isolate if isinstance(error, KilledWorker) else Fail
    assert [type(one) for one in decisions] == [Retry, Retry, last]
    delays = [one.delay for one in decisions if isinstance(one, Retry)]
    assert delays == [0.5, 1.0]


def test_a_partition_that_kills_its_workers_though_it_is_isolated_is_named() -> None:
    decision = after_failure(killed(), partition="00007", attempt=3, attempts=3, is_isolated=True)
    assert isinstance(decision, Fail)
    assert isinstance(decision.error, PartitionStuck)
    assert "00007" in decision.error.where


def test_what_needs_too_much_memory_is_split_and_below_the_smallest_batch_isolated() -> None:
    assert isinstance(after_failure(MemoryError("x"), partition="00001", attempt=1, attempts=3), Split)
    assert isinstance(after_failure(OutOfMemory("x"), partition="00001", attempt=1, attempts=3), Isolate)
    alone = after_failure(MemoryError("x"), partition="00001", attempt=1, attempts=3, is_isolated=True)
    assert isinstance(alone, Fail)
    assert isinstance(alone.error, OutOfMemory)


def test_a_deadline_is_passed_twice_before_the_partition_is_isolated() -> None:
    kinds = [type(after_failure(overdue("00001", limit=1), partition="00001", attempt=n, attempts=9)) for n in (1, 2)]
    assert kinds == [Retry, Isolate]


@pytest.mark.parametrize(
    ("cause", "crash_count", "is_isolated", "kind"),
    [
        ("memory", 0, False, Split),
        ("crash", 1, False, LeaveToDask),
        ("crash", 2, False, Isolate),
        ("left", 9, False, LeaveToDask),
        ("recycled", 9, False, LeaveToDask),
        ("crash", 2, True, LeaveToDask),
        ("crash", 6, True, Fail),
    ],
)
def test_what_a_death_means(cause: Cause, crash_count: int, is_isolated: bool, kind: type[object]) -> None:
    assert (
        type(after_worker_loss(cause, partition="1", crash_count=crash_count, attempts=3, is_isolated=is_isolated))
        is kind
    )


@pytest.mark.fault(23)
def test_a_part_of_what_took_a_workers_memory_is_isolated_when_it_takes_another() -> None:
    kinds = [
        type(
            after_worker_loss("memory", partition="1.0", crash_count=0, attempts=3, is_isolated=False, oom_count=deaths)
        )
        for deaths in (1, 2)
    ]
    assert kinds == [Split, Isolate]


def test_an_unforeseen_error_is_tried_twice_and_its_traceback_kept() -> None:
    def broken() -> None:
        raise RuntimeError("this is unforeseen")

    try:
        broken()
    except RuntimeError as error:
        first = after_failure(error, partition="00001", attempt=1, attempts=3)
        second = after_failure(error, partition="00001", attempt=2, attempts=3)
    assert isinstance(first, Retry)
    assert isinstance(second, Fail)
    assert isinstance(second.error, PartitionFailed)
    assert "this is unforeseen" in second.error.found
    assert "broken" in second.error.found


class FakeFuture:
    def __init__(self, key: str, outcome: Any) -> None:
        self.key, self.outcome, self.released, self.cancelled = key, outcome, False, False

    def result(self, timeout: float) -> Any:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def add_done_callback(self, call: Callable[[Any], None]) -> None:
        if self.outcome != "never":
            call(self)

    def release(self) -> None:
        self.released = True

    def cancel(self, *, force: bool = False) -> None:
        self.cancelled = True


class FakeScheduler:
    """Stands where ``client.scheduler`` is; `FakeClient.sync` calls what it offers."""

    identity = "identity"
    restart_workers = "restart_workers"


class FakeClient:
    """A cluster of ``threads``; outcomes per partition id, one per attempt."""

    status = "running"
    scheduler = FakeScheduler

    def __init__(self, outcomes: dict[str, list[Any]] | None = None, *, threads: int = 2) -> None:
        self.outcomes, self.threads = outcomes or {}, threads
        self.submitted: list[list[str]] = []
        self.futures: list[FakeFuture] = []
        self.answers = True
        self.status_of_worker = "running"
        self.restarted: list[str] = []
        self.topics: dict[str, Callable[[tuple[float, Any]], None]] = {}

    def subscribe_topic(self, topic: str, handler: Callable[[tuple[float, Any]], None]) -> None:
        self.topics[topic] = handler

    def unsubscribe_topic(self, topic: str) -> None:
        del self.topics[topic]

    def say(self, topic: str, **message: Any) -> None:
        self.topics[topic]((0.0, message))

    def compute(self, ids: Sequence[str], retries: int) -> list[FakeFuture]:
        self.submitted.append(list(ids))
        made = [FakeFuture(name, self.outcomes.get(name, [name]).pop(0)) for name in ids]
        self.futures += made
        return made

    def sync(self, call: Any, callback_timeout: float, **arguments: Any) -> Any:
        if not self.answers:
            raise TimeoutError
        if call == "restart_workers":
            self.restarted += arguments["workers"]
            return None
        return {"workers": {"tcp://w": {"nthreads": self.threads, "status": self.status_of_worker}}}


def part(number: int) -> Partition:
    return Partition(f"{number:05d}", ())


def dispatcher(client: FakeClient, **options: Any) -> Dispatcher:
    return Dispatcher(
        client, submit=lambda parts: [p.id for p in parts], read=lambda value: value, tick=0.001, **options
    )


def ticking() -> Callable[[], float]:
    """A clock that goes on by a second each time it is read."""
    now = iter(range(10**9))
    return lambda: float(next(now))


def test_every_partition_gives_its_receipt_and_the_window_is_two_a_thread() -> None:
    client = FakeClient(threads=3)
    found = list(dispatcher(client).run([part(n) for n in range(20)]))
    assert sorted(found) == [f"{n:05d}" for n in range(20)]
    assert max(len(batch) for batch in client.submitted) == 6
    assert all(future.released for future in client.futures)


def test_a_retry_comes_after_its_delay_and_is_counted() -> None:
    client = FakeClient({"00001": [OSError("lost"), "00001"]})
    events: list[AttemptResult] = []
    runner = dispatcher(client, on_attempt_finished=events.append, clock=ticking())
    assert sorted(runner.run([part(0), part(1)])) == ["00000", "00001"]
    assert runner.retries == 1
    assert [(e.partition.id, e.attempt, e.outcome) for e in events if e.partition.id == "00001"] == [
        ("00001", 1, "retry"),
        ("00001", 2, "done"),
    ]


def test_after_a_failure_no_more_start_and_receipts_of_running_ones_are_kept() -> None:
    client = FakeClient({"00000": [SchemaDrift("bad file")]}, threads=1)
    found = []
    with pytest.raises(SchemaDrift):
        found.extend(dispatcher(client).run([part(n) for n in range(9)]))
    assert client.submitted == [["00000", "00001"]]


def test_a_request_to_stop_starts_no_more() -> None:
    stop = Stop()
    client = FakeClient(threads=1)
    runner = dispatcher(client, stop=stop)
    found = []
    for receipt in runner.run([part(n) for n in range(9)]):
        found.append(receipt)
        stop.request(StopReason.SIGNAL, signal_number=2)
    assert len(client.submitted) == 1
    assert set(found) <= {"00000", "00001"}


def test_a_lost_scheduler_ends_the_run() -> None:
    client = FakeClient({"00000": ["never"]})
    runner = dispatcher(client)
    client.status = "closed"
    with pytest.raises(SchedulerLost):
        list(runner.run([part(0)]))


def test_a_silent_scheduler_ends_the_run_after_the_limit() -> None:
    client = FakeClient({"00000": ["never"]})
    runner = dispatcher(client, policy=DispatchPolicy(scheduler_timeout=30), clock=ticking())
    client.answers = False
    with pytest.raises(SchedulerUnresponsive):
        list(runner.run([part(0)]))


def test_no_workers_ends_the_run_after_the_limit() -> None:
    client = FakeClient({"00000": ["never"]})
    runner = dispatcher(client, policy=DispatchPolicy(no_workers_timeout=30), clock=ticking())
    client.threads = 0
    client.sync = lambda call, callback_timeout: {"workers": {}}  # type: ignore[method-assign]
    with pytest.raises(NoWorkers):
        list(runner.run([part(0)]))


class Told:
    """A run whose events a test makes up, one `next` at a time."""

    def __init__(self, client: FakeClient, partitions: int = 2, **options: Any) -> None:
        self.client, self.events = client, list[AttemptResult]()
        self.isolated: list[str] = []
        self.runner = dispatcher(client, on_attempt_finished=self.events.append, isolate=self._isolate, **options)
        self.found = self.runner.run([part(n) for n in range(partitions)])

    def _isolate(self, parts: Sequence[Partition]) -> list[str]:
        self.isolated += [one.id for one in parts]
        return [f"alone-{one.id}" for one in parts]

    def say_when_submitted(self, *messages: tuple[str, dict[str, Any]]) -> None:
        """As soon as something is submitted, the scheduler says this, once."""
        submit, waiting = self.client.compute, list(messages)

        def compute(ids: Sequence[str], retries: int) -> list[FakeFuture]:
            made = submit(ids, retries)
            while waiting:
                topic, message = waiting.pop(0)
                self.client.say(topic, **message)
            return made

        self.client.compute = compute  # type: ignore[method-assign]


def started(key: str, worker: str = "tcp://w") -> tuple[str, dict[str, Any]]:
    return "pipeline-started", {"key": key, "worker": worker}


def left(worker: str = "tcp://w", *, expected: bool = False) -> tuple[str, dict[str, Any]]:
    return "all", {"action": "remove-worker", "worker": worker, "expected": expected}


def test_two_deaths_isolate_the_one_that_was_executing_and_nobody_else() -> None:
    client = FakeClient({"00000": ["never"]})
    run = Told(client)
    run.say_when_submitted(started("00000"), left(), started("00000", "tcp://v"), left("tcp://v"))
    assert sorted(run.found) == ["00001", "alone-00000"]
    assert run.isolated == ["00000"]
    assert client.futures[0].cancelled
    assert [event.outcome for event in run.events if event.partition.id == "00000"] == ["retry", "retry", "done"]


def test_workers_that_go_in_good_order_isolate_nobody() -> None:
    client = FakeClient({"00000": ["never"]})
    run = Told(client, clock=ticking(), policy=DispatchPolicy(partition_timeout=10**6))
    run.say_when_submitted(*[step for _ in range(5) for step in (started("00000"), left(expected=True))])
    found = [next(run.found)]
    run.runner.stop.request(2)
    assert [*found, *run.found] == ["00001"]
    assert run.isolated == []


def test_a_worker_killed_for_memory_splits_what_was_executing() -> None:
    client = FakeClient({"00000": ["never"]})
    halves = (Partition("00000.0", ()), Partition("00000.1", ()))
    receipt: Any = SimpleNamespace(splits=("00000.0", "00000.1"))
    run = Told(client, split=lambda partition, known: SplitResult(receipt, halves) if partition.id == "00000" else None)
    run.say_when_submitted(started("00000"), ("worker-restart-memory", {"worker": "tcp://w"}), left())
    found = list(run.found)
    assert receipt in found
    assert {one for one in found if one is not receipt} == {"00000.0", "00000.1", "00001"}
    assert [event.outcome for event in run.events if event.partition.id == "00000"] == ["split"]


def test_an_overdue_partition_costs_its_worker_and_twice_isolates_it() -> None:
    client = FakeClient({"00000": ["never", "never"]})
    run = Told(client, clock=ticking(), policy=DispatchPolicy(partition_timeout=20, stall_timeout=10**6))
    submit = client.compute

    def compute(ids: Sequence[str], retries: int) -> list[FakeFuture]:
        made = submit(ids, retries)
        if "00000" in ids:
            client.say(*started("00000")[:1], **started("00000")[1])
        return made

    client.compute = compute  # type: ignore[method-assign]
    assert sorted(run.found) == ["00001", "alone-00000"]
    assert client.restarted == ["tcp://w", "tcp://w"]


def test_a_paused_worker_with_nothing_executing_is_restarted_and_a_busy_one_is_not() -> None:
    client = FakeClient({"00000": ["never"]}, threads=1)
    client.status_of_worker = "paused"
    run = Told(
        client, partitions=1, clock=ticking(), policy=DispatchPolicy(stall_timeout=10**6, no_workers_timeout=10**6)
    )
    answer = client.sync

    def sync(call: Any, callback_timeout: float, **arguments: Any) -> Any:
        if call == "restart_workers":
            run.runner.stop.request(2)
        return answer(call, callback_timeout, **arguments)

    client.sync = sync  # type: ignore[method-assign]
    assert list(run.found) == []
    assert client.restarted == ["tcp://w"]
    assert run.events == []


def test_when_nothing_executes_the_workers_are_restarted_and_in_the_end_the_run_gives_up() -> None:
    client = FakeClient({"00000": ["never"]}, threads=1)
    run = Told(client, partitions=1, clock=ticking(), policy=DispatchPolicy(stall_timeout=50))
    with pytest.raises(InfrastructureError, match="nothing executes"):
        list(run.found)
    assert client.restarted == ["tcp://w", "tcp://w"]
