"""The job spec: its parts, parameters, YAML with line numbers, and every issue in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.common.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.spec.gate import Gate
    from pipeline.spec.job_spec import JobSpec, json_schema
    from pipeline.spec.load import LoadedSpec, load_spec
    from pipeline.spec.model_ref import ModelRef
    from pipeline.spec.parts import (
        CheckpointStep,
        ColumnContract,
        DaskInput,
        DaskStep,
        Errors,
        FanOut,
        FilterStep,
        Hook,
        Incremental,
        MapStep,
        ReportOptions,
        RunOptions,
        SelectStep,
        Source,
    )
    from pipeline.spec.score import Output, Score, ScoreStep
    from pipeline.spec.sink import Sink
    from pipeline.spec.triggers import ArrivalTrigger, Trigger

__all__ = [
    "ArrivalTrigger",
    "CheckpointStep",
    "ColumnContract",
    "DaskInput",
    "DaskStep",
    "Errors",
    "FanOut",
    "FilterStep",
    "Gate",
    "Hook",
    "Incremental",
    "JobSpec",
    "LoadedSpec",
    "MapStep",
    "ModelRef",
    "Output",
    "ReportOptions",
    "RunOptions",
    "Score",
    "ScoreStep",
    "SelectStep",
    "Sink",
    "Source",
    "Trigger",
    "json_schema",
    "load_spec",
]

__getattr__, __dir__ = lazy_face(
    "pipeline.spec",
    {
        "gate": "Gate",
        "job_spec": "JobSpec json_schema",
        "load": "LoadedSpec load_spec",
        "model_ref": "ModelRef",
        "parts": (
            "CheckpointStep ColumnContract DaskInput DaskStep Errors FanOut FilterStep Hook Incremental MapStep "
            "ReportOptions RunOptions SelectStep Source"
        ),
        "score": "Output Score ScoreStep",
        "sink": "Sink",
        "triggers": "ArrivalTrigger Trigger",
    },
)
