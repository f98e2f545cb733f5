"""Precedence of the sources of a value, and environment variables that set one. Pure.

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
    """Sources of a value, lowest first: each wins over those before it."""

    BUILT_IN = 0
    DASK_CONFIG = 1
    """``dask.config`` under ``pipeline:``: files, and variables ``DASK_PIPELINE__…``."""
    CLUSTER_FILE = 2
    """The file of the chosen cluster."""
    JOB_FILE = 3
    """The job spec, from a file or Python."""
    ENVIRONMENT = 4
    """A variable ``PIPELINE_…``."""
    SET = 5
    """``--set`` and ``-p``, and their arguments in Python."""
    FLAG = 6
    """A flag such as ``--workers``, and its keyword in Python."""

    @property
    def words(self) -> str:
        """Name in texts and JSON."""
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
    """A value and its source."""

    value: Any
    rank: Precedence
    origin: str = ""
    """Exact place: ``job.yaml:3:9``, ``--workers``, ``PIPELINE_WORKERS``."""

    def __str__(self) -> str:
        return self.origin or self.rank.words


@dataclass(frozen=True)
class ResolvedSetting:
    """The effective value, and the values that it overrides."""

    value: Any
    rank: Precedence
    origin: str
    over: tuple[SettingSource, ...] = ()
    """The highest first."""

    def to_dict(self) -> dict[str, Any]:
        """Return the value as JSON output shows it."""
        return {
            "value": self.value,
            "from": self.rank.words,
            "origin": self.origin,
            "over": [{"value": source.value, "from": source.rank.words, "origin": str(source)} for source in self.over],
        }


def resolve_setting(candidates: Iterable[SettingSource]) -> ResolvedSetting:
    """Return the candidate of the highest rank; of several with one rank, the last.

    :raises ValueError: if there is none.
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
    """A variable that sets a value. Empty variables are ignored."""

    name: str
    """Name in the environment."""
    path: tuple[str, ...]
    """Path of the value that it sets, in lower case."""
    text: str


def param_variables(environ: Mapping[str, str]) -> tuple[Variable, ...]:
    """Return the variables that set parameters, by name."""
    return _variables(environ, PARAMS_PREFIX)


def spec_variables(environ: Mapping[str, str]) -> tuple[Variable, ...]:
    """Return the variables that set fields of the job spec, by name."""
    return _variables(environ, SPEC_PREFIX)


def setting_variables(environ: Mapping[str, str], *, known: Collection[str]) -> tuple[Variable, ...]:
    """Return the variables that set settings.

    :param known: names of settings, with underscores. Other names are ignored: they may belong to other programs.
    """
    variables = []
    for name in sorted(environ):
        setting = name.removeprefix(PREFIX).lower()
        if name.startswith(PREFIX) and setting in known and environ[name]:
            variables.append(Variable(name, (setting,), environ[name]))
    return tuple(variables)


def misspelt(environ: Mapping[str, str], *, known: Collection[str]) -> dict[str, str]:
    """Return variables that resemble the name of a setting, each with that name."""
    names = [PREFIX + name.upper() for name in known]
    near = {}
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in names and not name.startswith((PARAMS_PREFIX, SPEC_PREFIX)):
            for match in difflib.get_close_matches(name.replace("__", "_"), names, n=1, cutoff=_NEAR):
                near[name] = match
    return near


def _variables(environ: Mapping[str, str], prefix: str) -> tuple[Variable, ...]:
    return tuple(
        Variable(name, tuple(name.removeprefix(prefix).lower().split("__")), environ[name])
        for name in sorted(environ)
        if name.startswith(prefix) and environ[name]
    )
