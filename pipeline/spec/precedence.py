"""Where a value comes from, and which one counts when several say something. Pure.

What variables of the environment say about a job: names only; pure.

::

    PIPELINE_WORKERS=4                    the setting workers
    PIPELINE_PARAMS__DAY=2026-01-01       the parameter day
    PIPELINE_SPEC__SINK__PATH=out/        the field sink.path of the job spec
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Precedence(IntEnum):
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
    Precedence.BUILT_IN: "built-in",
    Precedence.DASK_CONFIG: "dask.config",
    Precedence.CLUSTER_FILE: "cluster file",
    Precedence.JOB_FILE: "job file",
    Precedence.ENVIRONMENT: "environment",
    Precedence.SET: "-p/--set",
    Precedence.FLAG: "flag",
}


@dataclass(frozen=True)
class SettingSource:
    """A value that something gives."""

    value: Any
    rank: Precedence
    origin: str = ""
    """Where exactly: ``job.yaml:3:9``, ``--workers``, ``PIPELINE_WORKERS``."""

    def __str__(self) -> str:
        return self.origin or self.rank.words


@dataclass(frozen=True)
class ResolvedSetting:
    """The value that counts, and those it wins over."""

    value: Any
    rank: Precedence
    origin: str
    over: tuple[SettingSource, ...] = ()
    """The highest first."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON output shows it."""
        return {
            "value": self.value,
            "from": self.rank.words,
            "origin": self.origin,
            "over": [{"value": one.value, "from": one.rank.words, "origin": str(one)} for one in self.over],
        }


def resolve_setting(candidates: Iterable[SettingSource]) -> ResolvedSetting:
    """The candidate of the highest rank; of several of one rank the last.

    :raises ValueError: when there is none.
    """
    ordered = sorted(enumerate(candidates), key=lambda pair: (pair[1].rank, pair[0]), reverse=True)
    if not ordered:
        raise ValueError("nothing to choose from")
    first, *rest = (candidate for _, candidate in ordered)
    return ResolvedSetting(first.value, first.rank, str(first), tuple(rest))


PREFIX = "PIPELINE_"
PARAMS_PREFIX = "PIPELINE_PARAMS__"
SPEC_PREFIX = "PIPELINE_SPEC__"
_NEAR = 0.85


@dataclass(frozen=True)
class Variable:
    """One variable that says something; one that is empty says nothing."""

    name: str
    """As it is in the environment."""
    path: tuple[str, ...]
    """What it is about, in lower case."""
    text: str


def param_variables(environ: Mapping[str, str]) -> tuple[Variable, ...]:
    """Those that give parameters, by name."""
    return _variables(environ, PARAMS_PREFIX)


def spec_variables(environ: Mapping[str, str]) -> tuple[Variable, ...]:
    """Those that give fields of the job spec, by name."""
    return _variables(environ, SPEC_PREFIX)


def setting_variables(environ: Mapping[str, str], *, known: Collection[str]) -> tuple[Variable, ...]:
    """Those that give settings.

    :param known: names of settings, with underscores. Other programs have variables that begin alike: what is no
        setting is passed over.
    """
    found = []
    for name in sorted(environ):
        setting = name.removeprefix(PREFIX).lower()
        if name.startswith(PREFIX) and setting in known and environ[name]:
            found.append(Variable(name, (setting,), environ[name]))
    return tuple(found)


def misspelt(environ: Mapping[str, str], *, known: Collection[str]) -> dict[str, str]:
    """Variables that are nearly those of settings, each with the one that was meant."""
    names = [PREFIX + name.upper() for name in known]
    near = {}
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in names and not name.startswith((PARAMS_PREFIX, SPEC_PREFIX)):
            for one in difflib.get_close_matches(name.replace("__", "_"), names, n=1, cutoff=_NEAR):
                near[name] = one
    return near


def _variables(environ: Mapping[str, str], prefix: str) -> tuple[Variable, ...]:
    return tuple(
        Variable(name, tuple(name.removeprefix(prefix).lower().split("__")), environ[name])
        for name in sorted(environ)
        if name.startswith(prefix) and environ[name]
    )
