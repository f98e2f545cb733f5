"""The dispatcher with stragglers, on a cluster that a test makes up: what is asked, copied, cut, and given up."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.common.rows import Fragment
from pipeline.execution.attempts import Attempt, AttemptResult, InFlight, SplitResult
from pipeline.execution.dispatcher import Dispatcher
from pipeline.execution.rebalancing import Mitigation, StragglerMitigator
from pipeline.execution.stragglers import StragglerPolicy
from pipeline.execution.worker_events import ExecutionTracker, Started
from pipeline.plan.plan import Partition
from pipeline.scoring import progress
from pipeline.scoring.progress import ProgressSnapshot
from pipeline.testing.processes import wait_until

ROWS = 10_000
PATIENCE = StragglerPolicy(share=1e9)
"""Of what is slow only."""


def part(name: str, rows: int = ROWS) -> Partition:
    return Partition(name, (Fragment("f", 0, rows, 0, 1, rows),))


class Future:
    def __init__(self, key: str, workers: Sequence[str]) -> None:
        self.key, self.workers, self.outcome, self.is_cancelled = key, tuple(workers), None, False
        self.call: Callable[[Any], None] = lambda future: None

    def add_done_callback(self, call: Callable[[Any], None]) -> None:
        self.call = call

    def end(self, outcome: Any = None) -> None:
        self.outcome = outcome or SimpleNamespace(partition=self.key, splits=(), cuts=())
        self.call(self)

    def result(self, timeout: float) -> Any:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def release(self) -> None: ...

    def cancel(self, *, force: bool = False) -> None:
        self.is_cancelled = True


@dataclass
class Cluster:
    """Three workers of one thread; the test begins and ends tasks, and answers for the workers."""

    clock: Callable[[], float]
    status: str = "running"
    futures: dict[str, Future] = field(default_factory=dict)
    topics: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[str, Any, str]] = field(default_factory=list)
    answers: dict[str, ProgressSnapshot | None] = field(default_factory=dict)
    """By worker; one that is not there never answers."""
    seen: dict[str, float] = field(default_factory=dict)
    """When a worker sent its last heartbeat, if not now."""
    scheduler: Any = field(default_factory=lambda: SimpleNamespace(identity="identity", restart_workers="restart"))

    def compute(
        self, keys: Sequence[str], *, retries: int, workers: Any = (), allow_other_workers: bool = False
    ) -> Any:
        made = [Future(key, workers) for key in keys]
        self.futures.update({future.key: future for future in made})
        return made

    def sync(self, call: Any, **arguments: Any) -> Any:
        return {
            "workers": {
                name: {"nthreads": 1, "status": "running", "last_seen": self.seen.get(name, 1000.0)}
                for name in ("a", "b", "c")
            }
        }

    def run(
        self, function: Any, round_folder: str, *arguments: Any, workers: list[str], on_error: str
    ) -> dict[str, Any]:
        self.calls.append((function.__name__, arguments, workers[0]))
        if workers[0] not in self.answers:
            threading.Event().wait()
        return {workers[0]: self.answers[workers[0]]}

    def subscribe_topic(self, topic: str, handler: Any) -> None:
        self.topics[topic] = handler

    def unsubscribe_topic(self, topic: str) -> None:
        del self.topics[topic]

    def begin(self, key: str, worker: str) -> None:
        self.topics["pipeline-started"]((0.0, {"key": key, "worker": worker}))

    def leave(self, worker: str) -> None:
        self.topics["all"]((0.0, {"action": "remove-worker", "worker": worker, "expected": False}))


class World:
    """A run in a thread, with a clock that the test sets."""

    def __init__(self, *, rows: int = ROWS, patience: StragglerPolicy = PATIENCE, **options: Any) -> None:
        self.rows = rows
        self.now = 0.0
        self.cluster = Cluster(lambda: self.now)
        self.copies = itertools.count(1)
        self.ended: list[AttemptResult] = []
        self.helped: list[Mitigation] = []
        self.found: list[Any] = []
        self.error: BaseException | None = None
        relief = StragglerMitigator(
            self.cluster,
            round_folder="round",
            on_mitigation=self.helped.append,
            patience=patience,
        )
        self.dispatcher = Dispatcher(
            self.cluster,
            submit=lambda parts: [self._key(one) for one in parts],
            read=lambda value: value,
            relief=relief,
            on_attempt_finished=self.ended.append,
            clock=lambda: self.now,
            tick=0.001,
            **options,
        )
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _key(self, partition: Partition) -> str:
        is_new = partition.id not in self.cluster.futures
        return partition.id if is_new else f"{partition.id}~{next(self.copies)}"

    def _run(self) -> None:
        try:
            self.found.extend(self.dispatcher.run([part(f"p{number}", self.rows) for number in range(5)]))
        except BaseException as error:
            self.error = error

    def until_slow(self, *, worker: str = "a", seconds: float = 100.0) -> None:
        """Four partitions have taken 10 s; ``p4`` has been on ``worker`` for ``seconds``."""
        self.thread.start()
        wait_until(lambda: len(self.cluster.futures) == 5)
        for number in range(4):
            self.cluster.begin(f"p{number}", "bc"[number % 2])
        self.cluster.begin("p4", worker)
        wait_until(lambda: len(self.dispatcher._ledger.executing) == 5)
        self.now = 10.0
        for number in range(4):
            self.cluster.futures[f"p{number}"].end()
        wait_until(lambda: len(self.ended) == 4)
        self.now = seconds

    def called(self, name: str) -> tuple[str, Any, str]:
        return wait_until(lambda: next((call for call in self.cluster.calls if call[0] == name), None))  # type: ignore[no-any-return]

    def copy(self) -> Future:
        return wait_until(lambda: next((one for key, one in self.cluster.futures.items() if "~" in key), None))  # type: ignore[no-any-return]

    def end(self) -> None:
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.error:
            raise self.error


@pytest.fixture
def alive() -> World:
    """Its slow worker answers, but there are too few rows to divide them: only a copy can help."""
    world = World(rows=900)
    world.cluster.answers = {"a": ProgressSnapshot(0, 0, 99.0), "b": None, "c": None}
    return world


def test_a_copy_runs_elsewhere_and_the_first_receipt_ends_the_other(alive: World) -> None:
    alive.until_slow()
    copy = alive.copy()
    assert copy.workers in (("b",), ("c",))
    original = alive.cluster.futures["p4"]
    copy.end()
    alive.end()
    assert original.is_cancelled
    assert alive.called("request_drop") == ("request_drop", ("p4",), "a")
    assert [(one.action, one.worker, one.is_over, one.won) for one in alive.helped] == [
        ("backup", "a", False, False),
        ("backup", "a", True, True),
    ]
    assert alive.helped[1].seconds_won > 0
    assert len(alive.found) == 5


@pytest.mark.parametrize("silent", ["b", "c"])
def test_a_worker_of_which_nothing_is_heard_is_no_helper(alive: World, silent: str) -> None:
    alive.cluster.seen[silent] = 995.0
    alive.until_slow()
    copy = alive.copy()
    assert copy.workers == ({"b": "c", "c": "b"}[silent],)
    copy.end()
    alive.end()


def test_the_original_may_win_and_the_copy_is_dropped(alive: World) -> None:
    alive.until_slow()
    copy = alive.copy()
    alive.cluster.begin(copy.key, copy.workers[0])
    wait_until(lambda: copy.key in alive.dispatcher._ledger.executing)
    alive.cluster.futures["p4"].end()
    alive.end()
    assert copy.is_cancelled
    assert alive.called("request_drop") == ("request_drop", ("p4",), copy.workers[0])
    assert [(one.is_over, one.won) for one in alive.helped] == [(False, False), (True, False)]
    assert len(alive.found) == 5


def test_a_copy_that_fails_leaves_the_original_alone(alive: World) -> None:
    alive.until_slow()
    alive.copy().end(OSError("the network"))
    wait_until(lambda: any(one.outcome == "retry" for one in alive.ended))
    assert not alive.cluster.futures["p4"].is_cancelled
    alive.cluster.futures["p4"].end()
    alive.end()
    assert len(alive.found) == 5


def test_an_original_that_fails_leaves_the_copy_alone(alive: World) -> None:
    alive.until_slow()
    copy = alive.copy()
    alive.cluster.futures["p4"].end(OSError("the network"))
    wait_until(lambda: any(one.outcome == "retry" for one in alive.ended))
    copy.end()
    alive.end()
    assert len(alive.found) == 5
    assert len([key for key in alive.cluster.futures if key.startswith("p4")]) == 2


def test_a_copy_whose_worker_dies_is_given_up(alive: World) -> None:
    alive.until_slow()
    copy = alive.copy()
    alive.cluster.begin(copy.key, copy.workers[0])
    wait_until(lambda: copy.key in alive.dispatcher._ledger.executing)
    alive.cluster.leave(copy.workers[0])
    wait_until(lambda: copy.is_cancelled)
    alive.cluster.futures["p4"].end()
    alive.end()
    assert len(alive.found) == 5


def test_what_ended_a_worker_gets_no_other_copy_and_is_isolated_for_the_deaths_of_both() -> None:
    alone: list[str] = []

    def isolate(parts: Sequence[Partition]) -> list[str]:
        alone.extend(one.id for one in parts)
        return [f"{one.id}!" for one in parts]

    world = World(rows=900, isolate=isolate)
    world.cluster.answers = {"a": ProgressSnapshot(0, 0, 99.0), "b": None, "c": None}
    world.until_slow()
    copy = world.copy()
    world.cluster.begin(copy.key, copy.workers[0])
    wait_until(lambda: copy.key in world.dispatcher._ledger.executing)
    world.cluster.leave(copy.workers[0])
    wait_until(lambda: copy.is_cancelled)
    world.now += 60.0
    wait_until(lambda: world.dispatcher._watch._asked == world.now)
    assert len([key for key in world.cluster.futures if "~" in key]) == 1, "it got another copy"
    world.cluster.leave("a")
    wait_until(lambda: alone)
    assert alone == ["p4"]
    wait_until(lambda: "p4!" in world.cluster.futures)
    world.cluster.futures["p4!"].end()
    world.end()
    assert len(world.found) == 5


def _split(partition: Partition, receipt: Any, *, parts: int = 2) -> SplitResult:
    if receipt is None:
        receipt = SimpleNamespace(partition=partition.id, splits=tuple(f"{partition.id}.{n}" for n in range(parts)))
        return SplitResult(receipt, tuple(part(name) for name in receipt.splits))
    first = SimpleNamespace(partition=receipt.splits[0], splits=())
    return SplitResult(receipt, tuple(part(name) for name in receipt.splits), first)


def test_one_that_answers_is_asked_to_stop_and_its_rest_goes_to_the_idle_ones() -> None:
    world = World(split=_split)
    world.cluster.answers = {"a": ProgressSnapshot(2000, 99, 99.0, starved=60.0)}
    world.until_slow()
    _, arguments, worker = world.called("request_split")
    assert (arguments, worker) == (("p4", 2), "a")
    receipt = SimpleNamespace(partition="p4", splits=("p4.0", "p4.1", "p4.2"), cuts=(2100, 6000))
    world.cluster.futures["p4"].end(receipt)
    wait_until(lambda: "p4.2" in world.cluster.futures)
    assert "p4.0" not in world.cluster.futures, "the first part is done"
    assert set(world.cluster.futures["p4.1"].workers) == {"b", "c"}
    for key in ("p4.1", "p4.2"):
        world.cluster.futures[key].end()
    world.end()
    assert [one.outcome for one in world.ended if one.partition.id.startswith("p4")] == ["cut", "done", "done", "done"]
    assert [(one.action, one.is_over, one.won) for one in world.helped] == [("cut", False, False), ("cut", True, True)]


def test_who_waits_for_the_rest_of_one_is_not_promised_to_another() -> None:
    world = World(split=_split, patience=StragglerPolicy())
    world.cluster.answers = {name: ProgressSnapshot(3000, 99, 3.0) for name in "abc"}
    world.thread.start()
    wait_until(lambda: len(world.cluster.futures) == 5)
    world.cluster.begin("p0", "a")
    world.cluster.begin("p1", "b")
    wait_until(lambda: len(world.dispatcher._ledger.executing) == 2)
    for number in (2, 3, 4):
        world.cluster.futures[f"p{number}"].end()
    wait_until(lambda: len(world.ended) == 3)
    world.now = 3.0
    world.called("request_split")
    world.now = 4.0
    looks = len(world.cluster.calls)
    wait_until(lambda: world.dispatcher._watch._asked >= 3.0)
    assert [call[0] for call in world.cluster.calls].count("request_split") == 1, f"after {looks} calls"
    for number in range(2):
        world.cluster.futures[f"p{number}"].end()
    world.end()


def test_one_that_is_not_slow_is_shared_when_nothing_is_left_to_do() -> None:
    world = World(split=_split, patience=StragglerPolicy())
    world.cluster.answers = {"a": ProgressSnapshot(7000, 99, 9.0)}
    world.until_slow(seconds=12.0)
    _, arguments, worker = world.called("request_split")
    assert (arguments, worker) == (("p4", 3), "a")
    receipt = SimpleNamespace(partition="p4", splits=("p4.0", "p4.1", "p4.2", "p4.3"), cuts=(2100, 4000, 7000))
    world.cluster.futures["p4"].end(receipt)
    wait_until(lambda: "p4.3" in world.cluster.futures)
    assert set(world.cluster.futures["p4.1"].workers) == {"a", "b", "c"}
    for number in (1, 2, 3):
        world.cluster.futures[f"p4.{number}"].end()
    world.end()
    (cut,) = [one for one in world.ended if one.outcome == "cut"]
    assert cut.reason == "others had nothing to do"
    assert [one.action for one in world.helped] == ["share", "share"]


def test_one_that_is_frozen_is_divided() -> None:
    world = World(split=_split)
    world.until_slow()
    world.called("progress_of")
    world.now += 4.0
    wait_until(lambda: "p4.1" in world.cluster.futures)
    assert world.cluster.futures["p4"].is_cancelled
    world.cluster.futures["p4"].end()  # it thaws, and nobody listens
    for key in ("p4.0", "p4.1"):
        world.cluster.futures[key].end()
    world.end()
    assert [one.action for one in world.helped] == ["divide", "divide"]
    assert [one.partition for one in world.found if one.partition.startswith("p4")] == ["p4", "p4.0", "p4.1"]


def test_one_that_cannot_be_divided_takes_its_time() -> None:
    asked: list[Any] = []

    def never(partition: Partition, receipt: Any, *, parts: int = 2) -> None:
        asked.append(parts)

    world = World(split=never)
    world.until_slow()
    world.called("progress_of")
    world.now += 4.0
    wait_until(lambda: asked)
    world.now += 50.0
    wait_until(lambda: world.dispatcher._watch._asked == world.now)
    assert asked == [2]
    world.cluster.futures["p4"].end()
    world.end()
    assert [one.won for one in world.helped] == [False, False]


def test_what_does_not_begin_is_moved_to_an_idle_worker() -> None:
    world = World()
    world.thread.start()
    wait_until(lambda: len(world.cluster.futures) == 5)
    for number in range(4):
        world.cluster.futures[f"p{number}"].end()
    wait_until(lambda: len(world.ended) == 4)
    world.now = 11.0
    copy = world.copy()
    assert world.cluster.futures["p4"].is_cancelled
    copy.end()
    world.end()
    assert [one.action for one in world.helped] == ["move"]


def test_a_worker_that_an_unwanted_attempt_holds_is_restarted_when_it_is_needed() -> None:
    relief = StragglerMitigator(Cluster(lambda: 0.0), round_folder="round")
    ledger = ExecutionTracker()
    flight = InFlight(Cluster(lambda: 0.0), ledger, lambda future: None, lambda: 100.0)
    relief.drop(part("p0"), worker="a", now=100.0)
    relief.drop(part("p1"), worker="b", now=100.0)
    relief.drop(part("p2"), worker="c", now=150.0)
    ledger.learn(Started("other", "b"), now=100.0)
    assert relief.lost(flight, ledger, now=170.0) == set(), "nobody waits"
    flight.start([Attempt(part("p9"))], ["p9"])
    assert relief.lost(flight, ledger, now=105.0) == set(), "it may yet end"
    assert relief.lost(flight, ledger, now=170.0) == {"a"}
    assert relief.lost(flight, ledger, now=171.0) == set()
    relief.started("c")
    assert relief.lost(flight, ledger, now=999.0) == set(), "c is free, b is at work"


def test_workers_are_asked_by_functions_that_they_have() -> None:
    for function in (progress.progress_of, progress.request_split, progress.request_drop):
        assert getattr(progress, function.__name__) is function
