"""Convert model versions to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipeline.models.model import Feature, ModelFile, ModelVersion, OutputType, Promise

_OPTIONAL = ("output_types", "promise", "runs_code", "threads", "files", "endpoint")
"""Fields that came later; left out where they are unset, so that the record of an xgboost model stays what it was."""


def model_to_record(version: ModelVersion) -> dict[str, Any]:
    """Return the fields of a model version."""
    record = asdict(version)
    # Of names and lists only those that are there: they came later, too.
    record["output_types"] = [_output_record(output) for output in record["output_types"]]
    return {name: value for name, value in record.items() if name not in _OPTIONAL or value not in (None, (), [], "")}


def model_from_record(record: Mapping[str, Any]) -> ModelVersion:
    """Return the model version whose fields ``record`` has."""
    values = {name: _as_tuple(value) for name, value in record.items()}
    values["features"] = tuple(Feature(**_fields(feature)) for feature in record["features"])
    values["output_types"] = tuple(OutputType(**_fields(output)) for output in record.get("output_types", ()))
    values["files"] = tuple(ModelFile(**file) for file in record.get("files", ()))
    if record.get("promise") is not None:
        values["promise"] = Promise(**record["promise"])
    return ModelVersion(**values)


def model_identity(version: ModelVersion) -> list[Any]:
    """Return what a digest of the work holds of a model: its content, not its place."""
    chunk = version.promise.chunk if version.promise is not None else 0
    # Another chunk gives other bits.
    return [version.digest, version.flavor, version.features, *([chunk] if chunk else [])]


def _fields(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _as_tuple(value) for name, value in record.items()}


def _output_record(output: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in output.items() if name not in ("names", "is_list", "types") or value}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
