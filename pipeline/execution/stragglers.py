"""What to do about a partition that runs far beyond its expected time, or on after all others. Pure: measurements in,
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
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.execution.sharing import is_worker_slow, share
from pipeline.execution.straggler_parts import Action, Ask, Backup, Cut, Divide, Move, Patience, Rates, Rescue, Run
from pipeline.scoring.progress import SMALLEST_REST, Sight

SMALLEST_PART = 512
"""Rows a part should have when a whole partition is divided anew."""
WASTE = 1.5
"""Doing rows twice must end so many times sooner than a way that does not."""


def decide(runs: Sequence[Run], *, idle: Sequence[str], rates: Rates, patience: Patience) -> tuple[Action, ...]:
    """What to do now.

    :param idle: workers with a thread for which there is nothing to do, one entry for each such thread.
    """
    helpers = list(idle)
    actions: list[Action] = []
    shared: list[Run] = []
    for run in sorted(runs, key=lambda one: (-one.seconds / max(one.work, 1e-12), one.key)):
        others = [name for name in helpers if name != run.worker]
        if not others or run.copies > 1 or run.is_helped:
            continue
        action = _decide(run, others, runs, rates, patience)
        if action is None:
            shared.append(run)
            continue
        actions.append(action)
        for name in () if isinstance(action, Ask) else action.workers:
            helpers.remove(name)
    return (*actions, *share(shared, helpers, rates, patience)) if helpers else tuple(actions)


def limit(run: Run, *, rates: Rates, patience: Patience, running: Iterable[float] = ()) -> float:
    """Seconds a partition may take before anybody wonders."""
    expected = run.work * rates.typical(running)
    spread = run.work * rates.spread()
    return max(expected + patience.seconds, patience.factor * expected, expected + patience.spreads * spread)


def _decide(
    run: Run, helpers: list[str], runs: Sequence[Run], rates: Rates, patience: Patience
) -> Ask | Move | Rescue | None:
    """What is done about one that is far too slow; None where that is nothing, or sharing it is enough."""
    if not run.worker:
        return Move(run.key, (helpers[0],)) if run.seconds > patience.begin else None
    if len(rates.samples) < patience.samples or run.work <= 0:
        return None
    running = [one.seconds / one.work for one in runs if one.worker and one.work > 0 and one.key != run.key]
    if run.seconds <= limit(run, rates=rates, patience=patience, running=running):
        return None
    is_frozen = run.unanswered is not None and run.unanswered > patience.answer
    if not is_frozen and (run.sight is None or run.sight_age > patience.look_again):
        return Ask(run.key) if run.unanswered is None else None
    is_late = run.cut_asked is not None and run.cut_asked > _patience_for_cut(run, patience)
    if run.cut_asked is not None and not is_frozen and not is_late:
        return None
    sight = None if is_frozen else run.sight
    is_moving = sight is not None and not is_late and not _is_stuck(run, sight, patience)
    if sight is not None and is_moving and not is_worker_slow(run, sight, rates, patience):
        return None
    return _rescue(run, sight, sorted(helpers, key=rates.of), rates, patience, is_asked=run.cut_asked is not None)


def _is_stuck(run: Run, sight: Sight, patience: Patience) -> bool:
    """Whether it answers, but does not get on."""
    return not sight.rows_done or sight.since + run.sight_age > patience.seconds + 3 * run.batch_seconds


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
        seconds = run.batch_seconds / 2 + _seconds(run.work * rest / run.rows, some, rates, patience)
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


def _patience_for_cut(run: Run, patience: Patience) -> float:
    return 2 * run.batch_seconds + patience.answer
