"""Draw the faults of a chaos trial and their moments from the seed alone. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "kill worker",
    "kill driver",
    "kill scheduler",
    "end worker",
    "lifetime",
    "freeze worker",
    "kill nanny",
    "take over",
    "kill all workers",
    "end driver",
    "freeze scheduler",
    "interrupt driver",
]
"""Kinds of fault.

- ``end``: SIGTERM, and for a worker SIGKILL two seconds later
- ``freeze``: SIGSTOP, later SIGCONT
- ``lifetime``: each worker leaves after a few seconds and is replaced
- ``take over``: the driver is stopped, another one takes over the job and ends it, then the first one wakes
"""
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]
DRIVER_ENDS = frozenset({"kill driver", "take over", "end driver", "interrupt driver"})
"""Faults after which a driver has exited, or is stopped."""
Mark = Literal["seconds", "job", "data", "receipts", "manifest"]
"""Unit of a moment: seconds of a driver, ``job.json``, checkpoint files, receipts, manifests."""
FOREVER = 1e9
"""Seconds of a freeze that lasts until the end of the trial; the frozen process wakes after it."""
_SHORT_FREEZE = 4.0
_LONG_FREEZE = 14.0
"""Seconds: less, and more, than a scheduler may be silent in a trial."""


@dataclass(frozen=True)
class Moment:
    """The moment at which the count of a mark is reached."""

    mark: Mark
    count: float

    def __str__(self) -> str:
        if self.mark == "seconds":
            return f"after {self.count:.1f} s"
        if self.mark in ("job", "manifest"):
            return f"as soon as the {self.mark} is there"
        return f"at {self.count:.0f} {'checkpoint files' if self.mark == 'data' else self.mark}"


@dataclass(frozen=True)
class Strike:
    """One fault."""

    kind: Kind
    moment: Moment
    choice: int = 0
    """Number of the worker, modulo the number of workers."""
    seconds: float = 0.0
    """Seconds that a freeze lasts."""

    def __str__(self) -> str:
        return f"{self.kind} {self.moment}"


@dataclass(frozen=True)
class Script:
    """All faults of one trial."""

    seed: int
    strikes: tuple[Strike, ...]
    """Faults in order; each waits until the previous one has struck."""
    lifetime: float | None = None
    """Seconds after which each worker leaves."""


def draw_script(seed: int, *, partitions: int, seconds: float, cold_seconds: float) -> Script:
    """Return the script of ``seed``: one fault of each kind in turn, and up to two more.

    :param partitions: partitions of the sample.
    :param seconds: duration of a driver without faults.
    :param cold_seconds: duration of a driver on workers that have loaded nothing yet. Under ``lifetime``, workers live
        0.8 to 1.6 times as long, enough for some work.
    """
    chance = random.Random(seed)
    first = KINDS[seed % len(KINDS)]
    others: list[Kind] = [kind for kind in KINDS if kind != "lifetime"]
    kinds = [first, *(chance.choice(others) for _ in range(chance.randint(0, 2)))]
    lifetime = chance.uniform(0.8, 1.6) * cold_seconds if first == "lifetime" else None
    chance.shuffle(kinds)
    moments = sorted(
        (_draw_moment(chance, partitions=partitions, seconds=seconds) for _ in kinds),
        key=lambda moment: _ORDER.index(moment.mark) * 1000 + moment.count,
    )
    strikes = [
        Strike(kind, moment, chance.randrange(100), _draw_freeze(chance, kind))
        for kind, moment in zip(kinds, moments, strict=True)
        if kind != "lifetime"
    ]
    return Script(seed, tuple(strikes), lifetime)


_ORDER: tuple[Mark, ...] = ("seconds", "job", "data", "receipts", "manifest")


def _draw_moment(chance: random.Random, *, partitions: int, seconds: float) -> Moment:
    mark = chance.choices(_ORDER, weights=(3, 1, 4, 6, 2))[0]
    if mark == "seconds":
        return Moment(mark, chance.uniform(0.0, seconds))
    if mark in ("data", "receipts"):
        return Moment(mark, chance.randint(1, max(1, partitions)))
    return Moment(mark, 1)


def _draw_freeze(chance: random.Random, kind: Kind) -> float:
    if kind == "freeze worker":
        return chance.choice((2.0, 15.0, FOREVER))
    return chance.choice((_SHORT_FREEZE, _LONG_FREEZE)) if kind == "freeze scheduler" else 0.0
