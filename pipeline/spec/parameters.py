"""Placeholders in the texts of a job spec: ``${params.day}``, ``${run.date}``, ``${env:X}``, ``${fan_out.value}``.

A text that is nothing but one placeholder becomes the value with its type; in a longer text the value is written out.
What is put in is never looked at again. ``$${`` stands for ``${`` itself; each further dollar stands for itself.

Parameters of a job spec: what ``params:`` declares, what is given for them, and the typed values that come out.

A parameter has the type of its declared default: for a text, whatever is given on the command line is that text, ``no``
and ``010`` too; a number must be a number, a list a YAML list. Without a default (null) the value is read as YAML.

A job spec as it was written, with parameters and placeholders put in: everything but what is each child's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from pydantic import BaseModel

from pipeline.common.secrets import redact
from pipeline.errors import RefusedForSafety, SpecError
from pipeline.spec.diagnostics import Document, FieldPath, Place, SpecIssue, SpecIssues, did_you_mean, dotted, shown
from pipeline.spec.precedence import Precedence, ResolvedSetting, SettingSource, Variable, resolve_setting
from pipeline.spec.yaml import parse_text

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
    """Values of placeholders."""

    params: Mapping[str, Any] | None = field(default_factory=dict)
    """None where parameters are not allowed: in the default of a parameter."""
    run_date: str = ""
    """``2026-01-01``, UTC."""
    environ: Mapping[str, str] = field(default_factory=dict)
    fan_out: Any = None
    """Value of a child of a fan-out; None outside of children."""
    keeps_fan_out: bool = False
    """True if the result is the spec of a fan-out: ``${fan_out.value}`` stays, and other text that looks like a
    placeholder is escaped."""

    def get(self, name: str) -> Any:
        """Return the value of the placeholder ``${name}``.

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
                expected="a variable that is not a secret",
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
        known = [RUN_DATE, "env:NAME", *(f"params.{param}" for param in sorted(self.params or ()))]
        hint = did_you_mean(name, known)
        if name == FAN_OUT_VALUE:
            hint = "add fan_out: {by: …} to the job spec"
        return SpecError(
            "unknown placeholder",
            found=f"${{{name}}}",
            expected=", ".join(known),
            next_step=hint or f"write $${{{name}}} for the text itself",
        )


def escape(text: str) -> str:
    """Escape ``text``, so that rendering it gives ``text`` back."""
    return _OPENING.sub(lambda match: f"${match[0]}", text)


def names_in(text: str) -> tuple[str, ...]:
    """Return the names of the placeholders in ``text``."""
    return tuple(part for part, is_name in _parts(text) if is_name)


def render_text(text: str, values: Values) -> Any:
    """Render the placeholders of ``text``. A text that is only one placeholder becomes its value.

    :raises SpecError: for a placeholder that is not closed or stands for nothing.
    :raises RefusedForSafety: for a variable that looks like a secret.
    """
    if "${" not in text:
        return text
    parts = _parts(text)
    unrendered = [part for part, is_name in parts if is_name and part == FAN_OUT_VALUE and values.keeps_fan_out]
    if len(parts) == 1 and parts[0][1] and not unrendered:
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
            "a placeholder within a text must be a single value",
            found=f"${{{name}}} is {shown(value)}",
            expected="a text, a number, true or false",
            next_step="let the placeholder be the whole text, or give it a single value",
        )
    return str(value)


def _parts(text: str) -> list[tuple[str, bool]]:
    """Yield the pieces of ``text``: literal text (False), and names of placeholders (True)."""
    parts: list[tuple[str, bool]] = []
    literal, position = "", 0
    while match := _OPENING.search(text, position):
        literal += text[position : match.start()]
        position = match.end()
        if len(match[1]) > 1:
            literal += match[1][1:] + "{"
            continue
        name = _NAME.match(text, position)
        if name is None:
            raise SpecError(
                "a placeholder is not closed",
                found=text[match.start() : match.start() + 40],
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
class Renderer:
    """Render a document, and record issues in it."""

    document: Document
    values: Values
    used: dict[FieldPath, tuple[str, ...]] = field(default_factory=dict)
    """Names of the placeholders per field."""

    def fill(self, value: Any, path: FieldPath = ()) -> Any:
        """Return ``value``, found at ``path``, with all its texts rendered."""
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
            filled = render_text(text, self.values)
            self.used[path] = names_in(text)
        except RefusedForSafety as refused:
            refused.where = f"{self.document.place_of(path)}, {dotted(path)}"
            raise
        except SpecError as error:
            self.document.issues.append(
                SpecIssue(
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


PARAM_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[Tt ][0-9:.+Zz-]+)?")


@dataclass(frozen=True)
class GivenValues:
    """A value given for a parameter."""

    name: str
    value: Any
    origin: str
    """``-p day=2026-01-01``, a variable, or Python."""
    rank: Precedence = Precedence.SET
    is_text: bool = False
    """True if the value is a text to convert to the type of the parameter."""


def given_on_command_line(texts: Sequence[str]) -> tuple[GivenValues, ...]:
    """Return the values given with ``-p NAME=VALUE``.

    :raises SpecError: for a text of another form.
    """
    values = []
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not re.fullmatch(PARAM_PATTERN[1:-1], name.strip()):
            raise SpecError(
                "a parameter is not of the form name=value",
                where=f"-p {text}",
                expected="such as -p day=2026-01-01",
            )
        values.append(GivenValues(name.strip(), value, f"-p {text}", Precedence.SET, is_text=True))
    return tuple(values)


def given_in_python(params: Mapping[str, Any]) -> tuple[GivenValues, ...]:
    """Return the values given with ``params={...}``."""
    return tuple(GivenValues(name, value, f"params[{name!r}]") for name, value in params.items())


def given_by_environment(variables: Sequence[Variable], declared: Mapping[str, Any]) -> tuple[GivenValues, ...]:
    """Return the values given by variables; names match in any case."""
    folded = {name.lower(): name for name in declared}
    return tuple(
        GivenValues(
            folded.get("__".join(variable.path), "__".join(variable.path)),
            variable.text,
            variable.name,
            Precedence.ENVIRONMENT,
            is_text=True,
        )
        for variable in variables
    )


def resolve_parameters(document: Document, given: Sequence[GivenValues]) -> dict[str, ResolvedSetting]:
    """Return value and origin of every parameter that ``document`` declares; issues are recorded in it."""
    data = document.data if isinstance(document.data, dict) else {}
    declared = data.get("params")
    declared = declared if isinstance(declared, dict) else {}
    for item in given:
        if item.name not in declared:
            _note(document, _unknown(item, declared))
    return {
        name: choice
        for name, default in declared.items()
        if (choice := _settle_one(document, name, default, [item for item in given if item.name == name])) is not None
    }


def _settle_one(document: Document, name: str, default: Any, given: Sequence[GivenValues]) -> ResolvedSetting | None:
    path = ("params", name)
    candidates = []
    if default is not None:
        place = document.place_of(path)
        candidates.append(SettingSource(default, document.ranks.get(path, Precedence.JOB_FILE), str(place)))
    for item in given:
        try:
            candidates.append(SettingSource(convert(item, default), item.rank, item.origin))
        except SpecError as error:
            _note(document, error)
            return None
    if not candidates:
        _note(document, _missing(name, document))
        return None
    return resolve_setting(candidates)


def convert(given: GivenValues, default: Any) -> Any:
    """Convert the given value to the type of ``default``.

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
        f"the parameter {given.name} has a value of another type",
        where=given.origin,
        found=shown(value),
        expected=kinds[kind] if kind in kinds and default is not None else "one value, or a list of single values",
    )


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and any(not isinstance(item, (bool, int, float, str)) for item in value)


def _read(given: GivenValues, default: Any) -> Any:
    """Parse a text as YAML; dates stay texts."""
    text = given.value.strip()
    if not text or (default is None and _DATE.fullmatch(text)):
        return given.value
    document = parse_text(text, name=given.origin)
    for issue in document.issues:
        raise issue.as_error()
    return document.data


def _unknown(given: GivenValues, declared: Mapping[str, Any]) -> SpecError:
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
    if isinstance(error, SpecIssues):
        document.issues.extend(error.issues)
        return
    path = ("params",)
    place = Place(name=error.where)
    document.issues.append(SpecIssue(error.message, place, path, error.found, error.expected, error.next_step))


PLACEHOLDER = f"${{{FAN_OUT_VALUE}}}"


OWN_SECTIONS = ("params", "run", "fan_out")
"""Sections without placeholders of children."""


@dataclass(frozen=True)
class RenderedSpec:
    """Values that were rendered into a document."""

    params: Mapping[str, ResolvedSetting] = field(default_factory=dict)
    used: Mapping[FieldPath, tuple[str, ...]] = field(default_factory=dict)
    """Names of the placeholders per field."""


def today() -> str:
    """Return today's date, UTC, as ``2026-01-01``."""
    return f"{datetime.now(UTC):%Y-%m-%d}"


def render_spec(
    document: Document, *, given: Sequence[GivenValues] = (), run_date: str | None = None, environ: Mapping[str, str]
) -> RenderedSpec:
    """Render parameters and placeholders in the data of ``document``; issues are recorded in it.

    :param run_date: what ``${run.date}`` stands for, unless ``run.date`` says so; default: today, UTC.
    :raises RefusedForSafety: for a variable of the environment that looks like a secret.
    """
    data = document.data
    if not isinstance(data, dict):
        return RenderedSpec()
    date = _run_date(data) or run_date or today()
    of_defaults = _fill_defaults(document, data, Values(None, date, environ))
    params = resolve_parameters(document, given)
    chosen = {name: choice.value for name, choice in params.items()}
    # Whoever is missing has been told of once; what refers to it need not be told of again.
    names = dict.fromkeys(data["params"], "") if isinstance(data.get("params"), dict) else {}
    plain = Values({**names, **chosen}, date, environ)
    template = Values({**names, **chosen}, date, environ, keeps_fan_out=bool(data.get("fan_out")))
    filling = Renderer(document, plain)
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
    return RenderedSpec(params, used)


def _run_date(data: Mapping[str, Any]) -> str | None:
    """Return ``run.date`` of the document. An invalid date is reported later, with all other issues."""
    run = data.get("run")
    date = run.get("date") if isinstance(run, Mapping) else None
    return date if isinstance(date, str) else None


def _fill_defaults(document: Document, data: dict[str, Any], values: Values) -> dict[FieldPath, tuple[str, ...]]:
    """Render the defaults of parameters; return the placeholders of each."""
    declared = data.get("params")
    if not isinstance(declared, dict):
        return {}
    filling = Renderer(document, values)
    data["params"] = {name: filling.fill(value, ("params", name)) for name, value in declared.items()}
    return filling.used
