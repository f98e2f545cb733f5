"""What is known of attempts that may be stragglers, and what can be done about them: measurements and actions. Pure.

What to do about a partition that runs far beyond its expected time, or on after all others. Pure: measurements in,
actions out.

What a partition is expected to take is its work × the seconds that a unit of work took in partitions that have ended:
their median, with the median of the distances from it as the spread, since a slow one among them must not move either.
A partition far beyond that is asked how far it is. What is done then is what ends first, by these figures, if that
gains enough: the attempt stops at its next batch boundary and others do the rest; or a backup copy runs beside it, and
the first receipt wins; or, when its worker does not answer, all of the partition is divided anew among idle workers.

A partition that would go on for seconds while workers are idle because nothing waits any more is shared: it stops at
its next batch boundary, and they and its own worker do the rest in equal parts. So rows of very unequal cost, or a
number of partitions that the workers do not divide, end nearly at once everywhere. A partition that takes longer than
others is shared too, its rows may be dear; but where its worker is what is slow, others do all of its rest. A worker is
slow when its process does not get to run, or when its last partitions were slow as well.

Only idle workers help, each partition is helped once, and a helper is expected to be as fast as it was of late: when
all workers become slow, so does the expectation, and nothing is done.

Who does the rest of an attempt that would go on for seconds while workers have nothing to do. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from pipeline.scoring.progress import MIN_REST_ROWS, ProgressSnapshot

WINDOW = 64
"""Partitions that ended last; older ones say nothing about now."""
RECENT = 3
"""Partitions of a worker by which its own pace is told."""
MAD_TO_SIGMA = 1.4826
"""Standard deviation / median absolute deviation of a normal distribution."""


@dataclass(frozen=True)
class StragglerPolicy:
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
    stale_after: float = 3.0
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
class PaceHistory:
    """Seconds a unit of work took, by worker, in partitions that ended; the oldest first."""

    samples: tuple[tuple[str, float], ...] = ()
    expensive: tuple[tuple[str, str, float], ...] = ()
    """Partitions whose rows seem to take longer than others', so that their parts say nothing about these: with the
    worker on which that was seen, and the seconds of a unit of work."""

    def with_expensive(self, partition: str, *, worker: str, pace: float) -> PaceHistory:
        """With one more that seems dear."""
        return replace(self, expensive=(*self.expensive, (partition, worker, pace)))

    def ended(
        self, partition: str, worker: str, *, seconds: float, work: float, patience: StragglerPolicy
    ) -> PaceHistory:
        """When a partition has ended. A part of one that seems dear does not count, unless it took the usual time
        elsewhere: then it was the worker that was slow."""
        found = self
        for whole in self.expensive:
            name, where, pace = whole
            if not partition.startswith(f"{name}."):
                continue
            if worker == where or not found.is_usual(seconds=seconds, work=work, patience=patience):
                return found
            found = replace(found, expensive=tuple(one for one in found.expensive if one != whole))
            found = found.after(where, seconds=pace, work=1.0)
        return found.after(worker, seconds=seconds, work=work)

    def after(self, worker: str, *, seconds: float, work: float) -> PaceHistory:
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

    def is_usual(self, *, seconds: float, work: float, patience: StragglerPolicy) -> bool:
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
class RunningAttempt:
    """An attempt in flight."""

    key: str
    work: float
    """Units of work of the partition, whatever a unit is."""
    rows: int
    worker: str
    """Where it executes; empty: it has not begun."""
    seconds: float
    """Since it began; since it was submitted when it has not."""
    sight: ProgressSnapshot | None = None
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
class Reassign:
    """It has not begun: take it back, and have an idle worker do it."""

    key: str
    workers: tuple[str, ...]


@dataclass(frozen=True)
class MitigationAction:
    """Have others do some of it, or all."""

    key: str
    workers: tuple[str, ...]
    left: float
    """Seconds it would still take if nothing were done, as far as can be told."""


class Backup(MitigationAction):
    """Run a copy beside it; the first receipt wins."""


class Cut(MitigationAction):
    """Have it stop at its next batch boundary, and these do the rest in as many parts."""


class Divide(MitigationAction):
    """Give it up, and have these do all of it in as many parts."""


@dataclass(frozen=True)
class Share(MitigationAction):
    """Have it stop at its next batch boundary, and these, its own worker among them, do the rest in as many parts."""

    expensive: float = 0.0
    """Seconds that a unit of its work takes, where that is far more than usual and its worker does not seem slow."""


Action = Ask | Reassign | MitigationAction


SMALLEST_PART = 512
"""Rows a part should have when a whole partition is divided anew."""
WASTE = 1.5
"""Doing rows twice must end so many times sooner than a way that does not."""


def choose_mitigations(
    runs: Sequence[RunningAttempt], *, idle: Sequence[str], rates: PaceHistory, patience: StragglerPolicy
) -> tuple[Action, ...]:
    """What to do now.

    :param idle: workers with a thread for which there is nothing to do, one entry for each such thread.
    """
    helpers = list(idle)
    actions: list[Action] = []
    shared: list[RunningAttempt] = []
    for run in sorted(runs, key=lambda one: (-one.seconds / max(one.work, 1e-12), one.key)):
        others = [name for name in helpers if name != run.worker]
        if not others or run.copies > 1 or run.is_helped:
            continue
        action = _choose_mitigation(run, others, runs, rates, patience)
        if action is None:
            shared.append(run)
            continue
        actions.append(action)
        for name in () if isinstance(action, Ask) else action.workers:
            helpers.remove(name)
    return (*actions, *share_remaining(shared, helpers, rates, patience)) if helpers else tuple(actions)


def limit(
    run: RunningAttempt, *, rates: PaceHistory, patience: StragglerPolicy, running: Iterable[float] = ()
) -> float:
    """Seconds a partition may take before anybody wonders."""
    expected = run.work * rates.typical(running)
    spread = run.work * rates.spread()
    return max(expected + patience.seconds, patience.factor * expected, expected + patience.spreads * spread)


def _choose_mitigation(
    run: RunningAttempt,
    helpers: list[str],
    runs: Sequence[RunningAttempt],
    rates: PaceHistory,
    patience: StragglerPolicy,
) -> Ask | Reassign | MitigationAction | None:
    """What is done about one that is far too slow; None where that is nothing, or sharing it is enough."""
    if not run.worker:
        return Reassign(run.key, (helpers[0],)) if run.seconds > patience.begin else None
    if len(rates.samples) < patience.samples or run.work <= 0:
        return None
    running = [one.seconds / one.work for one in runs if one.worker and one.work > 0 and one.key != run.key]
    if run.seconds <= limit(run, rates=rates, patience=patience, running=running):
        return None
    is_frozen = run.unanswered is not None and run.unanswered > patience.answer
    if not is_frozen and (run.sight is None or run.sight_age > patience.stale_after):
        return Ask(run.key) if run.unanswered is None else None
    is_late = run.cut_asked is not None and run.cut_asked > _patience_for_cut(run, patience)
    if run.cut_asked is not None and not is_frozen and not is_late:
        return None
    sight = None if is_frozen else run.sight
    is_moving = sight is not None and not is_late and not _is_stuck(run, sight, patience)
    if sight is not None and is_moving and not is_worker_slow(run, sight, rates, patience):
        return None
    return _rescue(run, sight, sorted(helpers, key=rates.of), rates, patience, is_asked=run.cut_asked is not None)


def _is_stuck(run: RunningAttempt, sight: ProgressSnapshot, patience: StragglerPolicy) -> bool:
    """Whether it answers, but does not get on."""
    return not sight.rows_done or sight.since + run.sight_age > patience.seconds + 3 * run.batch_seconds


def _rescue(
    run: RunningAttempt,
    sight: ProgressSnapshot | None,
    helpers: list[str],
    rates: PaceHistory,
    patience: StragglerPolicy,
    *,
    is_asked: bool,
) -> MitigationAction | None:
    """The way on that ends first, when that is soon enough."""
    done = min(1.0, sight.rows_done / max(1, run.rows)) if sight else 0.0
    # Of an attempt that shows no progress nothing is known: as long again as it took so far is the usual guess.
    left = run.seconds * (1 - done) / done if done else max(run.seconds, run.work * rates.typical())
    options: list[tuple[float, MitigationAction]] = []
    first = helpers[:1]
    options.append((_seconds(run.work, first, rates, patience), Backup(run.key, tuple(first), left)))
    some = helpers[: run.rows // SMALLEST_PART]
    if len(some) > 1:
        options.append((_seconds(run.work, some, rates, patience), Divide(run.key, tuple(some), left)))
    rest = run.rows - sight.rows_done if sight else 0
    some = helpers[: max(1, rest // SMALLEST_PART)]
    if done and rest >= MIN_REST_ROWS and not is_asked:
        # Until it stops, its helpers have nothing to do.
        seconds = run.batch_seconds / 2 + _seconds(run.work * rest / run.rows, some, rates, patience)
        options.append((seconds, Cut(run.key, tuple(some), left)))
    soonest, rescue = min(options, key=lambda one: _price(one[0], one[1], patience))
    wanted = max(patience.least_gain, patience.gain * left)
    return rescue if left - soonest >= wanted else None


def _price(seconds: float, rescue: MitigationAction, patience: StragglerPolicy) -> float:
    """What a way costs: its end, what is done twice, and that dividing gives up an attempt that might yet end first."""
    if isinstance(rescue, Cut):
        return seconds
    return WASTE * seconds + patience.least_gain * (2 if isinstance(rescue, Divide) else 1)


def _seconds(work: float, helpers: Sequence[str], rates: PaceHistory, patience: StragglerPolicy) -> float:
    """Until all of ``helpers`` have done an equal part of ``work``."""
    return patience.overhead + work / len(helpers) * max(rates.of(name) for name in helpers)


def _patience_for_cut(run: RunningAttempt, patience: StragglerPolicy) -> float:
    return 2 * run.batch_seconds + patience.answer


def is_worker_slow(run: RunningAttempt, sight: ProgressSnapshot, rates: PaceHistory, patience: StragglerPolicy) -> bool:
    """Whether what takes long is the worker rather than the rows."""
    starved = sight.starved / max(sight.seconds, 1e-9)
    if starved > 2 * patience.starved:
        return True
    if sight.rows_done <= 0 or rates.is_usual(seconds=_attempt_seconds(run, sight), work=run.work, patience=patience):
        return False
    return starved > patience.starved or rates.of(run.worker) > patience.factor * rates.typical()


@dataclass
class _Team:
    """An attempt that is shared, and who does its rest."""

    run: RunningAttempt
    sight: ProgressSnapshot
    is_slow: bool
    """Its own worker is not to go on with it."""
    helpers: list[str] = field(default_factory=list)

    @property
    def rest(self) -> int:
        """Rows that are left."""
        return self.run.rows - self.sight.rows_done

    @property
    def left(self) -> float:
        """Seconds it would go on by its own pace."""
        return self.sight.seconds * self.rest / self.sight.rows_done - self.run.sight_age

    @property
    def workers(self) -> tuple[str, ...]:
        """Those that will do the rest."""
        own = () if self.is_slow else (self.run.worker,)
        return (*own, *self.helpers)

    def has_room(self, helper: str) -> bool:
        """Whether there is a part for one more."""
        return helper != self.run.worker and len(self.workers) < self.rest // MIN_REST_ROWS

    def gain(self, patience: StragglerPolicy) -> float:
        """Seconds that are won."""
        return self.left - self.run.batch_seconds / 2 - patience.overhead - self.left / max(1, len(self.workers))


def share_remaining(
    runs: Sequence[RunningAttempt], helpers: Sequence[str], rates: PaceHistory, patience: StragglerPolicy
) -> tuple[Ask | Cut | Share, ...]:
    """Let ``helpers`` have their part of what still runs, if all would end sooner by its own pace."""
    open_ = [
        run
        for run in runs
        if run.worker and run.seconds >= patience.share and run.cut_asked is None and run.rows >= 2 * MIN_REST_ROWS
    ]
    old = [run for run in open_ if _is_old(run, patience)]
    asks = tuple(Ask(run.key) for run in old if run.unanswered is None)
    if asks or any(run.unanswered is not None and run.unanswered < patience.share_wait for run in old):
        # Whoever answered first would have all helpers.
        return asks
    teams = [
        _Team(run, run.sight, is_worker_slow(run, run.sight, rates, patience))
        for run in open_
        if run not in old and run.sight is not None and run.sight.rows_done > 0
    ]
    teams = [team for team in teams if team.rest >= MIN_REST_ROWS]
    while teams:
        _assign(teams, helpers)
        poor = [team for team in teams if team.gain(patience) < max(patience.share_gain, patience.gain * team.left)]
        if not poor:
            break
        # Its helpers are of more use to others.
        teams.remove(min(poor, key=lambda team: team.gain(patience)))
    return tuple(_shared(team, rates, patience) for team in teams)


def _is_old(run: RunningAttempt, patience: StragglerPolicy) -> bool:
    """Whether an attempt has to be asked; one that had done nothing is asked again soon."""
    if run.sight is None:
        return True
    return run.sight_age > (patience.stale_after if run.sight.rows_done else patience.first_batch)


def _assign(teams: Sequence[_Team], helpers: Sequence[str]) -> None:
    """Each helper goes where most is left for each."""
    for team in teams:
        team.helpers = []
    for helper in helpers:
        fitting = [team for team in teams if team.has_room(helper)]
        if fitting:
            max(fitting, key=lambda team: team.left / max(0.5, len(team.workers))).helpers.append(helper)


def _shared(team: _Team, rates: PaceHistory, patience: StragglerPolicy) -> Share | Cut:
    if team.is_slow:
        return Cut(team.run.key, team.workers, team.left)
    seconds, work = _attempt_seconds(team.run, team.sight), team.run.work
    expensive = 0.0 if rates.is_usual(seconds=seconds, work=work, patience=patience) else seconds / work
    return Share(team.run.key, team.workers, team.left, expensive)


def _attempt_seconds(run: RunningAttempt, sight: ProgressSnapshot) -> float:
    """That the whole attempt will take by its own pace."""
    return sight.seconds * run.rows / sight.rows_done
