"""Two publishers of one sink, stepped by a switch at every storage verb, for all pairs of modes, and readers beside.

Each publisher is a thread. One of them runs at a time, up to a verb of the choice of the test. Whatever the order: the
end is that of one publisher after the other, a reader of the manifest sees a whole state at each step, and no row is
lost, doubled or left where nobody counts it.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import pyarrow.parquet as pq
import pytest

from pipeline.common.digest import digest_bytes
from pipeline.errors import ConflictError, Fenced
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.manifest import Manifest
from pipeline.plan.incremental import IncrementalState, baseline_of
from pipeline.sinks import SinkContents
from pipeline.sinks.lock import sink_lock
from pipeline.sinks.parquet import layout, strays, swap
from pipeline.sinks.parquet.sink import ParquetSink
from pipeline.storage.store import Store, open_store
from pipeline.testing.examples import IS_LONG
from pipeline.testing.jobs import SmallJob, open_retry, small_job, write_receipts
from pipeline.testing.stores import Faults, FaultyStore

KINDS = ("error", "overwrite", "append", "repair", "incremental")
SAMPLE = 3
"""Interleavings of a pair, unless all of them run."""
SECONDS = 60.0
Rows = tuple[int, ...]
Outcome = tuple[str, str, Rows]


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Turns(Faults):
    """Two threads, of which one runs at a time. It hands over at the steps in ``pauses``, at a lock, and at its end."""

    def __init__(self, pauses: dict[str, set[int]], *, look: Callable[[], object]) -> None:
        super().__init__()
        self.pauses = pauses
        self.look = look
        self.steps = dict.fromkeys(("A", "B"), 0)
        self.outcomes: dict[str, SinkContents | BaseException] = {}
        self.failures: list[BaseException] = []
        self._changed = threading.Condition()
        self._running = "A"

    def step(self, what: str) -> None:
        name = threading.current_thread().name
        if name not in self.steps:
            return
        try:
            self.look()
        except BaseException as error:
            self.failures.append(error)
            raise
        number = self.steps[name]
        self.steps[name] += 1
        if number in self.pauses.get(name, ()):
            self.hand_over()

    def hand_over(self, *_: object) -> None:
        """Let the other one run until it hands over; go on at once if it has ended."""
        name = threading.current_thread().name
        other = "B" if name == "A" else "A"
        with self._changed:
            if other in self.outcomes:
                return
            self._running = other
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._running == name, SECONDS), "the other one hangs"

    def run(self, **calls: Callable[[], SinkContents]) -> None:
        threads = [threading.Thread(target=self._play, args=(call,), name=name) for name, call in calls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * SECONDS)
        assert not any(thread.is_alive() for thread in threads)
        if self.failures:
            raise self.failures[0]

    def _play(self, call: Callable[[], SinkContents]) -> None:
        name = threading.current_thread().name
        with self._changed:
            self._changed.wait_for(lambda: self._running == name, SECONDS)
        outcome: SinkContents | BaseException
        try:
            outcome = call()
        except BaseException as error:
            outcome = error
        with self._changed:
            self.outcomes[name] = outcome
            self._running = "B" if name == "A" else "A"
            self._changed.notify_all()


@contextmanager
def stepped_swaps(turns: Turns) -> Iterator[None]:
    """Steps of a swap that are no verbs of a store."""

    def stepped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **named: Any) -> Any:
            turns.step(name)
            return call(*args, **named)

        return step

    with ExitStack() as stack:
        for name in ("start_staging", "place", "exchange", "remove_staging", "sync"):
            stack.enter_context(patch.object(swap, name, stepped(name, getattr(swap, name))))
        yield


@dataclass
class Actor:
    """A job that has committed what it is to publish."""

    job: SmallJob
    directory: JobDirectory
    manifest: Manifest
    earlier: Manifest | None = None
    """Output that it has published before, if it repairs that."""


class World:
    """A sink, and the jobs that may publish to it."""

    def __init__(self, folder: Path, *, is_object: bool) -> None:
        self.folder = folder
        self.is_object = is_object
        self.sink = f"memory://{folder.name}/out" if is_object else str(folder / "out")
        self.old = self._actor("append", "old", start=0)
        self.actors = {
            (kind, name): self._actor(kind, f"{kind}-{name.lower()}", start=1000 * number + offset)
            for number, kind in enumerate(KINDS, start=1)
            for name, offset in (("A", 0), ("B", 500))
        }
        self.ids: dict[str, Rows] = {}
        self.seen: set[object] = set()
        self.saved: dict[str, bytes] = {}

    def _actor(self, kind: str, job_id: str, *, start: int) -> Actor:
        mode = kind if kind in ("error", "overwrite") else "append"
        job = small_job(self.folder / job_id, sink=self.sink, mode=mode, rows=(7, 5), start=start, name=kind)
        if kind == "incremental":
            job = replace(job, plan=replace(job.plan, progress=IncrementalState(baseline_of(()), "work")))
        directory = JobDirectory.create(self.folder / "jobs", job.plan, job=job_id)
        if kind != "repair":
            return Actor(job, directory, self._commit(directory, job))
        earlier = self._commit(directory, replace(job, bad_every=4))
        open_retry(directory)
        return Actor(job, directory, self._commit(directory, job), earlier)

    def _commit(self, directory: JobDirectory, job: SmallJob) -> Manifest:
        write_receipts(directory, job)
        return directory.manifests.commit(directory.manifests.prepare(directory.ledger())).manifest

    # The sink, read by somebody who is not one of the two

    @property
    def store(self) -> Store:
        return open_store(self.sink)

    def clear(self) -> None:
        if self.is_object:
            fsspec.filesystem("memory").store.clear()
            return
        shutil.rmtree(self.sink, ignore_errors=True)

    def save(self) -> None:
        self.saved = {name: self.store.read(name) for name in self.store.list()}

    def reset(self) -> None:
        self.clear()
        for name, content in self.saved.items():
            self.store.replace(name, content)

    def rows_of(self, names: list[str]) -> Rows:
        for name in names:
            if name not in self.ids:
                table = pq.read_table(io.BytesIO(self.store.read(name)), columns=["id"])
                self.ids[name] = tuple(table["id"].to_pylist())
        return tuple(sorted(row for name in names for row in self.ids[name]))

    def by_list(self) -> Rows:
        return self.rows_of([name for name in self.store.list() if name.endswith(layout.SUFFIX)])

    def by_manifest(self) -> Rows:
        """The rows that a reader of the manifest finds; each of its files must be there."""
        state = layout.read_state(self.store)
        if state is None:
            return ()
        names = [file.name for file in state.files]
        assert set(names) <= set(self.store.list()), "the manifest names files that are not there"
        return self.rows_of(names)

    def is_success(self) -> bool | None:
        """Return True if ``_SUCCESS`` is of the manifest; None if it does not exist."""
        if not self.store.exists(layout.SUCCESS):
            return None
        text = self.store.read(layout.SUCCESS).decode()
        return digest_bytes(self.store.read(layout.MANIFEST)) in text

    # The publishers

    def publish(
        self, actor: Actor, *, turns: Turns | None = None, check_lease: Callable[[], object] = int
    ) -> SinkContents:
        if turns is None:
            return ParquetSink().publish(actor.manifest, actor.directory, check_lease=check_lease)

        def opened(path: str) -> Any:
            return FaultyStore(open_store(path), turns)

        sink = ParquetSink(opened, lock=partial(sink_lock, pause=turns.hand_over))
        return sink.publish(actor.manifest, JobDirectory.open(actor.directory.root), check_lease=check_lease)

    def start_with(self, *actors: Actor, has_old: bool) -> None:
        """The sink as it is before: perhaps with an old output, and with what the two are to repair."""
        self.clear()
        self.seen.clear()
        if has_old:
            self.publish(self.old)
        for actor in actors:
            if actor.earlier is not None:
                ParquetSink().publish(actor.earlier, actor.directory)
        self.save()

    def outcome(self, call: Callable[[], SinkContents]) -> str:
        try:
            return text_of(call())
        except ConflictError as error:
            return text_of(error)

    def serial(self, first: Actor, second: Actor) -> tuple[str, str, Rows]:
        """The end of one publisher after the other, from the beginning."""
        self.reset()
        outcomes = [self.outcome(partial(self.publish, actor)) for actor in (first, second)]
        # A job that was overwritten since has published all the same.
        assert self.by_list() == self.by_manifest()
        return outcomes[0], outcomes[1], self.by_manifest()

    def alone(self, actor: Actor) -> Rows:
        self.reset()
        self.outcome(partial(self.publish, actor))
        return self.by_manifest()


def text_of(outcome: SinkContents | BaseException) -> str:
    """Return the kind of an outcome. Whoever ends later may see that its output was overwritten in between."""
    return "published" if isinstance(outcome, SinkContents) else type(outcome).__name__


@pytest.fixture(scope="module", params=["posix", "object store"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Fifteen jobs that have committed, and a sink."""
    is_object = request.param == "object store"
    folder = tmp_path_factory.mktemp("objects" if is_object else "posix")
    with patch.object(os, "fsync", lambda _: None):
        return World(folder, is_object=is_object)


@dataclass
class Pair:
    """Two publishers, and what may be seen of them."""

    world: World
    a: Actor
    b: Actor
    swaps: bool
    """True if both change the sink by swaps alone."""

    def __post_init__(self) -> None:
        world = self.world
        world.reset()
        self.before = world.by_manifest()
        ab, ba = world.serial(self.a, self.b), world.serial(self.b, self.a)
        self.ends: set[Outcome] = {ab, (ba[1], ba[0], ba[2])}
        self.states = {self.before, world.alone(self.a), world.alone(self.b), ab[2], ba[2]}

    def look(self) -> None:
        """Check the output that readers find between two steps."""
        world = self.world
        key = (tuple(world.store.list()), world.store.version(layout.MANIFEST), world.store.version(layout.SUCCESS))
        if key in world.seen:
            return
        assert world.by_manifest() in self.states
        if not world.is_object:
            is_success = world.is_success()
            assert is_success is not False, "_SUCCESS is of another state"
            if is_success or self.swaps:
                assert world.by_list() in self.states
        world.seen.add(key)

    def play(self, pauses: dict[str, set[int]]) -> Turns:
        """Run both from the beginning, with these pauses; check the end."""
        world = self.world
        world.reset()
        turns = Turns(pauses, look=self.look)
        with stepped_swaps(turns):
            turns.run(A=lambda: world.publish(self.a, turns=turns), B=lambda: world.publish(self.b, turns=turns))
        for outcome in turns.outcomes.values():
            if isinstance(outcome, BaseException) and not isinstance(outcome, ConflictError):
                raise outcome
        self.check_end(text_of(turns.outcomes["A"]), text_of(turns.outcomes["B"]))
        return turns

    def check_end(self, a: str, b: str) -> None:
        world = self.world
        rows = world.by_manifest()
        if (a, b, rows) not in self.ends:
            # Where nothing locks, a publisher may be refused because of another one that fails in the end.
            assert world.is_object, (a, b, rows)
            assert "published" not in (a, b), (a, b, rows)
            assert rows == self.before
        assert world.by_list() == rows, "rows that no publication lists"
        assert world.is_success() is (True if rows else None)
        for outcome, actor in ((a, self.a), (b, self.b)):
            if outcome == "published":
                mode = actor.directory.plan.spec.sink.mode
                assert strays.find_strays(world.store, actor.manifest, mode=mode) == (), outcome
        if not world.is_object:
            assert [name for name in os.listdir(world.folder) if name.startswith(".")] == []


def make_pair(world: World, first: str, second: str, *, has_old: bool) -> Pair:
    a, b = world.actors[first, "A"], world.actors[second, "B"]
    world.start_with(a, b, has_old=has_old)
    swaps = {first, second} <= {"error", "overwrite"}
    return Pair(world, a, b, swaps)


def interleavings(pair: Pair, *, seed: str) -> Iterator[dict[str, set[int]]]:
    """One pause in A at each verb; pauses in both at random. All of them, or a sample."""
    steps = pair.play({}).steps
    chance = random.Random(seed)
    single = [{"A": {number}} for number in range(steps["A"] + 1)]
    double = [
        {"A": {chance.randrange(steps["A"] + 1)}, "B": {chance.randrange(steps["B"] + 1)}}
        for _ in range(2 * steps["A"])
    ]
    thrice = [
        {name: set(chance.sample(range(steps[name] + 1), min(4, steps[name] + 1))) for name in steps}
        for _ in range(steps["A"])
    ]
    every = [*single, *double, *thrice]
    yield from every if IS_LONG else chance.sample(every, min(SAMPLE, len(every)))


@pytest.mark.parametrize("has_old", [False, True], ids=["empty", "with output"])
@pytest.mark.parametrize("first", KINDS)
@pytest.mark.fault(66)
def test_two_publishers_in_any_order(world: World, first: str, has_old: bool) -> None:
    for second in KINDS:
        pair = make_pair(world, first, second, has_old=has_old)
        for pauses in interleavings(pair, seed=f"{first} {second} {has_old}"):
            try:
                pair.play(pauses)
            except BaseException as error:
                error.add_note(f"{first} (A) and {second} (B), pauses before verbs {pauses}")
                raise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(67)
def test_two_drivers_of_one_job_in_any_order(world: World, kind: str) -> None:
    """The first driver sleeps, the second publishes the same manifest, the first goes on: once is once."""
    for has_old in (False, True):
        actor = world.actors[kind, "A"]
        world.start_with(actor, has_old=has_old)
        pair = Pair(world, actor, actor, swaps=kind in ("error", "overwrite"))
        for pauses in interleavings(pair, seed=f"{kind} {has_old}"):
            try:
                pair.play(pauses)
            except BaseException as error:
                error.add_note(f"two drivers of {kind}, pauses before verbs {pauses}")
                raise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(67)
def test_a_driver_that_was_taken_over_from_changes_nothing(world: World, kind: str) -> None:
    """At any verb: the lease is lost, the other driver publishes, and then readers see no further change."""
    actor = world.actors[kind, "A"]
    world.start_with(actor, has_old=kind != "error")
    pair = Pair(world, actor, actor, swaps=kind in ("error", "overwrite"))
    steps = pair.play({}).steps["A"]
    chosen = range(steps) if IS_LONG else random.Random(kind).sample(range(steps), 6)
    for number in chosen:
        world.reset()
        turns = Turns({"A": {number}}, look=pair.look)

        def check_lease(turns: Turns = turns) -> None:
            if turns.steps["B"] or "B" in turns.outcomes:
                raise Fenced("another driver has taken this job over")

        with stepped_swaps(turns):
            turns.run(
                A=lambda turns=turns, check=check_lease: world.publish(actor, turns=turns, check_lease=check),
                B=lambda turns=turns: world.publish(actor, turns=turns),
            )
        assert isinstance(turns.outcomes["B"], SinkContents), turns.outcomes["B"]
        assert isinstance(turns.outcomes["A"], SinkContents | Fenced), turns.outcomes["A"]
        pair.check_end("published", "published")


def test_the_switch_finds_a_sink_without_turns(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a lock, and without conditions, some order of two appends loses rows: the test is able to fail."""

    def replace_anyway(self: Any, name: str, data: bytes, *, version: str) -> bool:
        self.replace(name, data)
        return True

    @contextmanager
    def no_lock(*_: object, **__: object) -> Iterator[bool]:
        yield True

    monkeypatch.setattr(type(world.store), "replace_if_unchanged", replace_anyway)
    monkeypatch.setitem(globals(), "sink_lock", no_lock)
    pair = make_pair(world, "append", "append", has_old=True)
    found = 0
    for number in itertools.count():
        try:
            if pair.play({"A": {number}}).steps["A"] < number:
                break
        except AssertionError:
            found += 1
    assert found


def test_a_folder_that_cannot_be_swapped_is_locked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same as `test_two_publishers_in_any_order`, on a file system without an exchange."""
    monkeypatch.setattr(swap, "rename_exchange", lambda *_: errno.EINVAL)
    monkeypatch.setattr(os.path, "ismount", lambda *_: True)
    world = World(tmp_path, is_object=False)
    for first, second in itertools.product(("error", "overwrite"), ("overwrite", "append")):
        pair = make_pair(world, first, second, has_old=True)
        pair.swaps = False
        for pauses in interleavings(pair, seed=f"{first} {second}"):
            pair.play(pauses)
