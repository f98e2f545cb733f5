"""What to do about a partition that runs far beyond its expected time, or on after all others. Pure: measurements in,
actions out.

What a partition is expected to take is its work × the seconds that a unit of work took in partitions that have ended:
their median, with the median of the distances from it as the spread, since a slow one among them must not move either.
A partition far beyond that is asked how far it is. What is done then is what ends first, by these figures, if that
gains enough: the attempt stops at its next batch boundary and others do the rest; or a backup copy runs beside it, and
the first receipt wins; or, when its worker does not answer, all of the partition is divided anew among idle workers.

A partition that is not slow, but would go on for seconds while workers are idle because nothing waits any more, is
shared: it stops at its next batch boundary, and they and its own worker do the rest in equal parts. So rows of very
unequal cost, or a number of partitions that the workers do not divide, end nearly at once everywhere.

Only idle workers help, each partition is helped once, and a helper is expected to be as fast as it was of late: when
all workers become slow, so does the expectation, and nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from pipeline.progress import SMALLEST_REST, Sight

WINDOW = 64
"""Partitions that ended last; older ones say nothing about now."""
RECENT = 3
"""Partitions of a worker by which its own pace is told."""
MAD_TO_SIGMA = 1.4826
"""Standard deviation / median absolute deviation of a normal distribution."""
SMALLEST_PART = 512
"""Rows a part should have when a whole partition is divided anew."""
WASTE = 1.5
"""Doing rows twice must end so many times sooner than a way that does not."""


@dataclass(frozen=True)
class Patience:
    """How long is far too long, and what is worth the trouble."""

    samples: int = 3
    """Partitions that must have ended before anything is expected of others."""
    seconds: float = 3.0
    """Beyond the expected ones that are always granted."""
    factor: float = 1.5
    """Times the expected seconds that are always granted."""
    spreads: float = 4.0
    """Times the spread beyond the expected seconds that are always granted."""
    answer: float = 3.0
    """Seconds a worker has to answer; then it counts as frozen."""
    look_again: float = 3.0
    """Seconds after which an answer is too old to decide by."""
    begin: float = 10.0
    """Seconds a partition may wait for its worker while others are idle."""
    lost: float = 60.0
    """Seconds that an attempt which is not wanted any more may hold a worker that is needed."""
    gain: float = 0.25
    """Share of the time it would still take that must be won."""
    least_gain: float = 1.0
    """Seconds that must be won."""
    overhead: float = 0.5
    """Seconds until a helper is at work."""
    share: float = 1.0
    """Seconds after which an attempt has shown its pace, and idle workers may take their share of it."""
    share_gain: float = 1.5
    """Seconds that must be won by sharing."""


@dataclass(frozen=True)
class Rates:
    """Seconds a unit of work took, by worker, in partitions that ended; the oldest first."""

    samples: tuple[tuple[str, float], ...] = ()

    def after(self, worker: str, *, seconds: float, work: float) -> Rates:
        """With one partition more."""
        return replace(self, samples=(*self.samples, (worker, seconds / work))[-WINDOW:]) if work > 0 else self

    def typical(self, running: Iterable[float] = ()) -> float:
        """The median.

        :param running: seconds a unit of work has taken already in partitions that have not ended. Those beyond the
            median count, so that it follows when all become slow.
        """
        ended = [rate for _, rate in self.samples]
        middle = median(ended)
        return median([*ended, *(rate for rate in running if rate > middle)])

    def spread(self) -> float:
        """Robust standard deviation."""
        ended = [rate for _, rate in self.samples]
        middle = median(ended)
        return MAD_TO_SIGMA * median(abs(rate - middle) for rate in ended)

    def of(self, worker: str) -> float:
        """The pace of one worker: the median of its last partitions, or of all where it has not ended any."""
        own = [rate for name, rate in self.samples if name == worker][-RECENT:]
        return median(own) if own else self.typical()


@dataclass(frozen=True)
class Run:
    """An attempt in flight."""

    key: str
    work: float
    """Units of work of the partition, whatever a unit is."""
    rows: int
    worker: str
    """Where it executes; empty: it has not begun."""
    seconds: float
    """Since it began; since it was submitted when it has not."""
    sight: Sight | None = None
    """The last answer to the question how far it is."""
    sight_age: float = 0.0
    """Seconds since that answer."""
    unanswered: float | None = None
    """Seconds for which a question has been open; None: none is."""
    cut_asked: float | None = None
    """Seconds since it was asked to stop at a batch boundary; None: it was not."""
    copies: int = 1
    """Attempts at this partition in flight, this one among them."""
    is_helped: bool = False
    """All that could be done was done."""


@dataclass(frozen=True)
class Ask:
    """Find out how far it is."""

    key: str


@dataclass(frozen=True)
class Move:
    """It has not begun: take it back, and have an idle worker do it."""

    key: str
    workers: tuple[str, ...]


@dataclass(frozen=True)
class Backup:
    """Run a copy beside it; the first receipt wins."""

    key: str
    workers: tuple[str, ...]
    left: float
    """Seconds it would still take if nothing were done, as far as can be told."""


@dataclass(frozen=True)
class Cut:
    """Have it stop at its next batch boundary, and these do the rest in as many parts."""

    key: str
    workers: tuple[str, ...]
    left: float


@dataclass(frozen=True)
class Divide:
    """Give it up, and have these do all of it in as many parts."""

    key: str
    workers: tuple[str, ...]
    left: float


@dataclass(frozen=True)
class Share:
    """Have it stop at its next batch boundary, and these, its own worker among them, do the rest in as many parts."""

    key: str
    workers: tuple[str, ...]
    left: float


Rescue = Backup | Cut | Divide | Share
Action = Ask | Move | Rescue


def decide(runs: Sequence[Run], *, idle: Sequence[str], rates: Rates, patience: Patience) -> tuple[Action, ...]:
    """What to do now.

    :param idle: workers with a thread for which there is nothing to do, one entry for each such thread.
    """
    helpers = list(idle)
    # Those that are shared share the idle ones.
    each = max(1, len(helpers) // max(1, sum(bool(run.worker) for run in runs)))
    actions: list[Action] = []
    for run in sorted(runs, key=lambda one: (-one.seconds / max(one.work, 1e-12), one.key)):
        others = [name for name in helpers if name != run.worker]
        if not others or run.copies > 1 or run.is_helped:
            continue
        action = _decide(run, others, runs, rates, patience, each=each)
        if action is None:
            continue
        actions.append(action)
        for name in () if isinstance(action, Ask) else action.workers:
            # A share of its own is for the worker that has it.
            if name in helpers and not (isinstance(action, Share) and name == run.worker):
                helpers.remove(name)
    return tuple(actions)


def limit(run: Run, *, rates: Rates, patience: Patience, running: Iterable[float] = ()) -> float:
    """Seconds a partition may take before anybody wonders."""
    expected = run.work * rates.typical(running)
    spread = run.work * rates.spread()
    return max(expected + patience.seconds, patience.factor * expected, expected + patience.spreads * spread)


def _decide(
    run: Run, helpers: list[str], runs: Sequence[Run], rates: Rates, patience: Patience, *, each: int
) -> Action | None:
    if not run.worker:
        return Move(run.key, (helpers[0],)) if run.seconds > patience.begin else None
    if len(rates.samples) < patience.samples or run.work <= 0:
        return _share(run, helpers[:each], rates, patience)
    running = [one.seconds / one.work for one in runs if one.worker and one.work > 0 and one.key != run.key]
    if run.seconds <= limit(run, rates=rates, patience=patience, running=running):
        return _share(run, helpers[:each], rates, patience)
    is_frozen = run.unanswered is not None and run.unanswered > patience.answer
    if not is_frozen and (run.sight is None or run.sight_age > patience.look_again):
        return Ask(run.key) if run.unanswered is None else None
    if run.cut_asked is not None and not is_frozen and run.cut_asked <= _patience_for_cut(run, patience):
        return None
    sight = None if is_frozen else run.sight
    return _rescue(run, sight, sorted(helpers, key=rates.of), rates, patience, is_asked=run.cut_asked is not None)


def _share(run: Run, helpers: list[str], rates: Rates, patience: Patience) -> Ask | Share | Cut | None:
    """Let ``helpers`` have their part of an attempt, if all would end sooner by its own pace.

    One that is slower than others by now leaves all of its rest to them: its worker may be what is slow.
    """
    if run.seconds < patience.share or run.cut_asked is not None or run.rows < 2 * SMALLEST_PART:
        return None
    if run.sight is None or run.sight_age > patience.look_again:
        return Ask(run.key) if run.unanswered is None else None
    rest = run.rows - run.sight.rows_done
    if run.sight.rows_done <= 0 or rest < SMALLEST_REST:
        return None
    own = run.sight.seconds * run.rows / run.sight.rows_done
    is_slow = len(rates.samples) >= patience.samples and own > patience.factor * run.work * rates.typical()
    workers = (*(() if is_slow else (run.worker,)), *helpers)[: rest // SMALLEST_PART]
    left = run.sight.seconds * rest / run.sight.rows_done - run.sight_age
    soonest = _boundary(run) / 2 + patience.overhead + left / max(1, len(workers))
    wanted = max(patience.share_gain, patience.gain * left)
    if len(workers) < 2 or left - soonest < wanted:
        return None
    return (Cut if is_slow else Share)(run.key, workers, left)


def _rescue(
    run: Run, sight: Sight | None, helpers: list[str], rates: Rates, patience: Patience, *, is_asked: bool
) -> Rescue | None:
    """The way on that ends first, when that is soon enough."""
    done = min(1.0, sight.rows_done / max(1, run.rows)) if sight else 0.0
    # Of an attempt that shows no progress nothing is known: as long again as it took so far is the usual guess.
    left = run.seconds * (1 - done) / done if done else max(run.seconds, run.work * rates.typical())
    options: list[tuple[float, Rescue]] = []
    first = helpers[:1]
    options.append((_seconds(run.work, first, rates, patience), Backup(run.key, tuple(first), left)))
    some = helpers[: run.rows // SMALLEST_PART]
    if len(some) > 1:
        options.append((_seconds(run.work, some, rates, patience), Divide(run.key, tuple(some), left)))
    rest = run.rows - sight.rows_done if sight else 0
    some = helpers[: max(1, rest // SMALLEST_PART)]
    if done and rest >= SMALLEST_REST and not is_asked:
        # Until it stops, its helpers have nothing to do.
        seconds = _boundary(run) / 2 + _seconds(run.work * rest / run.rows, some, rates, patience)
        options.append((seconds, Cut(run.key, tuple(some), left)))
    soonest, rescue = min(options, key=lambda one: _price(one[0], one[1], patience))
    wanted = max(patience.least_gain, patience.gain * left)
    return rescue if left - soonest >= wanted else None


def _price(seconds: float, rescue: Rescue, patience: Patience) -> float:
    """What a way costs: its end, what is done twice, and that dividing gives up an attempt that might yet end first."""
    if isinstance(rescue, Cut):
        return seconds
    return WASTE * seconds + patience.least_gain * (2 if isinstance(rescue, Divide) else 1)


def _seconds(work: float, helpers: Sequence[str], rates: Rates, patience: Patience) -> float:
    """Until all of ``helpers`` have done an equal part of ``work``."""
    return patience.overhead + work / len(helpers) * max(rates.of(name) for name in helpers)


def _boundary(run: Run) -> float:
    """Seconds a batch takes in an attempt that answers."""
    return run.sight.seconds / run.sight.batches if run.sight and run.sight.batches else run.seconds


def _patience_for_cut(run: Run, patience: Patience) -> float:
    return 2 * _boundary(run) + patience.answer
