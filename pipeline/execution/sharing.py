"""Who does the rest of an attempt that would go on for seconds while workers have nothing to do. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.execution.straggler_parts import Ask, Cut, Patience, Rates, Run, Share
from pipeline.scoring.progress import SMALLEST_REST, Sight


def is_worker_slow(run: Run, sight: Sight, rates: Rates, patience: Patience) -> bool:
    """Whether what takes long is the worker rather than the rows."""
    starved = sight.starved / max(sight.seconds, 1e-9)
    if starved > 2 * patience.starved:
        return True
    if sight.rows_done <= 0 or rates.is_usual(seconds=_seconds(run, sight), work=run.work, patience=patience):
        return False
    return starved > patience.starved or rates.of(run.worker) > patience.factor * rates.typical()


@dataclass
class _Team:
    """An attempt that is shared, and who does its rest."""

    run: Run
    sight: Sight
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
        return helper != self.run.worker and len(self.workers) < self.rest // SMALLEST_REST

    def gain(self, patience: Patience) -> float:
        """Seconds that are won."""
        return self.left - self.run.batch_seconds / 2 - patience.overhead - self.left / max(1, len(self.workers))


def share(
    runs: Sequence[Run], helpers: Sequence[str], rates: Rates, patience: Patience
) -> tuple[Ask | Cut | Share, ...]:
    """Let ``helpers`` have their part of what still runs, if all would end sooner by its own pace."""
    open_ = [
        run
        for run in runs
        if run.worker and run.seconds >= patience.share and run.cut_asked is None and run.rows >= 2 * SMALLEST_REST
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
    teams = [team for team in teams if team.rest >= SMALLEST_REST]
    while teams:
        _assign(teams, helpers)
        poor = [team for team in teams if team.gain(patience) < max(patience.share_gain, patience.gain * team.left)]
        if not poor:
            break
        # Its helpers are of more use to others.
        teams.remove(min(poor, key=lambda team: team.gain(patience)))
    return tuple(_shared(team, rates, patience) for team in teams)


def _is_old(run: Run, patience: Patience) -> bool:
    """Whether an attempt has to be asked; one that had done nothing is asked again soon."""
    if run.sight is None:
        return True
    return run.sight_age > (patience.look_again if run.sight.rows_done else patience.first_batch)


def _assign(teams: Sequence[_Team], helpers: Sequence[str]) -> None:
    """Each helper goes where most is left for each."""
    for team in teams:
        team.helpers = []
    for helper in helpers:
        fitting = [team for team in teams if team.has_room(helper)]
        if fitting:
            max(fitting, key=lambda team: team.left / max(0.5, len(team.workers))).helpers.append(helper)


def _shared(team: _Team, rates: Rates, patience: Patience) -> Share | Cut:
    if team.is_slow:
        return Cut(team.run.key, team.workers, team.left)
    seconds, work = _seconds(team.run, team.sight), team.run.work
    dear = 0.0 if rates.is_usual(seconds=seconds, work=work, patience=patience) else seconds / work
    return Share(team.run.key, team.workers, team.left, dear)


def _seconds(run: Run, sight: Sight) -> float:
    """That the whole attempt will take by its own pace."""
    return sight.seconds * run.rows / sight.rows_done
