"""The straggler policy on simulated clusters: makespan with and without it, and the share of work done twice.

Workers have one thread and a speed that changes with time. Partitions are taken from the front of a queue, and a batch
ends when its share of the work is done. A step is 0.1 s; the driver polls twice a second; a frozen worker answers when
it thaws.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median

import pytest

from pipeline.events import SplitReason
from pipeline.execution.stragglers import (
    Ask,
    Backup,
    PaceHistory,
    Reassign,
    RunningAttempt,
    SplitAmong,
    StragglerPolicy,
    choose_actions,
)
from pipeline.jobs.splits import even_split_points
from pipeline.scoring.progress import ProgressSnapshot
from pipeline.testing.examples import choose

STEP = 0.1
POLL_EVERY = 5
ANSWER = 0.2
POLICY = StragglerPolicy()
Speed = Callable[[float], float]
"""Time in seconds -> work a second."""


@dataclass(frozen=True)
class Job:
    name: str
    work: float
    """Seconds at speed 1."""
    rows: int
    expected: float = 0.0
    """Seconds that rows like the others' would take; 0: as many as it takes."""

    @property
    def planned(self) -> float:
        return self.expected or self.work


@dataclass
class Attempt:
    job: Job
    batches: int
    began: float
    done: float = 0.0
    overhead: float = POLICY.overhead / 2
    is_backup: bool = False
    helpers: tuple[str, ...] = ()
    is_unwanted: bool = False
    snapshot: tuple[ProgressSnapshot, float] | None = None
    asked: float | None = None
    cut: float | None = None
    stalled_seconds: float = 0.0
    advanced: float | None = None

    @property
    def ended(self) -> int:
        """Batches."""
        return int(self.done / self.job.work * self.batches + 1e-9)


@dataclass
class Outcome:
    makespan: float
    actions: list[type | SplitReason]
    useful: float
    spent: float

    @property
    def waste(self) -> float:
        """Work that counted for nothing, as a share of what did."""
        return self.spent / self.useful - 1


@dataclass
class Simulation:
    speeds: Sequence[Speed]
    todo: Sequence[Job]
    batches: int = 20
    is_on: bool = True
    limit: float = 5000.0
    classes: Sequence[str] = ()
    """Class of each worker; empty: all are alike."""
    now: float = field(default=0.0, init=False)
    history: PaceHistory = field(default_factory=PaceHistory, init=False)
    queue: deque[tuple[Job, tuple[str, ...]]] = field(default_factory=deque, init=False)
    """Partitions that wait, with the workers that are to do them; empty: any."""
    running: dict[str, Attempt | None] = field(default_factory=dict, init=False)
    receipts: dict[str, Job] = field(default_factory=dict, init=False)
    divided: set[str] = field(default_factory=set, init=False)
    actions: list[type | SplitReason] = field(default_factory=list, init=False)
    spent: float = field(default=0.0, init=False)

    def run(self) -> Outcome:
        self.queue.extend((job, ()) for job in sorted(self.todo, key=lambda job: -job.planned))
        self.running = {f"w{number}": None for number in range(len(self.speeds))}
        self.history = PaceHistory(classes=dict(zip(self.running, self.classes, strict=False)))
        self.useful = sum(job.work for job in self.todo)
        step = 0
        while self.queue or any(one and not one.is_unwanted for one in self.running.values()):
            self._fill()
            if self.is_on and step % POLL_EVERY == 0 and not self.queue:
                self._poll()
            for number, worker in enumerate(self.running):
                self._advance(worker, self.speeds[number](self.now))
            self.now, step = self.now + STEP, step + 1
            if self.now > self.limit:
                break
        return Outcome(self.now, self.actions, self.useful, self.spent)

    def _fill(self) -> None:
        for worker, attempt in self.running.items():
            mine = next((one for one in self.queue if not one[1] or worker in one[1]), None)
            if attempt is None and mine is not None:
                self.queue.remove(mine)
                self.running[worker] = Attempt(mine[0], self.batches, self.now)

    def _advance(self, worker: str, speed: float) -> None:
        attempt = self.running[worker]
        if attempt is None:
            return
        if speed <= 0:
            attempt.stalled_seconds += STEP
            return
        if attempt.asked is not None and self.now - attempt.asked >= ANSWER:
            rows = attempt.job.rows * attempt.ended // attempt.batches
            attempt.snapshot = (
                ProgressSnapshot(
                    rows,
                    attempt.ended,
                    self.now - attempt.began,
                    self.now - (attempt.advanced or attempt.began),
                    attempt.stalled_seconds,
                ),
                self.now,
            )
            attempt.asked = None
        before, used = attempt.ended, min(attempt.overhead, STEP * speed)
        attempt.overhead -= used
        gain = STEP * speed - used
        attempt.done += gain
        self.spent += gain
        if attempt.ended > before:
            attempt.advanced = self.now
        if attempt.done >= attempt.job.work - 1e-9:
            self._finish(worker, attempt)
        elif attempt.ended > before and attempt.is_unwanted:
            self.running[worker] = None
        elif attempt.ended > before and attempt.helpers:
            self._cut(worker, attempt)

    def _finish(self, worker: str, attempt: Attempt) -> None:
        self.running[worker] = None
        if attempt.is_unwanted or attempt.job.name in self.receipts or attempt.job.name in self.divided:
            return
        self.receipts[attempt.job.name] = attempt.job
        seconds, work = self.now - attempt.began, attempt.job.planned
        self.history = self.history.with_ended(attempt.job.name, worker, seconds=seconds, work=work, policy=POLICY)
        self._end_others(attempt.job.name)

    def _end_others(self, name: str) -> None:
        for other in self.running.values():
            if other is not None and other.job.name == name:
                other.is_unwanted = True

    def _cut(self, worker: str, attempt: Attempt) -> None:
        self.running[worker] = None
        job = attempt.job
        done = job.rows * attempt.ended // attempt.batches
        split_points = even_split_points(done, job.rows, parts=len(attempt.helpers), smallest=64)
        self._put_parts(job, (done, *split_points), attempt.helpers, skip=1)

    def _put_parts(self, job: Job, split_points: Sequence[int], workers: tuple[str, ...], *, skip: int) -> None:
        self.divided.add(job.name)
        edges = (0, *split_points, job.rows)
        for number, (low, high) in enumerate(pairwise(edges)):
            rows = high - low
            share = rows / job.rows
            part = Job(f"{job.name}.{number}", job.work * share, rows, job.expected * share)
            if number < skip:
                self.receipts[part.name] = part
            else:
                self.queue.append((part, workers))
        self._end_others(job.name)

    def _poll(self) -> None:
        idle = [worker for worker, attempt in self.running.items() if attempt is None]
        runs = [self._run(worker, one) for worker, one in self.running.items() if one and not one.is_unwanted]
        for action in choose_actions(runs, idle=idle, history=self.history, policy=POLICY):
            attempt = self.running[action.key]
            assert attempt is not None
            assert not isinstance(action, Reassign)
            self.actions.append(action.reason if isinstance(action, SplitAmong) else type(action))
            if isinstance(action, Ask):
                attempt.asked = self.now
            elif isinstance(action, SplitAmong) and action.is_by_attempt:
                attempt.helpers, attempt.cut = action.workers, self.now
                if action.expensive_pace:
                    self.history = self.history.with_expensive(
                        attempt.job.name, worker=action.key, pace=action.expensive_pace
                    )
            elif isinstance(action, SplitAmong):
                split_points = even_split_points(0, attempt.job.rows, parts=len(action.workers), smallest=512)
                self._put_parts(attempt.job, split_points, action.workers, skip=0)
            elif isinstance(action, Backup):
                (helper,) = action.workers
                assert self.running[helper] is None
                self.running[helper] = Attempt(attempt.job, self.batches, self.now, is_backup=True)

    def _run(self, worker: str, attempt: Attempt) -> RunningAttempt:
        names = [one.job.name for one in self.running.values() if one and not one.is_unwanted]
        return RunningAttempt(
            key=worker,
            work=attempt.job.planned,
            rows=attempt.job.rows,
            worker=worker,
            seconds=self.now - attempt.began,
            snapshot=attempt.snapshot[0] if attempt.snapshot else None,
            snapshot_age=self.now - attempt.snapshot[1] if attempt.snapshot else 0.0,
            unanswered=None if attempt.asked is None else self.now - attempt.asked,
            split_requested=None if attempt.cut is None else self.now - attempt.cut,
            attempt_count=names.count(attempt.job.name),
        )


def compare(simulation: Simulation) -> tuple[Outcome, Outcome]:
    """With the policy, and without; with it every row is done once."""
    on, off = replace(simulation), replace(simulation, is_on=False)
    found = on.run(), off.run()
    assert sum(job.rows for name, job in on.receipts.items()) == sum(job.rows for job in on.todo)
    return found


def jobs(count: int, seconds: float, *, random: random.Random | None = None, rows: int = 50_000) -> list[Job]:
    factors = [random.lognormvariate(0, 0.3) if random else 1.0 for _ in range(count)]
    return [Job(f"{n:05d}", seconds * factor, max(1, round(rows * factor))) for n, factor in enumerate(factors)]


def steady(speed: float) -> Speed:
    return lambda now: speed


def frozen(start: float, stop: float = float("inf")) -> Speed:
    return lambda now: 0.0 if start <= now < stop else 1.0


def changing(before: float, after: float, *, at: float) -> Speed:
    return lambda now: before if now < at else after


def in_bursts(share: float, *, period: float = 2.0) -> Speed:
    return lambda now: 1.0 if now % period < share * period else 0.0


@pytest.mark.parametrize("factor", [4, 10, 30])
@pytest.mark.parametrize("workers", [3, 8])
def test_slow_worker_does_not_hold_up_the_others(factor: int, workers: int) -> None:
    speeds = [steady(1 / factor), *[steady(1.0)] * (workers - 1)]
    on, off = compare(Simulation(speeds, jobs(4 * workers, 10.0)))
    ideal = on.useful / (workers - 1 + 1 / factor)
    assert on.makespan < 1.5 * ideal + POLICY.seconds + 2 * POLICY.answer_timeout + 5
    assert on.makespan < (0.95 if factor == 4 else 0.7) * off.makespan
    assert on.waste < 0.1


@pytest.mark.parametrize("batches", [1, 20])
def test_a_worker_that_freezes_for_good_costs_one_partition_again(batches: int) -> None:
    on, off = compare(Simulation([frozen(15.0), *[steady(1.0)] * 3], jobs(16, 10.0), batches=batches))
    assert off.makespan > 4999
    assert on.makespan < 16 * 10 / 3 + 40
    assert on.waste < 0.2


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_worker_that_runs_in_bursts_is_cut(share: float) -> None:
    on, off = compare(Simulation([in_bursts(share), *[steady(1.0)] * 3], jobs(16, 20.0)))
    assert SplitReason.SLOW in on.actions
    assert on.makespan < (0.8 if share == 0.1 else 0.9) * off.makespan
    assert on.waste < 0.1


def test_of_even_workers_nothing_is_done() -> None:
    on, off = compare(Simulation([steady(1.0)] * 4, jobs(16, 10.0)))
    assert on.actions == []
    assert on.makespan == off.makespan


def test_undivided_rest_is_shared() -> None:
    on, off = compare(Simulation([steady(1.0)] * 4, jobs(18, 10.0)))
    assert {*on.actions} == {Ask, SplitReason.IDLE_WORKERS}
    assert on.makespan < 0.96 * off.makespan
    assert on.makespan < 45 + 3 * POLICY.overhead + POLICY.share_after + 1
    assert on.waste < 0.01


@pytest.mark.parametrize("workers", [4, 16])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_expensive_rows_that_come_last_are_done_by_all(workers: int, last: int) -> None:
    cheap = jobs(4 * workers, 5.0)
    # As much work in these as in all the others, and nothing shows it before.
    expensive = [Job(f"9{number}", 20.0 * workers / last, 50_000, 4.9) for number in range(last)]
    on, off = compare(Simulation([steady(1.0)] * workers, [*cheap, *expensive], batches=20 * workers))
    assert {*on.actions} <= {Ask, SplitReason.IDLE_WORKERS}
    assert on.makespan < 1.1 * 40 + 2
    assert on.makespan < 0.9 * off.makespan
    assert on.waste < 0.01


@pytest.mark.parametrize("faster", [4, 20])
@pytest.mark.parametrize("cpus", [4, 12])
@pytest.mark.parametrize("last", [0, 3])
def test_gpu_and_cpus_end_together(faster: int, cpus: int, last: int) -> None:
    """One GPU beside CPUs: nearly as fast as both allow, and no CPU looks slow because it is no GPU."""
    speeds, classes = [steady(faster), *[steady(1.0)] * cpus], ["gpu", *["cpu"] * cpus]
    todo = jobs(2 * (faster + cpus) + last, 40.0)
    on, off = compare(Simulation(speeds, todo, classes=classes))
    assert {*on.actions} <= {Ask, SplitReason.IDLE_WORKERS}
    assert on.makespan <= off.makespan
    assert on.makespan < 1.16 * on.useful / (faster + cpus)
    assert on.waste < 0.05
    alike, _ = compare(Simulation(speeds, todo))
    assert alike.makespan >= on.makespan
    if last and cpus == 4:
        assert SplitReason.SLOW in alike.actions


def test_gpu_that_slows_down_is_a_straggler_among_gpus() -> None:
    """Although it is still faster than the CPUs beside it."""
    speeds = [steady(2.0), *[steady(20.0)] * 3, *[steady(1.0)] * 4]
    classes = [*["gpu"] * 4, *["cpu"] * 4]
    on, off = compare(Simulation(speeds, jobs(90, 40.0), classes=classes))
    assert on.makespan < 0.9 * off.makespan
    assert on.waste < 0.1


@pytest.mark.parametrize("seed", range(20))
def test_uneven_partitions_alone_start_no_rescue_that_costs(seed: int) -> None:
    chance = random.Random(seed)
    on, off = compare(Simulation([steady(1.0)] * 4, jobs(20, 10.0, random=chance)))
    assert on.makespan <= off.makespan * 1.05 + 1
    assert on.waste < 0.15


@pytest.mark.parametrize("at", [5.0, 35.0, 45.0])
@pytest.mark.parametrize("workers", [4, 16])
def test_when_all_become_slow_there_is_no_storm_of_copies(at: float, workers: int) -> None:
    on, off = compare(Simulation([changing(1.0, 0.1, at=at)] * workers, jobs(5 * workers, 10.0)))
    assert on.makespan <= off.makespan * 1.1 + 5
    assert on.waste < 0.1
    assert sum(action in (Backup, SplitReason.FROZEN) for action in on.actions) <= workers / 4


def _random(seed: int) -> Simulation:
    chance = random.Random(seed)
    workers = chance.randint(2, 10)
    kinds = [
        lambda: steady(1.0),
        lambda: steady(chance.lognormvariate(0, 0.2)),
        lambda: steady(1 / chance.uniform(2, 20)),
        lambda: changing(1.0, 1 / chance.uniform(2, 30), at=chance.uniform(0, 60)),
        lambda: frozen(start := chance.uniform(0, 60), start + chance.expovariate(1 / 20)),
        lambda: in_bursts(chance.uniform(0.05, 0.9), period=chance.uniform(0.5, 6)),
    ]
    weights = [chance.random() ** 2 for _ in kinds]
    speeds = [chance.choices(kinds, weights)[0]() for _ in range(workers)]
    todo = jobs(chance.randint(1, 6 * workers), chance.uniform(1, 30), random=chance, rows=chance.choice([900, 50_000]))
    return Simulation(speeds, todo, batches=chance.choice([1, 4, 50]), limit=20_000)


def test_over_many_clusters_it_is_never_much_worse_and_often_far_better() -> None:
    ratios, wastes = [], []
    for seed in range(choose(50, of=150)):
        on, off = compare(_random(seed))
        assert on.makespan <= 1.25 * off.makespan + 10, f"seed {seed}: {on} against {off}"
        assert on.waste <= 1.0, f"seed {seed}"
        ratios.append(on.makespan / off.makespan)
        wastes.append(on.waste)
    ratios.sort()
    assert ratios[len(ratios) // 10] < 0.8, "one in ten gains a lot"
    assert ratios[-1 - len(ratios) // 37] <= 1.05, "hardly one loses"
    assert median(wastes) < 0.02
    assert sum(wastes) / len(wastes) < 0.15
