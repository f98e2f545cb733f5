"""The imports of the process from which workers are forked; see `pipeline.common.forkserver`."""

from contextlib import suppress
from importlib import import_module

from pipeline.common.imports import frozen_imports, import_for_forks

with frozen_imports():
    for _module in (
        "distributed.nanny",
        "distributed.worker",
        "pipeline.execution.tasks",
        "pipeline.execution.clusters.client",
        "pipeline.sources.parquet.source",
        "pipeline.models.flavors.xgboost",
        "pipeline.models.trees.engine",
        # pyarrow imports it for its first array.
        "pandas",
    ):
        # If an import fails, the worker that needs the module reports the error.
        with suppress(Exception):
            import_module(_module)
    with suppress(Exception):
        _flavor = import_module("pipeline.models.flavors.xgboost").FLAVOR
        for _library in _flavor.libraries:
            import_for_forks(_library, without=_flavor.unneeded)
