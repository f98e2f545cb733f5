"""Parameters of a job spec: what ``params:`` declares, what is given for them, and the typed values that come out.

A parameter has the type of its declared default: for a text, whatever is given on the command line is that text, ``no``
and ``010`` too; a number must be a number, a list a YAML list. Without a default (null) the value is read as YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from pipeline.errors import SpecError
from pipeline.spec.diagnostics import Document, Mistake, Place, SpecMistakes, did_you_mean, shown
from pipeline.spec.environment import Variable
from pipeline.spec.placeholders import FAN_OUT_VALUE
from pipeline.spec.precedence import Candidate, Choice, Rank, choose
from pipeline.spec.yaml import parse_text

PARAM_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[Tt ][0-9:.+Zz-]+)?")


@dataclass(frozen=True)
class Given:
    """A value that somebody gives for a parameter."""

    name: str
    value: Any
    origin: str
    """``-p day=2026-01-01``, a variable, or Python."""
    rank: Rank = Rank.SET
    is_text: bool = False
    """Whether it was typed as a text, to be read by the type of the parameter."""


def given_on_command_line(texts: Sequence[str]) -> tuple[Given, ...]:
    """What ``-p NAME=VALUE`` gives.

    :raises SpecError: for a text of another form.
    """
    found = []
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not re.fullmatch(PARAM_PATTERN[1:-1], name.strip()):
            raise SpecError(
                "a parameter is not of the form name=value",
                where=f"-p {text}",
                expected="such as -p day=2026-01-01",
            )
        found.append(Given(name.strip(), value, f"-p {text}", Rank.SET, is_text=True))
    return tuple(found)


def given_in_python(params: Mapping[str, Any]) -> tuple[Given, ...]:
    """What ``params={...}`` gives."""
    return tuple(Given(name, value, f"params[{name!r}]") for name, value in params.items())


def given_by_environment(variables: Sequence[Variable], declared: Mapping[str, Any]) -> tuple[Given, ...]:
    """What variables give, each to the parameter of that name whatever its case."""
    folded = {name.lower(): name for name in declared}
    return tuple(
        Given(folded.get("__".join(one.path), "__".join(one.path)), one.text, one.name, Rank.ENVIRONMENT, is_text=True)
        for one in variables
    )


def settle(document: Document, given: Sequence[Given]) -> dict[str, Choice]:
    """The value of every parameter that ``document`` declares, with where it is from; mistakes are noted in it."""
    data = document.data if isinstance(document.data, dict) else {}
    declared = data.get("params")
    declared = declared if isinstance(declared, dict) else {}
    for one in given:
        if one.name not in declared:
            _note(document, _unknown(one, declared))
    return {
        name: choice
        for name, default in declared.items()
        if (choice := _settle_one(document, name, default, [one for one in given if one.name == name])) is not None
    }


def _settle_one(document: Document, name: str, default: Any, given: Sequence[Given]) -> Choice | None:
    path = ("params", name)
    candidates = []
    if default is not None:
        place = document.place_of(path)
        candidates.append(Candidate(default, document.ranks.get(path, Rank.JOB_FILE), str(place)))
    for one in given:
        try:
            candidates.append(Candidate(convert(one, default), one.rank, one.origin))
        except SpecError as error:
            _note(document, error)
            return None
    if not candidates:
        _note(document, _missing(name, document))
        return None
    return choose(candidates)


def convert(given: Given, default: Any) -> Any:
    """The given value with the type of ``default``.

    :raises SpecError: when it has another type.
    """
    value = _read(given, default) if given.is_text and not isinstance(default, str) else given.value
    if isinstance(value, (date, datetime)):
        value = value.isoformat()
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    if isinstance(value, tuple):
        value = list(value)
    kind = type(default) if default is not None else type(value)
    if type(value) is kind and kind in kinds and not _is_nested(value):
        return value
    raise SpecError(
        f"the parameter {given.name} has a value of another kind",
        where=given.origin,
        found=shown(value),
        expected=kinds[kind] if kind in kinds and default is not None else "one value, or a list of single values",
    )


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and any(not isinstance(item, (bool, int, float, str)) for item in value)


def _read(given: Given, default: Any) -> Any:
    """A text as the YAML of a job spec reads it, but that a date is a text."""
    text = given.value.strip()
    if not text or (default is None and _DATE.fullmatch(text)):
        return given.value
    document = parse_text(text, name=given.origin)
    for mistake in document.mistakes:
        raise mistake.as_error()
    return document.data


def _unknown(given: Given, declared: Mapping[str, Any]) -> SpecError:
    hint = did_you_mean(given.name, declared)
    return SpecError(
        f"the job spec has no parameter {given.name}",
        where=given.origin,
        found=given.name,
        expected=", ".join(declared) or "no parameter is declared",
        next_step=hint or f"declare it in the job spec: params: {{{given.name}: …}}",
    )


def _missing(name: str, document: Document) -> SpecError:
    return SpecError(
        f"the parameter {name} has no value",
        where=str(document.place_of(("params", name), key=True)),
        expected="a value: it has no default",
        next_step=f"-p {name}=VALUE, or write a default in the job spec",
    )


def _note(document: Document, error: SpecError) -> None:
    if isinstance(error, SpecMistakes):
        document.mistakes.extend(error.mistakes)
        return
    path = ("params",)
    place = Place(name=error.where)
    document.mistakes.append(Mistake(error.message, place, path, error.found, error.expected, error.next_step))


PLACEHOLDER = f"${{{FAN_OUT_VALUE}}}"
