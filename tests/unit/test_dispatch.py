from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.scheduler import KilledWorker

from pipeline.dispatch import Dispatcher, Ended, Fail, Policy, Retry, Stop, decide
from pipeline.errors import (
    DiskFull,
    NoWorkers,
    OutOfMemory,
    PartitionFailed,
    PartitionStuck,
    PipelineError,
    SchedulerLost,
    SchedulerUnresponsive,
    SchemaDrift,
    StorageError,
)
from pipeline.plan import Partition


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SchemaDrift("x"), SchemaDrift),
        (DiskFull("x"), DiskFull),
        (MemoryError("x"), OutOfMemory),
    ],
)
def test_what_will_be_wrong_again_fails_at_once(error: Exception, kind: type[PipelineError]) -> None:
    decision = decide(error, partition="00001", attempt=1, attempts=3)
    assert isinstance(decision, Fail)
    assert isinstance(decision.error, kind)


def killed() -> KilledWorker:
    return KilledWorker("key", SimpleNamespace(address="tcp://w"), 1)


@pytest.mark.parametrize("error", [StorageError("x"), OSError("x"), killed()])
def test_infrastructure_is_tried_again_with_growing_delays_until_attempts_are_used(error: Exception) -> None:
    decisions = [decide(error, partition="00001", attempt=n, attempts=3) for n in (1, 2, 3)]
    assert [type(one) for one in decisions] == [Retry, Retry, Fail]
    delays = [one.delay for one in decisions if isinstance(one, Retry)]
    assert delays == [0.5, 1.0]


def test_a_partition_that_kills_its_workers_is_named() -> None:
    decision = decide(killed(), partition="00007", attempt=3, attempts=3)
    assert isinstance(decision, Fail)
    assert isinstance(decision.error, PartitionStuck)
    assert "00007" in decision.error.where


def test_an_unforeseen_error_is_tried_twice_and_its_traceback_kept() -> None:
    def broken() -> None:
        raise RuntimeError("this is unforeseen")

    try:
        broken()
    except RuntimeError as error:
        first = decide(error, partition="00001", attempt=1, attempts=3)
        second = decide(error, partition="00001", attempt=2, attempts=3)
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

    ncores = "ncores"
    processing = "processing"


class FakeClient:
    """A cluster of ``threads``; outcomes per partition id, one per attempt."""

    status = "running"
    scheduler = FakeScheduler

    def __init__(self, outcomes: dict[str, list[Any]] | None = None, *, threads: int = 2) -> None:
        self.outcomes, self.threads = outcomes or {}, threads
        self.submitted: list[list[str]] = []
        self.futures: list[FakeFuture] = []
        self.answers = True

    def compute(self, ids: Sequence[str], retries: int) -> list[FakeFuture]:
        self.submitted.append(list(ids))
        made = [FakeFuture(name, self.outcomes.get(name, [name]).pop(0)) for name in ids]
        self.futures += made
        return made

    def sync(self, call: Any, callback_timeout: float) -> Any:
        if not self.answers:
            raise TimeoutError
        return {"tcp://w": self.threads} if call == "ncores" else {"tcp://w": []}


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
    events: list[Ended] = []
    runner = dispatcher(client, on_ended=events.append, clock=ticking())
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
        stop.request(2)
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
    runner = dispatcher(client, policy=Policy(scheduler_timeout=30), clock=ticking())
    client.answers = False
    with pytest.raises(SchedulerUnresponsive):
        list(runner.run([part(0)]))


def test_no_workers_ends_the_run_after_the_limit() -> None:
    client = FakeClient({"00000": ["never"]})
    runner = dispatcher(client, policy=Policy(no_workers_timeout=30), clock=ticking())
    client.threads = 0
    client.sync = lambda call, callback_timeout: {}  # type: ignore[method-assign]
    with pytest.raises(NoWorkers):
        list(runner.run([part(0)]))
