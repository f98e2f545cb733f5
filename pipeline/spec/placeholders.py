"""Placeholders in the texts of a job spec: ``${params.day}``, ``${run.date}``, ``${env:X}``, ``${fan_out.value}``.

A text that is nothing but one placeholder becomes the value with its type; in a longer text the value is written out.
What is put in is never looked at again. ``$${`` stands for ``${`` itself; each further dollar stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from pipeline.common.secrets import redact
from pipeline.errors import RefusedForSafety, SpecError
from pipeline.spec.diagnostics import Document, FieldPath, Mistake, did_you_mean, dotted, shown

FAN_OUT_VALUE = "fan_out.value"
RUN_DATE = "run.date"
_OPENING = re.compile(r"(\$+)\{")
_NAME = re.compile(r"[^{}]*\}")
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:SECRETS?|TOKENS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|COOKIE|DSN|SAS|JWT|"
    r"CONNECTION_STRING|(?:API|ACCESS|SECRET|PRIVATE|SIGNING|ENCRYPTION|ACCOUNT|SSH|HMAC|AUTH)_?KEYS?)(?:_|$)|^KEYS?$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Values:
    """What placeholders stand for."""

    params: Mapping[str, Any] | None = field(default_factory=dict)
    """None where parameters may not be named: in the default of one."""
    run_date: str = ""
    """``2026-01-01``, UTC."""
    environ: Mapping[str, str] = field(default_factory=dict)
    fan_out: Any = None
    """The value of a child of a fan-out; None where there is no child."""
    keeps_fan_out: bool = False
    """Whether the result is itself full of placeholders, of children to come: ``${fan_out.value}`` stays, and whatever
    else looks like a placeholder is escaped."""

    def get(self, name: str) -> Any:
        """The value of the placeholder ``${name}``.

        :raises SpecError: when it stands for nothing; its fields say found, expected and what to do.
        :raises RefusedForSafety: for a variable that looks like a secret.
        """
        kind, _, rest = name.partition(":") if name.startswith("env:") else name.partition(".")
        if kind == "env":
            return self._variable(rest)
        if kind == "params":
            return self._param(rest)
        if name == RUN_DATE and self.run_date:
            return self.run_date
        if name == FAN_OUT_VALUE and self.fan_out is not None:
            return self.fan_out
        raise self._unknown(name)

    def _param(self, name: str) -> Any:
        if self.params is None:
            raise SpecError(
                "the default of a parameter names another parameter",
                found=f"${{params.{name}}}",
                expected=f"a value, ${{{RUN_DATE}}} or ${{env:NAME}}",
                next_step="write the value out",
            )
        if name in self.params:
            return self.params[name]
        hint = did_you_mean(name, self.params)
        raise SpecError(
            "a placeholder names a parameter that is not declared",
            found=f"${{params.{name}}}",
            expected=", ".join(sorted(self.params)) or "no parameter is declared",
            next_step=hint or f"declare it: params: {{{name}: …}}",
        )

    def _variable(self, name: str) -> str:
        value = self.environ.get(name)
        if _SECRET_NAME.search(name) or (value and redact(value) != value):
            raise RefusedForSafety(
                "a secret must not be put into a job spec: what is put in is stored in the job directory",
                found=f"${{env:{name}}}",
                expected="a variable that is no secret",
                next_step=f"write the reference env:{name} where a field takes one, such as hooks; storage finds its "
                "own credentials (docs/storage.md)",
            )
        if value is None:
            raise SpecError(
                "a placeholder names a variable of the environment that is not set",
                found=f"${{env:{name}}}",
                expected=f"a variable {name} where the job is submitted",
                next_step=f"export {name}=…, or use a parameter with a default",
            )
        return value

    def _unknown(self, name: str) -> SpecError:
        known = [RUN_DATE, "env:NAME", *(f"params.{one}" for one in sorted(self.params or ()))]
        hint = did_you_mean(name, known)
        if name == FAN_OUT_VALUE:
            hint = "add fan_out: {by: …} to the job spec"
        return SpecError(
            "there is no such placeholder",
            found=f"${{{name}}}",
            expected=", ".join(known),
            next_step=hint or f"write $${{{name}}} for the text itself",
        )


def escape(text: str) -> str:
    """``text`` so that filling it in gives ``text``."""
    return _OPENING.sub(lambda found: f"${found[0]}", text)


def names_in(text: str) -> tuple[str, ...]:
    """Names of the placeholders in ``text``."""
    return tuple(part for part, is_name in _parts(text) if is_name)


def fill_text(text: str, values: Values) -> Any:
    """``text`` with its placeholders filled in; the value itself where it is nothing but one.

    :raises SpecError: for a placeholder that is not closed or stands for nothing.
    :raises RefusedForSafety: for a variable that looks like a secret.
    """
    if "${" not in text:
        return text
    parts = _parts(text)
    kept = [part for part, is_name in parts if is_name and part == FAN_OUT_VALUE and values.keeps_fan_out]
    if len(parts) == 1 and parts[0][1] and not kept:
        value = values.get(parts[0][0])
        return escape(value) if values.keeps_fan_out and isinstance(value, str) else value
    return "".join(_written(part, is_name, values) for part, is_name in parts)


def _written(part: str, is_name: bool, values: Values) -> str:
    if is_name and values.keeps_fan_out and part == FAN_OUT_VALUE:
        return f"${{{part}}}"
    text = _as_text(part, values.get(part)) if is_name else part
    return escape(text) if values.keeps_fan_out else text


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, (list, tuple, dict)):
        raise SpecError(
            "a placeholder inside of a longer text stands for no single value",
            found=f"${{{name}}} is {shown(value)}",
            expected="a text, a number, true or false",
            next_step="let the placeholder be the whole text, or give it a single value",
        )
    return str(value)


def _parts(text: str) -> list[tuple[str, bool]]:
    """Pieces of ``text``: what is written out, and names of placeholders (True)."""
    parts: list[tuple[str, bool]] = []
    literal, position = "", 0
    while found := _OPENING.search(text, position):
        literal += text[position : found.start()]
        position = found.end()
        if len(found[1]) > 1:
            literal += found[1][1:] + "{"
            continue
        name = _NAME.match(text, position)
        if name is None:
            raise SpecError(
                "a placeholder is not closed",
                found=text[found.start() : found.start() + 40],
                expected="${name}",
                next_step="close the brace, or write $${ for the text ${ itself",
            )
        if literal:
            parts.append((literal, False))
        parts.append((name[0][:-1].strip(), True))
        literal, position = "", name.end()
    literal += text[position:]
    return [*parts, (literal, False)] if literal or not parts else parts


@dataclass
class Filling:
    """Fills in a whole document, noting mistakes in it."""

    document: Document
    values: Values
    used: dict[FieldPath, tuple[str, ...]] = field(default_factory=dict)
    """Names of the placeholders per field."""

    def fill(self, value: Any, path: FieldPath = ()) -> Any:
        """``value``, which stands at ``path``, with the placeholders of every text in it filled in."""
        if isinstance(value, dict):
            return {key: self.fill(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self.fill(item, (*path, number)) for number, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, BaseModel):
            record = value.model_dump(exclude_unset=True)
            filled = self.fill(record, path)
            return value if filled == record else filled
        return self._text(value, path) if isinstance(value, str) and "${" in value else value

    def _text(self, text: str, path: FieldPath) -> Any:
        try:
            filled = fill_text(text, self.values)
            self.used[path] = names_in(text)
        except RefusedForSafety as refused:
            refused.where = f"{self.document.place_of(path)}, {dotted(path)}"
            raise
        except SpecError as error:
            self.document.mistakes.append(
                Mistake(
                    error.message,
                    self.document.place_of(path),
                    path,
                    error.found,
                    error.expected,
                    error.next_step,
                )
            )
            return text
        return filled
