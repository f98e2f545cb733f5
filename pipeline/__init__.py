"""Batch inference jobs on Dask: every row scored, once, with proof.

>>> import pipeline
>>> job = pipeline.Job.load("job.yaml")
>>> job
<Job churn-demo: lake/customers/ → scored/>

The public names are loaded when they are first used, because importing Dask DataFrame takes seconds. docs/python.md
describes them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api.checkpoints import checkpoint
    from pipeline.api.frames import predict, score
    from pipeline.api.job import Job
    from pipeline.api.partitions import map_partitions
    from pipeline.api.steps import dask
    from pipeline.api.stored_jobs import attach, list_jobs, publish, resume, retry, verify
    from pipeline.api.tracebacks import traceback
    from pipeline.errors import (
        BadPrediction,
        BudgetExhausted,
        Cancelled,
        ChildrenFailed,
        ConflictError,
        CorruptInput,
        DeviceLost,
        DeviceOutOfMemory,
        DiskFull,
        DriverLost,
        EndpointUnavailable,
        EnvMismatch,
        Fenced,
        GateFailed,
        InfrastructureError,
        InputChanged,
        InputError,
        InsufficientMemory,
        Interrupted,
        JobLocked,
        MissingInput,
        ModelChanged,
        ModelDigestMismatch,
        ModelError,
        NoDevice,
        NoWorkers,
        OutOfMemory,
        OutputConflict,
        OutputExists,
        PartitionFailed,
        PartitionStuck,
        PartitionTimeout,
        PipelineError,
        PlanMismatch,
        ReconciliationFailed,
        RefusedForSafety,
        SchedulerLost,
        SchedulerUnresponsive,
        SchemaDrift,
        SpecError,
        StateCorrupt,
        StepChanged,
        StepFailed,
        StorageError,
        TooManyRejects,
        UnsafeStore,
        UserCodeError,
    )
    from pipeline.events import Callback
    from pipeline.jobs.status import Status
    from pipeline.models.registry.client import Registry
    from pipeline.plan.describe import PlanSummary
    from pipeline.report.report import Report
    from pipeline.report.verify import Verification
    from pipeline.service.handle import JobHandle
    from pipeline.settings import Settings
    from pipeline.spec.budget import Budget
    from pipeline.spec.endpoint import Endpoint, Message, Prices
    from pipeline.spec.gate import Gate
    from pipeline.spec.job_spec import JobSpec
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

__version__ = "0.1.0"
__all__ = [
    "ArrivalTrigger",
    "BadPrediction",
    "Budget",
    "BudgetExhausted",
    "Callback",
    "Cancelled",
    "CheckpointStep",
    "ChildrenFailed",
    "ColumnContract",
    "ConflictError",
    "CorruptInput",
    "DaskInput",
    "DaskStep",
    "DeviceLost",
    "DeviceOutOfMemory",
    "DiskFull",
    "DriverLost",
    "Endpoint",
    "EndpointUnavailable",
    "EnvMismatch",
    "Errors",
    "FanOut",
    "Fenced",
    "FilterStep",
    "Gate",
    "GateFailed",
    "Hook",
    "Incremental",
    "InfrastructureError",
    "InputChanged",
    "InputError",
    "InsufficientMemory",
    "Interrupted",
    "Job",
    "JobHandle",
    "JobLocked",
    "JobSpec",
    "MapStep",
    "Message",
    "MissingInput",
    "ModelChanged",
    "ModelDigestMismatch",
    "ModelError",
    "NoDevice",
    "NoWorkers",
    "OutOfMemory",
    "Output",
    "OutputConflict",
    "OutputExists",
    "PartitionFailed",
    "PartitionStuck",
    "PartitionTimeout",
    "PipelineError",
    "PlanMismatch",
    "PlanSummary",
    "Prices",
    "ReconciliationFailed",
    "RefusedForSafety",
    "Registry",
    "Report",
    "ReportOptions",
    "RunOptions",
    "SchedulerLost",
    "SchedulerUnresponsive",
    "SchemaDrift",
    "Score",
    "ScoreStep",
    "SelectStep",
    "Settings",
    "Sink",
    "Source",
    "SpecError",
    "StateCorrupt",
    "Status",
    "StepChanged",
    "StepFailed",
    "StorageError",
    "TooManyRejects",
    "Trigger",
    "UnsafeStore",
    "UserCodeError",
    "Verification",
    "__version__",
    "attach",
    "checkpoint",
    "dask",
    "list_jobs",
    "map_partitions",
    "predict",
    "publish",
    "resume",
    "retry",
    "score",
    "traceback",
    "verify",
]

_HOMES = {
    "pipeline.api.checkpoints": "checkpoint",
    "pipeline.api.frames": "predict score",
    "pipeline.api.job": "Job",
    "pipeline.api.partitions": "map_partitions",
    "pipeline.api.steps": "dask",
    "pipeline.api.stored_jobs": "attach list_jobs publish resume retry verify",
    "pipeline.api.tracebacks": "traceback",
    "pipeline.events": "Callback",
    "pipeline.jobs.status": "Status",
    "pipeline.models.registry.client": "Registry",
    "pipeline.plan.describe": "PlanSummary",
    "pipeline.report.report": "Report",
    "pipeline.report.verify": "Verification",
    "pipeline.service.handle": "JobHandle",
    "pipeline.settings": "Settings",
    "pipeline.spec.budget": "Budget",
    "pipeline.spec.endpoint": "Endpoint Message Prices",
    "pipeline.spec.gate": "Gate",
    "pipeline.spec.job_spec": "JobSpec",
    "pipeline.spec.parts": (
        "CheckpointStep ColumnContract DaskInput DaskStep Errors FanOut FilterStep Hook Incremental MapStep "
        "ReportOptions RunOptions SelectStep Source"
    ),
    "pipeline.spec.score": "Output Score ScoreStep",
    "pipeline.spec.sink": "Sink",
    "pipeline.spec.triggers": "ArrivalTrigger Trigger",
}
"""Names by the module that defines them; the errors are found in `pipeline.errors`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names.split()), "pipeline.errors")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
