"""What is known of attempts that may be stragglers, and what can be done about them: measurements and actions. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

from pipeline.scoring.progress import Sight

WINDOW = 64
"""Partitions that ended last; older ones say nothing about now."""
RECENT = 3
"""Partitions of a worker by which its own pace is told."""
MAD_TO_SIGMA = 1.4826
"""Standard deviation / median absolute deviation of a normal distribution."""


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
    first_batch: float = 0.3
    """Seconds after which one is asked again that had no batch done."""
    begin: float = 5.0
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
    share_gain: float = 1.0
    """Seconds that must be won by sharing."""
    share_wait: float = 1.0
    """Seconds for which those that answered already wait for those that were asked with them."""
    starved: float = 0.25
    """Share of its time for which the process of a slow worker did not get to run; twice as much is proof alone."""


@dataclass(frozen=True)
class Rates:
    """Seconds a unit of work took, by worker, in partitions that ended; the oldest first."""

    samples: tuple[tuple[str, float], ...] = ()
    dear: tuple[tuple[str, str, float], ...] = ()
    """Partitions whose rows seem to take longer than others', so that their parts say nothing about these: with the
    worker on which that was seen, and the seconds of a unit of work."""

    def with_dear(self, partition: str, *, worker: str, pace: float) -> Rates:
        """With one more that seems dear."""
        return replace(self, dear=(*self.dear, (partition, worker, pace)))

    def ended(self, partition: str, worker: str, *, seconds: float, work: float, patience: Patience) -> Rates:
        """When a partition has ended. A part of one that seems dear does not count, unless it took the usual time
        elsewhere: then it was the worker that was slow."""
        found = self
        for whole in self.dear:
            name, where, pace = whole
            if not partition.startswith(f"{name}."):
                continue
            if worker == where or not found.is_usual(seconds=seconds, work=work, patience=patience):
                return found
            found = replace(found, dear=tuple(one for one in found.dear if one != whole))
            found = found.after(where, seconds=pace, work=1.0)
        return found.after(worker, seconds=seconds, work=work)

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

    def is_usual(self, *, seconds: float, work: float, patience: Patience) -> bool:
        """Whether something took no longer than others do; so does all before enough has ended."""
        return len(self.samples) < patience.samples or seconds <= patience.factor * work * self.typical()

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

    @property
    def batch_seconds(self) -> float:
        """Seconds a batch takes in an attempt that answers."""
        return self.sight.seconds / self.sight.batches if self.sight and self.sight.batches else self.seconds


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
class Rescue:
    """Have others do some of it, or all."""

    key: str
    workers: tuple[str, ...]
    left: float
    """Seconds it would still take if nothing were done, as far as can be told."""


class Backup(Rescue):
    """Run a copy beside it; the first receipt wins."""


class Cut(Rescue):
    """Have it stop at its next batch boundary, and these do the rest in as many parts."""


class Divide(Rescue):
    """Give it up, and have these do all of it in as many parts."""


@dataclass(frozen=True)
class Share(Rescue):
    """Have it stop at its next batch boundary, and these, its own worker among them, do the rest in as many parts."""

    dear: float = 0.0
    """Seconds that a unit of its work takes, where that is far more than usual and its worker does not seem slow."""


Action = Ask | Move | Rescue
