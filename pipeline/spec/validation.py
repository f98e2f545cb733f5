"""Pydantic's errors in the words of a person: field, line, what was found and expected, and the nearest name."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.spec.diagnostics import Document, FieldPath, Mistake, did_you_mean, dotted, shown

Words = Mapping[str, Callable[[Any], tuple[str, str]]]
"""For an error type: what gives message and next step from the value that was found."""

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


def mistakes_of(
    error: ValidationError, *, model: type[BaseModel], document: Document, words: Words | None = None
) -> list[Mistake]:
    """One `Mistake` per field that ``error`` is about.

    Alternatives of a union that did not match are folded into one mistake, and left out when one of them matched as far
    as to find something wrong inside. A field whose value is known to be wrong already is left out too.
    """
    flawed = {mistake.path for mistake in document.mistakes}
    found: dict[FieldPath, list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        path = _locate(item["loc"], document.data, is_name=item["type"] in ("missing", "extra_forbidden"))
        is_known = any(path[:stop] in flawed for stop in range(1, len(path) + 1))
        is_known |= item["type"] == "spec" and any(known[: len(path)] == path for known in flawed)
        if not is_known:
            found.setdefault(path, []).append(dict(item))
    inner = {path[:stop] for path in found for stop in range(len(path))}
    return [
        _mistake(path, items, model=model, document=document, words=words or {})
        for path, items in found.items()
        if path not in inner or not all(item["type"] in _KINDS for item in items)
    ]


def _locate(loc: tuple[str | int, ...], data: Any, *, is_name: bool) -> FieldPath:
    """The part of pydantic's location that is in the data: names of types and of alternatives are left out."""
    path: list[str | int] = []
    for position, part in enumerate(loc):
        is_item = isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data)
        if is_item or (isinstance(data, Mapping) and part in data):
            data = data[part]
        elif not is_name or position < len(loc) - 1:
            continue
        path.append(part)
    return tuple(path)


def _mistake(
    path: FieldPath, items: list[dict[str, Any]], *, model: type[BaseModel], document: Document, words: Words
) -> Mistake:
    first = items[0]
    name, kind, value, context = dotted(path), first["type"], first["input"], first.get("ctx", {})
    place = document.place_of(path)
    if kind == "missing":
        around = document.place_of(path[:-1], key=True)
        return Mistake(f"{name} is missing", around, path, expected=_describe(model, path))
    if kind == "extra_forbidden":
        return _unknown_field(path, model=model, document=document)
    if kind in words:
        message, step = words[kind](value)
        return Mistake(message, place, path, shown(value), "map: module:function, or score: {model: …}", step)
    if kind == "literal_error":
        known = tuple(ast.literal_eval(part) for part in context["expected"].replace(" or ", ", ").split(", "))
        step = did_you_mean(str(value), known)
        return Mistake(f"{name} is none of the values it can have", place, path, shown(value), ", ".join(known), step)
    if "said" in context:
        message = context["said"] if kind == "order" else f"{name} {context['said']}"
        found = "" if kind == "order" or context.get("hides") else shown(value)
        return Mistake(message, place, path, found, context["expected"], context.get("next", ""))
    expected = " or ".join(dict.fromkeys(_expected(item) for item in items))
    return Mistake(
        f"{name or document.name} has a wrong value", place, path, shown(value), expected, _quoting(value, items)
    )


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
    """Advice for a value that is right but for its quotes."""
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


def _unknown_field(path: FieldPath, *, model: type[BaseModel], document: Document) -> Mistake:
    *around, last = path
    known = [name for owner in _models_at(model, tuple(around)) for name in owner.model_fields]
    step = did_you_mean(str(last), known) or _elsewhere(str(last), model)
    place = document.place_of(path, key=True)
    expected = ", ".join(known)
    return Mistake(f"{dotted(path)} is no field of a job spec", place, path, str(last), expected, step)


def _elsewhere(name: str, model: type[BaseModel]) -> str:
    """Where in the spec a field of that name belongs."""
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
    """The types that the value at ``path`` may be of; list positions and free keys are stepped over."""
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
    """Every model class named in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        arguments = arguments[:1]
    return [model for argument in arguments for model in _models_in(argument)]


def _describe(model: type[BaseModel], path: FieldPath) -> str:
    """First sentence of what a field's description says."""
    for owner in _models_at(model, path[:-1]):
        info = owner.model_fields.get(str(path[-1]))
        if info is not None and info.description:
            return " ".join(info.description.replace("``", "").split()).split(". ")[0].rstrip(".")
    return ""
