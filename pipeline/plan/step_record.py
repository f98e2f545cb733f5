"""Convert resolved steps to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from pipeline.models.record import model_from_record, model_identity, model_to_record
from pipeline.plan.dask_recipe import DaskRecipe
from pipeline.plan.recipe import (
    SEVERAL,
    CheckRecipe,
    ColumnRule,
    EnsembleRecipe,
    ErrorRule,
    FilterRecipe,
    KeyedRecipe,
    MapRecipe,
    ScoreRecipe,
    SelectRecipe,
    Shadow,
    StackRecipe,
    StepRecipe,
)

_KINDS: dict[str, type[StepRecipe]] = {
    "map": MapRecipe,
    "filter": FilterRecipe,
    "select": SelectRecipe,
    "check": CheckRecipe,
    "score": ScoreRecipe,
    "ensemble": EnsembleRecipe,
    "stack": StackRecipe,
    "keyed": KeyedRecipe,
}


_POLICIES = ("on_error", "timeout", "row_timeout", "concurrency", "rows_per_call")
"""Fields of ``map`` steps that are left out while they are empty."""


def step_to_record(step: StepRecipe) -> dict[str, Any]:
    """Return a resolved step as JSON: the fields of its recipe, and its kind."""
    if isinstance(step, DaskRecipe):
        return {"step": "dask", **step.to_record()}
    kind = next(kind for kind, recipe in _KINDS.items() if isinstance(step, recipe))
    record = {"step": kind, **asdict(step)}
    if isinstance(step, MapRecipe):  # without policies as before there were some
        record = {name: value for name, value in record.items() if value or name not in _POLICIES}
    if isinstance(step, ScoreRecipe):
        record["model"] = model_to_record(step.model)
    if isinstance(step, SEVERAL):
        record["members"] = [step_to_record(member) for member in step.members]
    return record | {"frame": step.frame.hex()} if isinstance(step, MapRecipe) else record


def step_identity(step: StepRecipe) -> dict[str, Any]:
    """Return what a digest of the work holds of a step: of its model the content, not the place."""
    if isinstance(step, DaskRecipe):
        return step.identity
    record = step_to_record(step)
    if isinstance(step, ScoreRecipe):
        record["model"] = model_identity(step.model)
    if isinstance(step, SEVERAL):
        record["members"] = [step_identity(member) for member in step.members]
    return record


def step_from_record(record: Mapping[str, Any]) -> StepRecipe:
    """Inverse of `step_to_record`.

    :raises KeyError: for an unknown kind.
    """
    if record["step"] == "dask":
        return DaskRecipe.from_record(record)
    kind = _KINDS[record["step"]]
    # Fields that came later have defaults.
    values = {field.name: _as_tuple(record[field.name]) for field in fields(kind) if field.name in record}
    if kind is MapRecipe:
        values["frame"] = bytes.fromhex(record["frame"])
        values["on_error"] = tuple(ErrorRule(**rule) for rule in record.get("on_error", ()))
    if kind is SelectRecipe:
        values["columns"] = tuple((new, old) for new, old in record["columns"])
    if "rules" in values:
        values["rules"] = tuple(rule_from_record(rule) for rule in record["rules"])
    if kind in SEVERAL:
        values["members"] = tuple(step_from_record(member) for member in record["members"])
    if kind is KeyedRecipe:
        values["members"] = KeyedRecipe.shared(values["members"])
    if record.get("shadow") is not None:
        values["shadow"] = Shadow(**record["shadow"])
    if kind is ScoreRecipe:
        values["model"] = model_from_record(record["model"])
    return kind(**values)


def rule_from_record(record: Mapping[str, Any]) -> ColumnRule:
    """Return the rule whose fields ``record`` has."""
    return ColumnRule(**{name: _as_tuple(value) for name, value in record.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
