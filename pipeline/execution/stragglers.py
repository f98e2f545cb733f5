"""Detect stragglers, and choose the actions of idle workers against them. Pure: measurements in, actions out.

The expected time of a partition is its work × the median seconds per unit of work in ended partitions. The spread is
the median distance from that median. One slow partition changes neither.

A partition far beyond its expected time is asked for its progress. The action that ends first is taken, if it saves
enough:

- split, because its worker is slow: the attempt stops at its next batch boundary, and idle workers do the rest;
- backup: a second attempt runs on an idle worker, and the first receipt wins;
- split, because its worker is frozen: idle workers do all of the partition, in parts.

While workers are idle because nothing waits, a partition that would run for seconds is split too, even if it is not
slow. Idle workers and the partition's own worker do the rest in equal parts. All workers then end at nearly the same
time, even with rows of very unequal cost. The partition's own worker gets no part if that worker is slow: its process
does not get to run, or its last partitions were slow as well.

Only idle workers help. A partition gets one backup, or one split of the whole. The expected speed of a helper is the
speed in its last partitions. When all workers become slow, the expectation follows, and no action is taken.

Workers with a GPU and workers without are classes of their own: each has its own median and spread, else every
partition on a CPU beside a GPU would look like a straggler. A partition is shared with workers of another class only
if that ends it sooner; workers that are much faster than its own do all of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from pipeline.events import SplitReason
from pipeline.scoring.progress import MIN_REST_ROWS, ProgressSnapshot

WINDOW = 64
"""Number of ended partitions that the history holds for each class of workers."""
RECENT = 3
"""Number of last partitions from which the pace of a worker is computed."""
MAD_TO_SIGMA = 1.4826
"""Standard deviation / median absolute deviation, of a normal distribution."""
SMALLEST_PART = 512
"""Minimum of rows a part should have when a whole partition is split."""
WASTE = 1.5
"""Factor by which an action that scores rows twice must be faster than an action that does not."""


@dataclass(frozen=True)
class StragglerPolicy:
    """Limits beyond which a partition is a straggler, and the gain an action must have."""

    samples: int = 3
    """Number of ended partitions required for an expected time."""
    seconds: float = 3.0
    """Seconds beyond the expected seconds that are always granted."""
    factor: float = 1.5
    """Multiple of the expected seconds that is always granted."""
    spreads: float = 4.0
    """Multiple of the spread, beyond the expected seconds, that is always granted."""
    answer_timeout: float = 3.0
    """Seconds a worker has to answer; after them the worker counts as frozen."""
    stale_after: float = 3.0
    """Age in seconds above which a snapshot is too old for decisions."""
    first_batch: float = 0.3
    """Seconds after which an attempt without a finished batch is asked again."""
    start_timeout: float = 5.0
    """Seconds a submitted partition may wait for its worker while other workers are idle."""
    abandoned_timeout: float = 60.0
    """Seconds an abandoned attempt may hold a worker that is needed."""
    gain: float = 0.25
    """Share of the remaining time that must be saved."""
    min_gain: float = 1.0
    """Seconds that must be saved."""
    overhead: float = 0.5
    """Seconds until a helper has started."""
    share_after: float = 1.0
    """Seconds after which an attempt has shown its pace and may be split for idle workers."""
    share_gain: float = 1.0
    """Seconds that a split for idle workers must save."""
    share_wait: float = 1.0
    """Seconds to wait for the snapshots of attempts that were asked together."""
    may_repeat: bool = True
    """False: rows are not computed a second time while the process of their attempt answers."""
    stalled: float = 0.25
    """Share of its time that a slow worker's process did not get to run. Twice this share alone is proof."""


@dataclass(frozen=True)
class PaceHistory:
    """Seconds per unit of work in ended partitions, with the worker; oldest first."""

    samples: tuple[tuple[str, float], ...] = ()
    expensive: tuple[tuple[str, str, float], ...] = ()
    """Partitions whose rows seem expensive, so that their parts are not comparable: id, worker on which the partition
    was measured, and seconds per unit of work."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """Class of each worker; workers that are not in it are one class."""

    def with_expensive(self, partition: str, *, worker: str, pace: float) -> PaceHistory:
        """Return the history with one more partition that seems expensive."""
        return replace(self, expensive=(*self.expensive, (partition, worker, pace)))

    def with_ended(
        self, partition: str, worker: str, *, seconds: float, work: float, policy: StragglerPolicy
    ) -> PaceHistory:
        """Return the history after a partition has ended.

        A part of an expensive partition does not count, unless the part took the usual time on another worker. In that
        case the first worker was slow, and the rows are not expensive.
        """
        history = self
        for entry in self.expensive:
            parent, slow_worker, pace = entry
            if not partition.startswith(f"{parent}."):
                continue
            if worker == slow_worker or not history.is_usual(worker, seconds=seconds, work=work, policy=policy):
                return history
            history = replace(history, expensive=tuple(known for known in history.expensive if known != entry))
            history = history.with_sample(slow_worker, seconds=pace, work=1.0)
        return history.with_sample(worker, seconds=seconds, work=work)

    def with_sample(self, worker: str, *, seconds: float, work: float) -> PaceHistory:
        """Return the history with one more ended partition."""
        if work <= 0:
            return self
        if not self.classes:
            return replace(self, samples=(*self.samples, (worker, seconds / work))[-WINDOW:])
        kind = self.class_of(worker)
        same = [index for index, (name, _) in enumerate(self.samples) if self.class_of(name) == kind]
        oldest = same[0] if len(same) >= WINDOW else -1
        kept = (sample for index, sample in enumerate(self.samples) if index != oldest)
        return replace(self, samples=(*kept, (worker, seconds / work)))

    def class_of(self, worker: str) -> str:
        """Return the class of a worker."""
        return self.classes.get(worker, "")

    def _paces(self, worker: str) -> list[float]:
        if not self.classes:
            return [pace for _, pace in self.samples]
        kind = self.class_of(worker)
        return [pace for name, pace in self.samples if self.class_of(name) == kind]

    def is_known(self, worker: str, policy: StragglerPolicy) -> bool:
        """True if enough partitions have ended on workers of the class of ``worker`` for an expected time."""
        return len(self._paces(worker)) >= policy.samples

    def typical(self, running: Iterable[float] = (), *, worker: str = "") -> float:
        """Return the median pace of the workers of a class; if they have ended no partition, of all workers.

        :param running: seconds per unit of work so far in running partitions. Values beyond the median count, so that
            the median follows when all workers become slow.
        :param worker: a worker of the class.
        """
        ended = self._paces(worker) or [pace for _, pace in self.samples]
        middle = median(ended)
        return median([*ended, *(pace for pace in running if pace > middle)])

    def is_usual(self, worker: str, *, seconds: float, work: float, policy: StragglerPolicy) -> bool:
        """True if a partition took no longer than others on workers of this class, or if too few have ended."""
        return not self.is_known(worker, policy) or seconds <= policy.factor * work * self.typical(worker=worker)

    def spread(self, *, worker: str = "") -> float:
        """Return the robust standard deviation of the paces of the workers of a class; see `typical`."""
        ended = self._paces(worker) or [pace for _, pace in self.samples]
        middle = median(ended)
        return MAD_TO_SIGMA * median(abs(pace - middle) for pace in ended)

    def pace_of(self, worker: str) -> float:
        """Return the median pace of a worker's last partitions; if the worker has ended none, that of its class."""
        own = [pace for name, pace in self.samples if name == worker][-RECENT:]
        return median(own) if own else self.typical(worker=worker)

    def ratio(self, helper: str, worker: str) -> float:
        """Return how many times as long as ``worker`` a helper takes, by their classes.

        :returns: 1 for workers of one class; infinity while the class of one of them has ended no partition.
        """
        if self.class_of(helper) == self.class_of(worker):
            return 1.0
        if not (self._paces(helper) and self._paces(worker)):
            return math.inf
        return self.typical(worker=helper) / max(self.typical(worker=worker), 1e-12)


@dataclass(frozen=True)
class RunningAttempt:
    """Measurements of an attempt in flight."""

    key: str
    work: float
    """Units of work of the partition, in any unit."""
    rows: int
    worker: str
    """Worker on which the attempt executes; empty: the attempt has not started."""
    seconds: float
    """Seconds since the attempt started; if it has not started, since its submission."""
    snapshot: ProgressSnapshot | None = None
    """Last answer of the worker."""
    snapshot_age: float = 0.0
    """Seconds since that answer."""
    unanswered: float | None = None
    """Seconds since the unanswered question to the worker; None: no question is open."""
    split_requested: float | None = None
    """Seconds since the attempt was asked to stop at a batch boundary; None: it was not asked."""
    attempt_count: int = 1
    """Attempts at this partition in flight, including this one."""
    is_mitigated: bool = False
    """True if no further action is taken against the attempt."""

    @property
    def batch_seconds(self) -> float:
        """Seconds per batch; without a finished batch, seconds of the attempt so far."""
        snapshot = self.snapshot
        return snapshot.seconds / snapshot.batches if snapshot and snapshot.batches else self.seconds


@dataclass(frozen=True)
class Ask:
    """Ask an attempt for its progress."""

    key: str


@dataclass(frozen=True)
class Reassign:
    """Cancel an attempt that has not started, and submit it to an idle worker."""

    key: str
    workers: tuple[str, ...]


@dataclass(frozen=True)
class Backup:
    """Run a second attempt on an idle worker; the first receipt wins."""

    key: str
    workers: tuple[str, ...]
    remaining: float
    """Seconds the attempt would still take, estimated."""


@dataclass(frozen=True)
class SplitAmong:
    """Split a partition into one part for each of ``workers``.

    For `SplitReason.FROZEN` the driver splits all of the partition and abandons the attempt. Otherwise the attempt
    stops at its next batch boundary, and the rest is split.
    """

    key: str
    workers: tuple[str, ...]
    remaining: float
    """Seconds the attempt would still take, estimated."""
    reason: SplitReason
    expensive_pace: float = 0.0
    """Seconds per unit of work, if far more than usual on a worker that does not seem slow; else 0."""

    @property
    def is_by_attempt(self) -> bool:
        """True if the attempt stops at a batch boundary and leaves the rest."""
        return self.reason is not SplitReason.FROZEN


Action = Ask | Reassign | Backup | SplitAmong


def choose_actions(
    attempts: Sequence[RunningAttempt], *, idle: Sequence[str], history: PaceHistory, policy: StragglerPolicy
) -> tuple[Action, ...]:
    """Return the actions to take now.

    :param idle: workers with idle threads for which nothing waits, one entry per idle thread.
    """
    helpers = list(idle)
    actions: list[Action] = []
    shareable: list[RunningAttempt] = []
    for attempt in sorted(attempts, key=lambda attempt: (-attempt.seconds / max(attempt.work, 1e-12), attempt.key)):
        others = [name for name in helpers if name != attempt.worker]
        if not others or attempt.attempt_count > 1 or attempt.is_mitigated:
            continue
        action = _straggler_action(attempt, others, attempts, history, policy)
        if action is None:
            shareable.append(attempt)
            continue
        actions.append(action)
        for name in () if isinstance(action, Ask) else action.workers:
            helpers.remove(name)
    return (*actions, *share_remaining(shareable, helpers, history, policy)) if helpers else tuple(actions)


def limit(
    attempt: RunningAttempt, *, history: PaceHistory, policy: StragglerPolicy, running: Iterable[float] = ()
) -> float:
    """Return the seconds after which an attempt is suspected to be a straggler."""
    expected = attempt.work * history.typical(running, worker=attempt.worker)
    spread = attempt.work * history.spread(worker=attempt.worker)
    return max(expected + policy.seconds, policy.factor * expected, expected + policy.spreads * spread)


def _straggler_action(
    attempt: RunningAttempt,
    helpers: list[str],
    attempts: Sequence[RunningAttempt],
    history: PaceHistory,
    policy: StragglerPolicy,
) -> Action | None:
    """Return the action against an attempt that is far too slow; None: no action, or a split for idle workers."""
    if not attempt.worker:
        return Reassign(attempt.key, (helpers[0],)) if attempt.seconds > policy.start_timeout else None
    if not history.is_known(attempt.worker, policy) or attempt.work <= 0:
        return None
    running = [other.seconds / other.work for other in attempts if _is_comparable(other, attempt, history)]
    if attempt.seconds <= limit(attempt, history=history, policy=policy, running=running):
        return None
    is_frozen = attempt.unanswered is not None and attempt.unanswered > policy.answer_timeout
    if not is_frozen and (attempt.snapshot is None or attempt.snapshot_age > policy.stale_after):
        return Ask(attempt.key) if attempt.unanswered is None else None
    is_requested = attempt.split_requested is not None
    is_late = attempt.split_requested is not None and attempt.split_requested > _split_timeout(attempt, policy)
    if is_requested and not is_frozen and not is_late:
        return None
    snapshot = None if is_frozen else attempt.snapshot
    is_advancing = snapshot is not None and not is_late and not _is_stuck(attempt, snapshot, policy)
    if snapshot is not None and is_advancing and not is_worker_slow(attempt, snapshot, history, policy):
        return None
    helpers = sorted(helpers, key=history.pace_of)
    return _soonest(attempt, snapshot, helpers, history, policy, may_request=not is_requested)


def _is_comparable(other: RunningAttempt, attempt: RunningAttempt, history: PaceHistory) -> bool:
    is_other = bool(other.worker) and other.work > 0 and other.key != attempt.key
    return is_other and history.class_of(other.worker) == history.class_of(attempt.worker)


def _is_stuck(attempt: RunningAttempt, snapshot: ProgressSnapshot, policy: StragglerPolicy) -> bool:
    """True if the worker answers, but no batch ends."""
    since_batch = snapshot.since + attempt.snapshot_age
    return not snapshot.rows_done or since_batch > policy.seconds + 3 * attempt.batch_seconds


def _soonest(
    attempt: RunningAttempt,
    snapshot: ProgressSnapshot | None,
    helpers: list[str],
    history: PaceHistory,
    policy: StragglerPolicy,
    *,
    may_request: bool,
) -> Backup | SplitAmong | None:
    """Return the action that ends first, if it saves enough."""
    key, rows = attempt.key, attempt.rows
    done = min(1.0, snapshot.rows_done / max(1, rows)) if snapshot else 0.0
    # Guess: an attempt without progress takes as long again as it has taken so far.
    guess = max(attempt.seconds, attempt.work * history.typical(worker=attempt.worker))
    remaining = attempt.seconds * (1 - done) / done if done else guess
    options: list[tuple[float, Backup | SplitAmong]] = []
    first = helpers[:1]
    may_repeat = policy.may_repeat or snapshot is None  # a frozen process may never end
    if may_repeat:
        options.append((_seconds(attempt.work, first, history, policy), Backup(key, tuple(first), remaining)))
    takers = _fastest(helpers[: rows // SMALLEST_PART], history)
    if may_repeat and len(takers) > 1:
        split = SplitAmong(key, tuple(takers), remaining, SplitReason.FROZEN)
        options.append((_seconds(attempt.work, takers, history, policy), split))
    rest = rows - snapshot.rows_done if snapshot else 0
    takers = _fastest(helpers[: max(1, rest // SMALLEST_PART)], history)
    if done and rest >= MIN_REST_ROWS and may_request:
        # Until the attempt stops, its helpers are idle.
        seconds = attempt.batch_seconds / 2 + _seconds(attempt.work * rest / rows, takers, history, policy)
        options.append((seconds, SplitAmong(key, tuple(takers), remaining, SplitReason.SLOW)))
    if not options:
        return None
    seconds, action = min(options, key=lambda option: _cost(option[0], option[1], policy))
    return action if remaining - seconds >= max(policy.min_gain, policy.gain * remaining) else None


def _fastest(helpers: list[str], history: PaceHistory) -> list[str]:
    """Return the helpers that end equal parts first: all, or those of the fastest classes only.

    :param helpers: fastest first.
    """
    kinds = [history.class_of(name) for name in helpers]
    ends = [count for count in range(1, len(kinds)) if kinds[count] != kinds[count - 1]]
    teams = [helpers, *(helpers[:count] for count in ends)]
    return min(teams, key=lambda team: max(map(history.pace_of, team), default=0.0) / max(1, len(team)))


def _cost(seconds: float, action: Backup | SplitAmong, policy: StragglerPolicy) -> float:
    """Return the seconds of an action, plus a penalty for rows scored twice and for an abandoned attempt."""
    if isinstance(action, SplitAmong) and action.is_by_attempt:
        return seconds
    return WASTE * seconds + policy.min_gain * (2 if isinstance(action, SplitAmong) else 1)


def _seconds(work: float, helpers: Sequence[str], history: PaceHistory, policy: StragglerPolicy) -> float:
    """Return the seconds until all of ``helpers`` have done an equal part of ``work``."""
    return policy.overhead + work / len(helpers) * max(history.pace_of(name) for name in helpers)


def _split_timeout(attempt: RunningAttempt, policy: StragglerPolicy) -> float:
    return 2 * attempt.batch_seconds + policy.answer_timeout


def is_worker_slow(
    attempt: RunningAttempt, snapshot: ProgressSnapshot, history: PaceHistory, policy: StragglerPolicy
) -> bool:
    """True if the worker is slow, rather than the rows expensive."""
    stalled = snapshot.stalled_seconds / max(snapshot.seconds, 1e-9)
    if stalled > 2 * policy.stalled:
        return True
    seconds = _attempt_seconds(attempt, snapshot) if snapshot.rows_done > 0 else 0.0
    worker = attempt.worker
    if snapshot.rows_done <= 0 or history.is_usual(worker, seconds=seconds, work=attempt.work, policy=policy):
        return False
    return stalled > policy.stalled or history.pace_of(worker) > policy.factor * history.typical(worker=worker)


@dataclass
class _Team:
    """An attempt that is split for idle workers, and the workers for its remaining rows."""

    attempt: RunningAttempt
    snapshot: ProgressSnapshot
    is_slow: bool
    """True if the attempt's own worker is slow and gets no part."""
    history: PaceHistory
    helpers: list[str] = field(default_factory=list)

    @property
    def rest(self) -> int:
        """Remaining rows."""
        return self.attempt.rows - self.snapshot.rows_done

    @property
    def remaining(self) -> float:
        """Seconds the attempt would still take at its current pace."""
        return self.snapshot.seconds * self.rest / self.snapshot.rows_done - self.attempt.snapshot_age

    @property
    def workers(self) -> tuple[str, ...]:
        """Workers that score the remaining rows: without the attempt's own where that ends them sooner."""
        return self._workers(self.helpers)

    def _workers(self, helpers: Sequence[str]) -> tuple[str, ...]:
        both = (self.attempt.worker, *helpers)
        if helpers and self._share(helpers) < self._share(both):
            return tuple(helpers)
        return tuple(helpers) if self.is_slow else both

    def _share(self, workers: Sequence[str]) -> float:
        """Return the time in which ``workers`` end equal parts of the rest, relative to the attempt's own worker."""
        slowest = max((self.history.ratio(name, self.attempt.worker) for name in workers), default=1.0)
        return slowest / max(1, len(workers))

    @property
    def share(self) -> float:
        """Time for the rest with the helpers, relative to the time without."""
        return self._share(self.workers)

    def has_room(self, helper: str) -> bool:
        """True if a part is left for one more helper, and the rest ends sooner with it."""
        if helper == self.attempt.worker or len(self.workers) >= self.rest // MIN_REST_ROWS:
            return False
        is_as_fast = self.history.ratio(helper, self.attempt.worker) <= 1
        return is_as_fast or self._share(self._workers([*self.helpers, helper])) < self.share

    def gain(self, policy: StragglerPolicy) -> float:
        """Return the seconds saved."""
        until_stopped = self.attempt.batch_seconds / 2
        return self.remaining - until_stopped - policy.overhead - self.remaining * self.share


def share_remaining(
    attempts: Sequence[RunningAttempt], helpers: Sequence[str], history: PaceHistory, policy: StragglerPolicy
) -> tuple[Ask | SplitAmong, ...]:
    """Split attempts among idle workers if all attempts then end sooner at their own pace."""
    candidates = [attempt for attempt in attempts if _may_share(attempt, policy)]
    stale = [attempt for attempt in candidates if _is_stale(attempt, policy)]
    asks = tuple(Ask(attempt.key) for attempt in stale if attempt.unanswered is None)
    if asks or any(item.unanswered is not None and item.unanswered < policy.share_wait for item in stale):
        # Wait for all answers: otherwise the first attempt to answer would get all helpers.
        return asks
    teams = [
        _Team(attempt, attempt.snapshot, is_worker_slow(attempt, attempt.snapshot, history, policy), history)
        for attempt in candidates
        if attempt not in stale and attempt.snapshot is not None and attempt.snapshot.rows_done > 0
    ]
    teams = [team for team in teams if team.rest >= MIN_REST_ROWS]
    # The fastest first: a slow helper may be of use only where no fast one is.
    ordered = sorted(helpers, key=history.pace_of) if history.classes and history.samples else list(helpers)
    while teams:
        _assign(teams, ordered)
        poor = [team for team in teams if team.gain(policy) < max(policy.share_gain, policy.gain * team.remaining)]
        if not poor:
            break
        # The helpers of the team with the least gain are more useful to other teams.
        teams.remove(min(poor, key=lambda team: team.gain(policy)))
    return tuple(_split_of(team, history, policy) for team in teams)


def _may_share(attempt: RunningAttempt, policy: StragglerPolicy) -> bool:
    is_old_enough = bool(attempt.worker) and attempt.seconds >= policy.share_after
    return is_old_enough and attempt.split_requested is None and attempt.rows >= 2 * MIN_REST_ROWS


def _is_stale(attempt: RunningAttempt, policy: StragglerPolicy) -> bool:
    """True if an attempt must be asked for its progress. Without a finished batch, the next question comes sooner."""
    if attempt.snapshot is None:
        return True
    return attempt.snapshot_age > (policy.stale_after if attempt.snapshot.rows_done else policy.first_batch)


def _assign(teams: Sequence[_Team], helpers: Sequence[str]) -> None:
    """Assign each helper to the team with the most remaining time per worker."""
    for team in teams:
        team.helpers = []
    for helper in helpers:
        fitting = [team for team in teams if team.has_room(helper)]
        if fitting:
            max(fitting, key=lambda team: team.remaining * (team.share if team.workers else 2)).helpers.append(helper)


def _split_of(team: _Team, history: PaceHistory, policy: StragglerPolicy) -> SplitAmong:
    key, work = team.attempt.key, team.attempt.work
    if team.is_slow:
        return SplitAmong(key, team.workers, team.remaining, SplitReason.SLOW)
    seconds = _attempt_seconds(team.attempt, team.snapshot)
    is_usual = history.is_usual(team.attempt.worker, seconds=seconds, work=work, policy=policy)
    expensive_pace = 0.0 if is_usual else seconds / work
    return SplitAmong(key, team.workers, team.remaining, SplitReason.IDLE_WORKERS, expensive_pace)


def _attempt_seconds(attempt: RunningAttempt, snapshot: ProgressSnapshot) -> float:
    """Return the seconds the whole attempt takes at its own pace."""
    return snapshot.seconds * attempt.rows / snapshot.rows_done
