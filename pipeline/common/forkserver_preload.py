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
        "pipeline.models.trees.engine",
        # pyarrow imports pandas for its first array, and xgboost the sparse matrices. A worker imports xgboost itself,
        # as far as it needs it: see `pipeline.common.imports.import_library`.
        "pandas",
        "scipy.sparse",
    ):
        # If an import fails, the worker that needs the module reports the error.
        with suppress(Exception):
            import_module(_module)
