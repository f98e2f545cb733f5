"""Names that plug-ins need: sinks, sources and model formats of other distributions.

A plug-in calls `require_api` with the version it was written for. The version changes when plug-ins of the version
before would break; names that are added leave it as it is. docs/extending.md has an example.
"""

from __future__ import annotations

from pipeline.common.rows import Fragment, InputFile
from pipeline.errors import (
    ConflictError,
    CorruptInput,
    EnvMismatch,
    InputError,
    ModelError,
    OutputConflict,
    OutputExists,
    PipelineError,
    RefusedForSafety,
    SpecError,
    StateCorrupt,
    StorageError,
)
from pipeline.jobs.manifest import ManifestFile
from pipeline.models.flavors import Flavor
from pipeline.models.model import ModelVersion, Predictor
from pipeline.sinks import SinkAdapter, SinkContents, SinkRequest
from pipeline.sinks.guards import check_place
from pipeline.sinks.lock import sink_lock
from pipeline.sinks.transactional import Change, SinkJob, StagingLost, TransactionalSink
from pipeline.sources.adapter import SourceAdapter
from pipeline.sources.batch import SourceBatch
from pipeline.sources.discovery import Discovery
from pipeline.spec.parts import Source
from pipeline.spec.sink import Sink

API = 1
"""Version of these names."""

__all__ = [
    "API",
    "Change",
    "ConflictError",
    "CorruptInput",
    "Discovery",
    "Flavor",
    "Fragment",
    "InputError",
    "InputFile",
    "ManifestFile",
    "ModelError",
    "ModelVersion",
    "OutputConflict",
    "OutputExists",
    "PipelineError",
    "Predictor",
    "RefusedForSafety",
    "Sink",
    "SinkAdapter",
    "SinkContents",
    "SinkJob",
    "SinkRequest",
    "Source",
    "SourceAdapter",
    "SourceBatch",
    "SpecError",
    "StagingLost",
    "StateCorrupt",
    "StorageError",
    "TransactionalSink",
    "check_place",
    "require_api",
    "sink_lock",
]


def require_api(version: int) -> None:
    """Refuse to load a plug-in that was written for another version of this module.

    :raises EnvMismatch: if the versions differ.
    """
    if version != API:
        raise EnvMismatch(
            "a plug-in was written for another version of dask-batch-pipeline",
            where="pipeline.extend",
            found=f"API {version}",
            expected=f"API {API}",
            next_step="install the version of the plug-in for this one" if version < API else "upgrade this package",
        )
