"""Types of the fields of a job spec, and their checks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import date
from keyword import iskeyword
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from pipeline.common.secrets import written_secret
from pipeline.common.travel import PATTERN, entrypoint_of
from pipeline.common.units import parse_bytes, parse_seconds
from pipeline.errors import SpecError
from pipeline.spec.model_ref import ModelRef
from pipeline.spec.parameters import FAN_OUT_VALUE, PARAM_PATTERN

OnAliasChange = Literal["pin", "fail", "restart"]
StepChange = Literal["fail", "pin", "restart"]
KEY_PLACEHOLDER = "{}"
"""Place of the key in a listing of models."""
SHORTEST_TIMEOUT = 0.1
"""Shortest time limit of a step, in seconds: a busy machine pauses a process for so long."""
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
DATE_PATTERN = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
_ENTRYPOINT = rf"^([A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*|{PATTERN})$"


def spec_error(predicate: str, *, expected: str = "", next_step: str = "", hides: bool = False) -> PydanticCustomError:
    """Return an error about a field; pydantic adds its name before ``predicate``.

    :param hides: whether the value must not be shown, because it is a secret.
    """
    context = {"message": predicate, "expected": expected, "next": next_step, "hides": hides}
    return PydanticCustomError("spec", "{message}", context)


def _check_name(text: str) -> str:
    if text != _sample(text):
        raise spec_error(
            "cannot depend on the child",
            expected=f"a name without ${{{FAN_OUT_VALUE}}}",
            next_step="remove it: children have ids of their own",
        )
    if not re.fullmatch(NAME_PATTERN[1:-1], text):
        near = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64]
        raise spec_error(
            "is not a valid name",
            expected="lower-case letters, digits, dots, underscores and dashes; at most 64",
            next_step=f"write {near}" if near else "",
        )
    return text


def _sample(text: str) -> str:
    """Return ``text`` with a sample value in place of a fan-out's."""
    return text.replace(f"${{{FAN_OUT_VALUE}}}", "x")


def _entrypoint_text(value: Any) -> Any:
    """Return the name by which workers load a function of Python."""
    if isinstance(value, type) or not callable(value):
        if isinstance(value, type):
            raise spec_error(
                "is a class", expected="a function, or an instance with __call__", next_step=f"write {value.__name__}()"
            )
        return value
    try:
        return entrypoint_of(value)
    except SpecError as error:
        raise spec_error(
            f"cannot run on workers: {error.message}; found {error.found}",
            expected=error.expected,
            next_step=error.next_step,
        ) from error


def _check_entrypoint(text: str) -> str:
    if text != _sample(text):
        _check_entrypoint(_sample(text))
        return text
    module, _, function = text.partition(":")
    if not re.fullmatch(_ENTRYPOINT[1:-1], text) or module.endswith(".py"):
        near = module.removesuffix(".py").strip("./").replace("/", ".")
        if not function and "." in near:
            near, _, function = near.rpartition(".")
        guess = f"{near}:{function or 'function'}"
        raise spec_error(
            "does not name a function",
            expected="module:function, such as features:build",
            next_step=f"write {guess}" if re.fullmatch(_ENTRYPOINT[1:-1], guess) else "",
        )
    return text


def _check_model(text: str) -> str:
    try:
        ModelRef.parse(_sample(text))
    except SpecError as error:
        raise spec_error("is not a valid model reference", expected=error.expected) from error
    return text


def _check_model_name(text: str) -> str:
    if text.count(KEY_PLACEHOLDER) != 1:
        raise spec_error(
            "is not a listing of models",
            expected="a path or reference with {} once, in its name: models/{}.ubj, models:/churn-{}@champion",
            next_step="write {} where names differ, or list the models: {key: model, …}",
        )
    _check_model(text.replace(KEY_PLACEHOLDER, "x"))
    if ModelRef(text.replace(KEY_PLACEHOLDER, "x")).is_code:
        raise spec_error("lists models in Python", expected="models: {key: module:Class, …}")
    return text


def key_texts(value: Any) -> Any:
    """Return a mapping whose integers and booleans as keys are texts, as in a YAML file."""
    if not isinstance(value, Mapping):
        return value
    return {
        str(key).lower() if isinstance(key, bool) else str(key) if isinstance(key, int) else key: model
        for key, model in value.items()
    }


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check_path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise spec_error("is not a valid path", expected="a path or a URL")
    return text


def check_size(value: int | str) -> int | str:
    """Return ``value`` if it is a size, such as ``256 MiB`` or a number of bytes."""
    try:
        parse_bytes(value)
    except SpecError as error:
        raise spec_error("is not a valid size", expected=error.expected) from error
    return value


def check_seconds(value: float | int | str) -> float | int | str:
    """Return ``value`` if it is a duration, such as ``30 s`` or a number of seconds."""
    try:
        parse_seconds(value)
    except SpecError as error:
        raise spec_error("is not a valid duration", expected=error.expected) from error
    return value


def check_timeout(value: float | int | str) -> float | int | str:
    """Return ``value`` if it is a duration from a tenth of a second on."""
    check_seconds(value)
    if parse_seconds(value) < SHORTEST_TIMEOUT:
        raise spec_error("is too short", expected=f"at least {SHORTEST_TIMEOUT} s")
    return value


def _check_argument(name: str) -> str:
    if not name.isidentifier() or iskeyword(name):
        raise spec_error(f"is not the name of a parameter: {name!r}", expected="a name of the function's parameter")
    return name


def _check_error_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise spec_error("is not the name of an exception", expected="a class, such as ValueError or package.Error")
    return name


def _check_unique(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise spec_error(f"names a column twice: {', '.join(twice)}", expected="every column once")
    return names


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    name = written_secret(options)
    if name:
        raise spec_error(
            f"contains a secret in {name}",
            expected="a reference to it: env:NAME (a variable of the workers) or file:PATH",
            next_step=f"put it into a variable, write {name}: env:NAME, and rotate a secret that others have seen",
        )
    return options


def _check_beginning(url: str) -> str:
    if "://" not in url:
        raise spec_error("is not a URL prefix", expected="such as s3:// or s3://bucket/folder")
    return url


def _check_param(text: str) -> str:
    if not re.fullmatch(PARAM_PATTERN[1:-1], text):
        raise spec_error("is not a valid name of a parameter", expected="letters, digits and underscores; at most 64")
    return text


def _check_date(text: str) -> str:
    try:
        if re.fullmatch(DATE_PATTERN[1:-1], text):
            date.fromisoformat(text)
            return text
    except ValueError:
        pass
    raise spec_error("is not a valid date", expected="a date such as 2026-01-01")


def check_values(values: str | tuple[Value, ...]) -> str | tuple[Value, ...]:
    """Return ``values`` if none is there twice."""
    twice = isinstance(values, tuple) and sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise spec_error(f"names a value twice: {', '.join(twice)}", expected="every value once")
    return values


def _check_rounds(rounds: tuple[int, ...]) -> tuple[int, ...]:
    if len(rounds) != 2 or not 0 <= rounds[0] < rounds[1]:
        raise spec_error("is not a range of rounds", expected="best, or [begin, end] with 0 <= begin < end")
    return rounds


def _check_categories(names: tuple[str | int, ...]) -> tuple[str | int, ...]:
    if len({type(name) for name in names}) > 1:
        raise spec_error("has categories of two types", expected="texts only, or integers only")
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise spec_error(f"names a category twice: {', '.join(twice)}", expected="every category once")
    return names


JobName = Annotated[str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": NAME_PATTERN})]
Entrypoint = Annotated[
    str,
    BeforeValidator(_entrypoint_text),
    AfterValidator(_check_entrypoint),
    Field(json_schema_extra={"pattern": _ENTRYPOINT}),
]
PathText = Annotated[
    str, BeforeValidator(_path_text), AfterValidator(_check_path), Field(json_schema_extra={"minLength": 1})
]
Name = Annotated[str, Field(min_length=1)]
ArgumentName = Annotated[str, AfterValidator(_check_argument)]
ErrorName = Annotated[str, AfterValidator(_check_error_name)]
Names = Annotated[tuple[Name, ...], Field(strict=False), AfterValidator(_check_unique)]
SomeNames = Annotated[tuple[Name, ...], Field(min_length=1, strict=False), AfterValidator(_check_unique)]
UrlPrefix = Annotated[str, AfterValidator(_check_beginning)]
StorageOptions = Annotated[dict[str, Any], AfterValidator(_check_options)]
Value = bool | int | float | str
ParamName = Annotated[str, AfterValidator(_check_param), Field(min_length=1, max_length=64)]
ParamValue = Value | Annotated[tuple[Value, ...], Field(strict=False)] | None
Rounds = Annotated[tuple[int, ...], Field(strict=False), AfterValidator(_check_rounds)]
ModelText = Annotated[PathText, AfterValidator(_check_model)]
ModelListing = Annotated[PathText, AfterValidator(_check_model_name)]
KeyedModels = Annotated[dict[Name, ModelText], Field(min_length=1)]
Combine = Literal["mean", "median", "max", "min", "vote", "stack"]
COMBINATIONS = ("mean", "median", "max", "min", "vote", "stack", "or a list of weights")
Weights = Annotated[tuple[float, ...], Field(min_length=1, strict=False)]
Categories = Annotated[tuple[str | int, ...], Field(min_length=1, strict=False), AfterValidator(_check_categories)]
AnyPath = str | os.PathLike[str]
DateText = Annotated[str, AfterValidator(_check_date), Field(json_schema_extra={"pattern": DATE_PATTERN})]


class SpecModel(BaseModel):
    """Base of all parts of a spec: frozen; unknown fields are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )
