"""The imports of the process from which workers are forked; see `pipeline.common.forkserver`."""

from contextlib import suppress
from importlib import import_module

from pipeline.common.imports import frozen_imports

with frozen_imports():
    for _module in (
        "distributed.nanny",
        "distributed.worker",
        "pipeline.execution.tasks",
        "pipeline.execution.clusters.client",
        "pipeline.sources.parquet.source",
        "pipeline.models.flavors.xgboost",
        "xgboost",
        "pipeline.cli",
        "pipeline.models.trees.engine",
    ):
        # If an import fails, the worker that needs the module reports the error.
        with suppress(Exception):
            import_module(_module)
