"""What the process that workers are forked from imports; see `pipeline.common.forkserver`."""

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
        "numba",
    ):
        # Whatever is wrong with one of them is told by the worker that needs it.
        with suppress(Exception):
            import_module(_module)
