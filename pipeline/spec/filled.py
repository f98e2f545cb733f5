"""A job spec as it was written, with parameters and placeholders put in: everything but what is each child's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipeline.spec.diagnostics import Document, FieldPath
from pipeline.spec.parameters import Given, settle
from pipeline.spec.placeholders import RUN_DATE, Filling, Values
from pipeline.spec.precedence import Choice

OWN_SECTIONS = ("params", "run", "fan_out")
"""Sections that are not full of placeholders of children, whatever else is."""


@dataclass(frozen=True)
class Filled:
    """What was put into a document."""

    params: Mapping[str, Choice] = field(default_factory=dict)
    used: Mapping[FieldPath, tuple[str, ...]] = field(default_factory=dict)
    """Names of the placeholders per field."""


def today() -> str:
    """The date now, UTC, as ``2026-01-01``."""
    return f"{datetime.now(UTC):%Y-%m-%d}"


def fill_in(
    document: Document, *, given: Sequence[Given] = (), run_date: str | None = None, environ: Mapping[str, str]
) -> Filled:
    """Put parameters and placeholders into the data of ``document``; mistakes are noted in it.

    :param run_date: what ``${run.date}`` stands for, unless ``run.date`` says so; default: today, UTC.
    :raises RefusedForSafety: for a variable of the environment that looks like a secret.
    """
    data = document.data
    if not isinstance(data, dict):
        return Filled()
    date = _run_date(data) or run_date or today()
    of_defaults = _fill_defaults(document, data, Values(None, date, environ))
    params = settle(document, given)
    chosen = {name: choice.value for name, choice in params.items()}
    # Whoever is missing has been told of once; what refers to it need not be told of again.
    names = dict.fromkeys(data["params"], "") if isinstance(data.get("params"), dict) else {}
    plain = Values({**names, **chosen}, date, environ)
    template = Values({**names, **chosen}, date, environ, keeps_fan_out=bool(data.get("fan_out")))
    filling = Filling(document, plain)
    filled = {}
    for key, value in data.items():
        filling.values = plain if key in OWN_SECTIONS else template
        filled[key] = value if key in ("params", "run") else filling.fill(value, (key,))
    if isinstance(data.get("params"), dict):
        filled["params"] = {**data["params"], **chosen}
    used = {**of_defaults, **filling.used}
    if any(RUN_DATE in names for names in used.values()):
        filled["run"] = {"date": date}
    document.data = filled
    return Filled(params, used)


def _run_date(data: Mapping[str, Any]) -> str | None:
    """``run.date`` of the document. One that is no date is found out later, with all other mistakes."""
    run = data.get("run")
    date = run.get("date") if isinstance(run, Mapping) else None
    return date if isinstance(date, str) else None


def _fill_defaults(document: Document, data: dict[str, Any], values: Values) -> dict[FieldPath, tuple[str, ...]]:
    """Fill in the defaults of parameters; which placeholders each has."""
    declared = data.get("params")
    if not isinstance(declared, dict):
        return {}
    filling = Filling(document, values)
    data["params"] = {name: filling.fill(value, ("params", name)) for name, value in declared.items()}
    return filling.used
