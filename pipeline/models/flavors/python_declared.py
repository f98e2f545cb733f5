"""Features and outputs that a model in Python declares. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from pipeline.errors import ModelError
from pipeline.models.model import Feature, FeatureKind, OutputType
from pipeline.spec.model_ref import OutputKind

KINDS = get_args(FeatureKind)
OUTPUTS = get_args(OutputKind)
TYPES = ("float32", "float64", "int32", "int64", "bool", "string")
_LIST = re.compile(r"(?P<type>[a-z0-9]+)\[(?P<width>[1-9][0-9]{0,5})\]")
_FEATURES = (
    "features: a list of names, or {name: kind}, with a kind of " + ", ".join(KINDS) + " or a list of categories"
)
_OUTPUTS = (
    "outputs: a type (" + ", ".join(TYPES) + "), float32[384] for a list, {name: type} for several columns, "
    "or {kind: any of these} with the kinds " + ", ".join(OUTPUTS)
)


def declared_features(model: Any, *, where: str) -> tuple[Feature, ...]:
    """Return the features that ``model`` declares in its attribute ``features``.

    :raises ModelError: if it declares none, or in another form.
    """
    given = getattr(model, "features", None)
    if isinstance(given, Mapping) and given:
        return tuple(_feature(str(name), kind, where) for name, kind in given.items())
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) and given:
        names = [str(name) for name in given]
        if len(set(names)) == len(names):
            return tuple(Feature(name, "any") for name in names)
    raise _not_declared("features", given, _FEATURES, where)


def _feature(name: str, kind: Any, where: str) -> Feature:
    if isinstance(kind, str) and kind in KINDS and kind != "category":
        return Feature(name, cast(FeatureKind, kind))
    is_list = isinstance(kind, (list, tuple)) and len(kind) > 0 and len(set(kind)) == len(kind)
    if is_list and ({type(value) for value in kind} in ({str}, {int})):
        return Feature(name, "category", tuple(kind))
    raise _not_declared("features", {name: kind}, _FEATURES, where)


def declared_outputs(model: Any, *, where: str) -> tuple[OutputType, ...]:
    """Return the outputs that ``model`` declares in its attribute ``outputs``; a float64 without.

    :raises ModelError: for another form.
    """
    given = getattr(model, "outputs", "float64")
    if isinstance(given, Mapping) and given and set(given) <= set(OUTPUTS):
        return tuple(_output(cast(OutputKind, kind), value, where) for kind, value in given.items())
    return (_output("prediction", given, where),)


def _output(kind: OutputKind, value: Any, where: str) -> OutputType:
    if isinstance(value, str):
        if value in TYPES:
            return OutputType(kind, value, 1)
        found = _LIST.fullmatch(value)
        if found is not None and found["type"] in TYPES[:-1]:
            return OutputType(kind, found["type"], int(found["width"]), is_list=True)
    elif isinstance(value, Mapping) and value and len(set(value.values())) == 1:
        (one,) = set(value.values())
        if one in TYPES:
            return OutputType(kind, str(one), len(value), names=tuple(map(str, value)))
    raise _not_declared("outputs", value if kind == "prediction" else {kind: value}, _OUTPUTS, where)


def _not_declared(name: str, found: Any, expected: str, where: str) -> ModelError:
    return ModelError(
        f"the model does not declare its {name}" if found is None else f"the model declares its {name} in another form",
        where=where,
        found="nothing" if found is None else repr(found)[:300],
        expected=f"an attribute {expected}; columns of one step have one type",
        next_step=f"set {name} on the class, the object or the function",
    )
