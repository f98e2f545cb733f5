"""Issues in a job spec: each with its place, and all of them in one error.

Pydantic's errors become issues with field, line, found and expected value, and the nearest valid name.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.common.secrets import redact
from pipeline.errors import SpecError
from pipeline.spec.precedence import Precedence, SettingSource

RENAMED_FIELDS = {"model_drift": "on_alias_change"}
"""Old name of each renamed field -> new name."""
RENAMED_VALUES = {"errors.files": {"reject": "quarantine"}}
"""Old value -> new value, for each field with a renamed value."""
FieldPath = tuple[str | int, ...]
"""Keys and list positions that lead to a value of a spec."""


IN_PYTHON = "the job spec"
"""Name of a document that is not a file."""


@dataclass(frozen=True, order=True)
class Place:
    """Position in a file, or a place on the command line."""

    line: int = 0
    """From 1; 0 for places without lines (a flag, a call in Python)."""
    column: int = 0
    """From 1."""
    name: str = ""
    """File, flag or field."""

    def __str__(self) -> str:
        return f"{self.name}:{self.line}:{self.column}" if self.line else self.name


@dataclass(frozen=True)
class SpecIssue:
    """One problem in a spec, and the next step."""

    message: str
    place: Place = Place()
    path: FieldPath = ()
    """The field with the problem."""
    found: str = ""
    expected: str = ""
    next_step: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the issue as JSON output shows it."""
        named = {
            "message": self.message,
            "where": str(self.place),
            "field": dotted(self.path),
            "found": self.found,
            "expected": self.expected,
            "next": self.next_step,
        }
        return {name: value for name, value in named.items() if value}

    def as_error(self) -> SpecError:
        """Return the issue as an error."""
        return SpecError(
            self.message,
            where=str(self.place),
            found=self.found,
            expected=self.expected,
            next_step=self.next_step,
        )


@dataclass
class Document:
    """A file that was read: its data, and the position of each value and key."""

    name: str
    """Name of the file in messages."""
    data: Any = None
    values: dict[FieldPath, Place] = field(default_factory=dict)
    keys: dict[FieldPath, Place] = field(default_factory=dict)
    issues: list[SpecIssue] = field(default_factory=list)
    """Issues with single values; their fields hold the text as written."""
    ranks: dict[FieldPath, Precedence] = field(default_factory=dict)
    """Source of each value that is not from the file."""
    over: dict[FieldPath, tuple[SettingSource, ...]] = field(default_factory=dict)
    """Values that such a value overrides, the last first."""

    def rank_of(self, path: FieldPath) -> Precedence:
        """Return the source of the value of a field, or of the nearest field around it."""
        known = [path[:stop] for stop in range(len(path), -1, -1) if path[:stop] in self.ranks]
        return self.ranks[known[0]] if known else Precedence.JOB_FILE

    def place_of(self, path: FieldPath, *, key: bool = False) -> Place:
        """Return the position of the value (or key) of a field, or of the nearest field around it."""
        for stop in range(len(path), -1, -1):
            places = self.keys if key and path[:stop] in self.keys else self.values
            if path[:stop] in places:
                return places[path[:stop]]
        return Place(name=self.name)


class SpecIssues(SpecError):
    """All issues of one job spec, in the order of its lines."""

    def __init__(self, issues: Sequence[SpecIssue], *, name: str) -> None:
        self.issues = tuple(sorted(issues, key=lambda issue: issue.place))
        if len(self.issues) == 1:
            only = self.issues[0]
            message, where = only.message, str(only.place)
            super().__init__(message, where=where, found=only.found, expected=only.expected, next_step=only.next_step)
        else:
            super().__init__(f"{name} has {len(self.issues)} issues", where=name)

    @property
    def kind(self) -> str:
        """Name for handlers, which does not depend on the number of issues."""
        return "SpecError"

    def to_dict(self) -> dict[str, Any]:
        """Return the error as JSON output shows it, with ``issues``."""
        return {**super().to_dict(), "issues": [issue.to_dict() for issue in self.issues]}

    def __str__(self) -> str:
        if len(self.issues) == 1:
            return super().__str__()
        return "\n\n".join([self.message, *(str(issue.as_error()) for issue in self.issues)])


def dotted(path: Iterable[str | int]) -> str:
    """Return the name of a field in messages and ``--set``: ``steps.1.score.model``."""
    return ".".join(f'"{part}"' if isinstance(part, str) and "." in part else str(part) for part in path)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean …?`` with the nearest of ``known``; empty if none is near."""
    folded = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), folded, n=1)
    return f"did you mean {folded[near[0]]}?" if near else ""


def shown(value: Any) -> str:
    """Return a value as YAML shows it, on one line of at most 80 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        text = "a mapping with " + ", ".join(str(key) for key in value) if value else "an empty mapping"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(shown(item) for item in value) + "]"
    else:
        text = str(value) or "an empty text"
    text = " ".join(redact(text).split())
    return text if len(text) <= 80 else text[:79] + "…"


Words = Mapping[str, Callable[[Any], tuple[str, str]]]
"""For an error type: function of the value that returns message and next step."""

_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of names to values",
    "model_type": "a mapping of names to values",
    "model_attributes_type": "a mapping of names to values",
    "too_short": "at least one item",
    "string_too_short": "some text",
}


def issues_of(
    error: ValidationError, *, model: type[BaseModel], document: Document, words: Words | None = None
) -> list[SpecIssue]:
    """Return one `SpecIssue` per field in ``error``.

    Alternatives of a union that did not match become one issue. They are left out if one alternative matched and has an
    issue inside. Fields with a known issue are left out, too.
    """
    flawed = {issue.path for issue in document.issues}
    by_path: dict[FieldPath, list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        path = _locate(item["loc"], document.data, is_name=item["type"] in ("missing", "extra_forbidden"))
        is_known = any(path[:stop] in flawed for stop in range(1, len(path) + 1))
        is_known |= item["type"] == "spec" and any(known[: len(path)] == path for known in flawed)
        if not is_known:
            by_path.setdefault(path, []).append(dict(item))
    inner = {path[:stop] for path in by_path for stop in range(len(path))}
    return [
        _issue(path, items, model=model, document=document, words=words or {})
        for path, items in by_path.items()
        if path not in inner or not all(item["type"] in _KINDS for item in items)
    ]


def _locate(loc: tuple[str | int, ...], data: Any, *, is_name: bool) -> FieldPath:
    """Return pydantic's location without names of types and alternatives, which are not in the data."""
    path: list[str | int] = []
    for position, part in enumerate(loc):
        is_item = isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data)
        if is_item or (isinstance(data, Mapping) and part in data):
            data = data[part]
        elif not is_name or position < len(loc) - 1:
            continue
        path.append(part)
    return tuple(path)


def _issue(
    path: FieldPath, items: list[dict[str, Any]], *, model: type[BaseModel], document: Document, words: Words
) -> SpecIssue:
    first = items[0]
    name, kind, value, context = dotted(path), first["type"], first["input"], first.get("ctx", {})
    place = document.place_of(path)
    if kind == "missing":
        around = document.place_of(path[:-1], key=True)
        return SpecIssue(f"{name} is missing", around, path, expected=_describe(model, path))
    if kind == "extra_forbidden":
        return _unknown_field(path, model=model, document=document)
    if kind in words:
        message, step = words[kind](value)
        return SpecIssue(
            message,
            place,
            path,
            shown(value),
            "map: module:function, filter: condition, select: […], or score: {model: …}",
            step,
        )
    if kind == "literal_error":
        known = tuple(ast.literal_eval(part) for part in context["expected"].replace(" or ", ", ").split(", "))
        if (new := RENAMED_VALUES.get(name, {}).get(str(value))) in known:
            message, step = f"the value {value} of {name} is now named {new}", f"write {path[-1]}: {new}"
            return SpecIssue(message, place, path, shown(value), ", ".join(known), step)
        step = did_you_mean(str(value), known)
        return SpecIssue(f"{name} is not one of the allowed values", place, path, shown(value), ", ".join(known), step)
    if "message" in context:
        message = context["message"] if kind == "order" else f"{name} {context['message']}"
        found = "" if kind == "order" or context.get("hides") else shown(value)
        return SpecIssue(message, place, path, found, context["expected"], context.get("next", ""))
    expected = " or ".join(dict.fromkeys(_expected(item) for item in items))
    return SpecIssue(f"{name or document.name} is invalid", place, path, shown(value), expected, _quoting(value, items))


def _expected(item: dict[str, Any]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    bounds = {"greater_than_equal": ("at least", "ge"), "less_than_equal": ("at most", "le")}
    if kind in bounds:
        word, key = bounds[kind]
        return f"{word} {context[key]:g}"
    if kind in _KINDS:
        return _KINDS[kind]
    text = str(item["msg"])
    return text[:1].lower() + text[1:]


def _quoting(value: Any, items: list[dict[str, Any]]) -> str:
    """Return advice for a value with quotes too many or too few."""
    kinds = {item["type"] for item in items}
    if isinstance(value, (bool, int, float)) and "string_type" in kinds:
        return f'put it in quotes: "{shown(value)}"'
    if isinstance(value, str) and kinds & {"int_type", "float_type"}:
        try:
            float(value)
        except ValueError:
            return ""
        return "leave the quotes out"
    return ""


def _unknown_field(path: FieldPath, *, model: type[BaseModel], document: Document) -> SpecIssue:
    *around, last = path
    place = document.place_of(path, key=True)
    if (new := RENAMED_FIELDS.get(str(last))) is not None:
        return SpecIssue(f"{dotted(path)} is now named {new}", place, path, str(last), new, f"rename it to {new}")
    known = [name for owner in _models_at(model, tuple(around)) for name in owner.model_fields]
    step = did_you_mean(str(last), known) or _elsewhere(str(last), model)
    expected = ", ".join(known)
    return SpecIssue(f"{dotted(path)} is not a field of a job spec", place, path, str(last), expected, step)


def _elsewhere(name: str, model: type[BaseModel]) -> str:
    """Return advice for a field that exists elsewhere in the spec."""
    for path, owner in _all_models(model, ()):
        if name in owner.model_fields and path:
            return f"it belongs under {'.'.join(path)}: indent it below"
    return ""


def _all_models(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    yield path, model
    for name, info in model.model_fields.items():
        for inner in _models_in(info.annotation):
            yield from _all_models(inner, (*path, name))


def _models_at(model: type[BaseModel], path: FieldPath) -> list[type[BaseModel]]:
    """Return the possible types of the value at ``path``, across list positions and free keys."""
    here = [model]
    for part in path:
        inner = [
            i
            for owner in here
            if part in owner.model_fields
            for i in _models_in(owner.model_fields[str(part)].annotation)
        ]
        here = inner or here
    return here


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return every model class in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        arguments = arguments[:1]
    return [model for argument in arguments for model in _models_in(argument)]


def _describe(model: type[BaseModel], path: FieldPath) -> str:
    """Return the first sentence of a field's description."""
    for owner in _models_at(model, path[:-1]):
        info = owner.model_fields.get(str(path[-1]))
        if info is not None and info.description:
            return " ".join(info.description.replace("``", "").split()).split(". ")[0].rstrip(".")
    return ""
