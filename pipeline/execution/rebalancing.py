"""Help for stragglers: what is measured of the attempts in flight, and how their workers are asked.

What is to be done is decided in `pipeline.stragglers`; the dispatcher does it. A worker is asked by a call into its
process, from a thread of its own here, because one that is frozen never answers.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.execution.attempts import Attempt, InFlight
from pipeline.execution.health import ClusterHealth
from pipeline.execution.stragglers import (
    Action,
    Backup,
    Cut,
    Divide,
    MitigationAction,
    PaceHistory,
    RunningAttempt,
    Share,
    StragglerPolicy,
    choose_mitigations,
)
from pipeline.execution.worker_events import ExecutionTracker
from pipeline.plan.plan import Partition
from pipeline.scoring import progress
from pipeline.scoring.progress import ProgressSnapshot

logger = logging.getLogger(__name__)
NAMES: dict[type[MitigationAction], str] = {Backup: "backup", Cut: "cut", Divide: "divide", Share: "share"}
"""As events and reports have them."""


@dataclass(frozen=True)
class ProgressAnswer:
    """A worker has said how far it is."""

    key: str
    sight: ProgressSnapshot


@dataclass(frozen=True)
class Mitigation:
    """A straggler was helped, or that help has ended: for observers."""

    partition: str
    action: str
    """``backup``, ``cut``, ``divide``, ``share``, or ``move`` for what had not begun."""
    worker: str
    """Where it was slow."""
    seconds: float
    """It had taken by then."""
    left: float
    """Seconds it would still have taken, as far as could be told."""
    is_over: bool = False
    won: bool = False
    """Whether the help came in first. Only when it is over."""
    seconds_won: float = 0.0
    """By how much, against ``left``."""


@dataclass
class _OpenMitigation:
    helped: Mitigation
    since: float
    waiting: set[str]
    """Partitions that must be done until it is over."""


@dataclass
class StragglerMitigator:
    """Looks for stragglers."""

    client: Any
    round_folder: str
    """Folder of the round, by which workers know their attempts."""
    on_mitigation: Callable[[Mitigation], None] = lambda helped: None
    patience: StragglerPolicy = field(default_factory=StragglerPolicy)
    _rates: PaceHistory = field(default_factory=PaceHistory)
    _rows: int = 1
    _bytes: int = 1
    _asked: dict[str, float] = field(default_factory=dict)
    _sights: dict[str, tuple[ProgressSnapshot, float]] = field(default_factory=dict)
    _cuts: dict[str, tuple[Cut | Share, float]] = field(default_factory=dict)
    _zombies: dict[str, float] = field(default_factory=dict)
    """Workers with an attempt that is not wanted any more, and since when, until something else begins there."""
    _rescues: dict[str, _OpenMitigation] = field(default_factory=dict)
    _helped: set[str] = field(default_factory=set)
    """Partitions that had a copy or were to be divided: what that did not help takes its time."""

    def begin(self, todo: Sequence[Partition]) -> None:
        """What is to be done in all: one unit of work is all rows, or all bytes, of it."""
        self._rows = max(1, sum(partition.rows for partition in todo))
        self._bytes = max(1, sum(partition.bytes for partition in todo))

    def work(self, partition: Partition) -> float:
        """Half of what a partition costs is in proportion to its rows (scoring), half to its bytes (reading)."""
        return partition.rows / self._rows + partition.bytes / self._bytes

    # What happens

    def started(self, worker: str) -> None:
        """Something has begun there: it has a thread again."""
        self._zombies.pop(worker, None)

    def answered(self, answer: ProgressAnswer, *, now: float) -> None:
        """A worker has answered, however late."""
        self._asked.pop(answer.key, None)
        self._sights[answer.key] = (answer.sight, now)

    def measured(self, attempt: Attempt, *, worker: str, seconds: float) -> None:
        """An attempt has brought a receipt."""
        if not attempt.is_isolated:
            self._rates = self._rates.ended(
                attempt.partition.id,
                worker,
                seconds=seconds,
                work=self.work(attempt.partition),
                patience=self.patience,
            )

    def settled(self, partition: str, *, now: float, is_by_helper: bool) -> None:
        """A partition is done.

        :param is_by_helper: by a copy of it.
        """
        for name, rescue in list(self._rescues.items()):
            if partition not in rescue.waiting:
                continue
            rescue.waiting.discard(partition)
            if not rescue.waiting:
                del self._rescues[name]
                is_whole = partition == rescue.helped.partition
                self._over(rescue, now=now, won=is_by_helper if is_whole else True)

    def _over(self, rescue: _OpenMitigation, *, now: float, won: bool) -> None:
        gain = rescue.helped.left - (now - rescue.since) if won else 0.0
        self.on_mitigation(
            Mitigation(
                **{**rescue.helped.__dict__, "is_over": True, "won": won and gain > 0, "seconds_won": max(0.0, gain)}
            )
        )

    def forget(self, key: str) -> None:
        """That attempt is over."""
        for known in (self._asked, self._sights, self._cuts):
            known.pop(key, None)

    # What to do

    def look(
        self, flight: InFlight, ledger: ExecutionTracker, watch: ClusterHealth, *, now: float
    ) -> tuple[Action, ...]:
        """What to do now, provided that nothing waits to be submitted."""
        idle = self._idle(flight, ledger, watch, now=now)
        if not idle:
            return ()
        runs = [
            self._run(future, flight, ledger, now=now) for future, one in flight.attempts.items() if not one.is_isolated
        ]
        return choose_mitigations(runs, idle=idle, rates=self._rates, patience=self.patience)

    def lost(self, flight: InFlight, ledger: ExecutionTracker, *, now: float) -> set[str]:
        """Workers to be restarted: they have not begun anything since an attempt was to end there, which may never end,
        nothing else executes on them, and something waits for a worker."""
        needed = any(
            str(future.key) not in ledger.executing and now - attempt.submitted > self.patience.begin
            for future, attempt in flight.attempts.items()
        )
        if not needed:
            return set()
        busy = ledger.busy_workers()
        found = {name for name, since in self._zombies.items() if name not in busy and now - since > self.patience.lost}
        for name in found:
            del self._zombies[name]
        return found

    def _idle(self, flight: InFlight, ledger: ExecutionTracker, watch: ClusterHealth, *, now: float) -> list[str]:
        busy = Counter(execution.worker for execution in ledger.executing.values())
        idle = [
            name
            for name, threads in watch.slots.items()
            if name not in self._zombies
            for _ in range(threads - busy[name])
        ]
        # Some wait for the rest of an attempt that was asked to stop.
        for key, (action, _) in self._cuts.items():
            execution = ledger.executing.get(key)
            for name in action.workers:
                if name in idle and (execution is None or name != execution.worker):
                    idle.remove(name)
        # What was submitted a moment ago is about to begin on some of them.
        fresh = sum(
            str(future.key) not in ledger.executing and now - attempt.submitted <= self.patience.begin
            for future, attempt in flight.attempts.items()
        )
        return sorted(idle, key=lambda name: busy[name])[: max(0, len(idle) - fresh)]

    def _run(self, future: Any, flight: InFlight, ledger: ExecutionTracker, *, now: float) -> RunningAttempt:
        key, attempt = str(future.key), flight.attempts[future]
        execution = ledger.executing.get(key)
        sight, heard = self._sights.get(key, (None, now))
        asked, cut = self._asked.get(key), self._cuts.get(key)
        return RunningAttempt(
            key=key,
            work=self.work(attempt.partition),
            rows=attempt.partition.rows,
            worker=execution.worker if execution else "",
            seconds=now - (execution.since if execution else attempt.submitted),
            sight=sight,
            sight_age=now - heard,
            unanswered=None if asked is None else now - asked,
            cut_asked=None if cut is None else now - cut[1],
            copies=len(flight.of_partition(attempt.partition.id)),
            # What ended a worker is no straggler, and is not to end two at a time.
            is_helped=attempt.partition.id in self._helped or attempt.crash_count > 0 or attempt.oom_count > 0,
        )

    def help(self, partition: Partition, action: MitigationAction, *, worker: str, seconds: float, now: float) -> None:
        """Note that ``action`` was taken."""
        helped = Mitigation(partition.id, NAMES[type(action)], worker, seconds, action.left)
        self._rescues[partition.id] = _OpenMitigation(helped, now, {partition.id})
        if isinstance(action, Cut | Share):
            self._cuts[action.key] = (action, now)
            if isinstance(action, Share) and action.expensive:
                self._rates = self._rates.with_expensive(partition.id, worker=worker, pace=action.expensive)
        else:
            self._helped.add(partition.id)
        logger.info("partition %s on %s is helped: %s", partition.id, worker, helped.action)
        self.on_mitigation(helped)

    def moved(self, partition: Partition, *, seconds: float) -> None:
        """Note that what had not begun was taken to another worker."""
        self.on_mitigation(Mitigation(partition.id, "move", "", seconds, 0.0))

    def divided(self, partition: str, parts: Sequence[Partition]) -> None:
        """``parts`` have taken the place of ``partition``: they are what its rescue waits for."""
        for rescue in self._rescues.values():
            if partition in rescue.waiting:
                rescue.waiting.discard(partition)
                rescue.waiting.update(part.id for part in parts)

    def helpers(self, key: str) -> tuple[str, ...]:
        """Workers that wait for the rest of an attempt that was asked to stop; empty when it was not."""
        return self._cuts[key][0].workers if key in self._cuts else ()

    def reason(self, key: str) -> str:
        """Why an attempt was asked to stop."""
        return "others had nothing to do" if isinstance(self._cuts[key][0], Share) else "it was slow"

    # Talking to workers

    def ask(
        self, key: str, partition: Partition, *, worker: str, put: Callable[[ProgressAnswer], None], now: float
    ) -> None:
        """Ask a worker how far it is; the answer goes to ``put``, from another thread, if it ever comes."""
        self._asked[key] = now
        self._call(
            worker,
            progress.progress_of,
            partition.id,
            then=lambda sight: put(ProgressAnswer(key, sight or ProgressSnapshot(0, 0, 0.0))),
        )

    def request_split(
        self, key: str, partition: Partition, *, worker: str, parts: int, put: Callable[[ProgressAnswer], None]
    ) -> None:
        """Ask an attempt to stop at its next batch boundary."""
        self._call(
            worker,
            progress.request_split,
            partition.id,
            parts,
            then=lambda sight: put(ProgressAnswer(key, sight)) if sight else None,
        )

    def drop(self, partition: Partition, *, worker: str, now: float) -> None:
        """Tell a worker that its attempt at ``partition`` is not wanted any more."""
        self._zombies[worker] = now
        self._call(worker, progress.request_drop, partition.id)

    def _call(
        self, worker: str, function: Callable[..., Any], *arguments: Any, then: Callable[[Any], None] | None = None
    ) -> None:
        def call() -> None:
            try:
                found = self.client.run(function, self.round_folder, *arguments, workers=[worker], on_error="ignore")
            except Exception:
                # The worker or the connection is gone, which is noticed elsewhere.
                logger.debug("%s has not answered", worker, exc_info=True)
                return
            if then is not None and worker in found:
                then(found[worker])

        threading.Thread(target=call, name="ask-a-worker", daemon=True).start()
