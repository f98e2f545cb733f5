"""Find type and number of the values of each kind of output. One rule for all flavors."""

from __future__ import annotations

from dataclasses import replace

from pipeline.models.model import ModelVersion, OutputType
from pipeline.spec.model_ref import OutputKind


def output_types(version: ModelVersion) -> tuple[OutputType, ...]:
    """Return the outputs that a model has, those of xgboost by its task."""
    if version.output_types:
        # An iteration range leaves trees out.
        return tuple(replace(one, width=version.trees) if one.kind == "leaf" else one for one in version.output_types)
    classes = {"binary": max(version.outputs, 1) + 1, "multiclass": version.outputs if version.outputs > 1 else 0}
    labels = {"binary": version.outputs, "multiclass": 1}
    found = (
        OutputType("prediction", "float32", version.outputs),
        OutputType("label", "int32", labels.get(version.task, 0)),
        OutputType("probabilities", "float32", _probabilities(version, classes.get(version.task, 0))),
        OutputType("margin", "float32", version.margins),
        OutputType("leaf", "int32", version.trees),
        OutputType("contributions", "float32", (len(version.features) + 1) * version.margins),
    )
    return tuple(output for output in found if output.width)


def _probabilities(version: ModelVersion, classes: int) -> int:
    """Return the number of probabilities of an xgboost model; 0 where its predictions are none, or several."""
    has_none = version.objective in ("binary:logitraw", "binary:hinge", "multi:softmax")
    return 0 if has_none or (version.task == "binary" and version.outputs > 1) else classes


def output_type(version: ModelVersion, kind: OutputKind) -> OutputType | None:
    """Return type and number of the values of ``kind``; None if the model has no such output."""
    return next((output for output in output_types(version) if output.kind == kind), None)
