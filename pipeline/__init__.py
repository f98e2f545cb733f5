"""Batch inference jobs on Dask: every row scored, once, with proof.

The public names are loaded when they are first used, because importing Dask DataFrame takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import Job, score
    from pipeline.errors import PipelineError
    from pipeline.models.registry.client import Registry
    from pipeline.spec.job_spec import JobSpec

__version__ = "0.1.0"
__all__ = ["Job", "JobSpec", "PipelineError", "Registry", "__version__", "score"]

_HOME = {
    "Job": "pipeline.api",
    "score": "pipeline.api",
    "JobSpec": "pipeline.spec.job_spec",
    "Registry": "pipeline.models.registry.client",
    "PipelineError": "pipeline.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
