"""What variables of the environment say about a job: names only; pure.

::

    PIPELINE_WORKERS=4                    the setting workers
    PIPELINE_PARAMS__DAY=2026-01-01       the parameter day
    PIPELINE_SPEC__SINK__PATH=out/        the field sink.path of the job spec
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

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
