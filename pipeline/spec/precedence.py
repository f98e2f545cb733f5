"""Where a value comes from, and which one counts when several say something. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Rank(IntEnum):
    """What may give a value, the lowest first: each wins over those before it."""

    BUILT_IN = 0
    DASK_CONFIG = 1
    """``dask.config`` under ``pipeline:``: files, and variables ``DASK_PIPELINE__…``."""
    CLUSTER_FILE = 2
    """The file of the cluster that was chosen."""
    JOB_FILE = 3
    """The job spec as it was written, also in Python."""
    ENVIRONMENT = 4
    """A variable ``PIPELINE_…``."""
    SET = 5
    """``--set`` and ``-p``, and their like in Python."""
    FLAG = 6
    """A flag of its own, such as ``--workers``, and its like in Python."""

    @property
    def words(self) -> str:
        """As people and JSON read it."""
        return _WORDS[self]


_WORDS = {
    Rank.BUILT_IN: "built-in",
    Rank.DASK_CONFIG: "dask.config",
    Rank.CLUSTER_FILE: "cluster file",
    Rank.JOB_FILE: "job file",
    Rank.ENVIRONMENT: "environment",
    Rank.SET: "-p/--set",
    Rank.FLAG: "flag",
}


@dataclass(frozen=True)
class Candidate:
    """A value that something gives."""

    value: Any
    rank: Rank
    origin: str = ""
    """Where exactly: ``job.yaml:3:9``, ``--workers``, ``PIPELINE_WORKERS``."""

    def __str__(self) -> str:
        return self.origin or self.rank.words


@dataclass(frozen=True)
class Choice:
    """The value that counts, and those it wins over."""

    value: Any
    rank: Rank
    origin: str
    over: tuple[Candidate, ...] = ()
    """The highest first."""

    def details(self) -> dict[str, Any]:
        """As JSON output shows it."""
        return {
            "value": self.value,
            "from": self.rank.words,
            "origin": self.origin,
            "over": [{"value": one.value, "from": one.rank.words, "origin": str(one)} for one in self.over],
        }


def choose(candidates: Iterable[Candidate]) -> Choice:
    """The candidate of the highest rank; of several of one rank the last.

    :raises ValueError: when there is none.
    """
    ordered = sorted(enumerate(candidates), key=lambda pair: (pair[1].rank, pair[0]), reverse=True)
    if not ordered:
        raise ValueError("nothing to choose from")
    first, *rest = (candidate for _, candidate in ordered)
    return Choice(first.value, first.rank, str(first), tuple(rest))
