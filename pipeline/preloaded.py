"""What the process that workers are forked from imports; see `pipeline.forks`."""

import gc
from contextlib import suppress
from importlib import import_module

for _module in (
    "distributed.nanny",
    "distributed.worker",
    "pipeline.tasks",
    "pipeline.clusters.handshake",
    "pipeline.flavors.xgboost",
    "xgboost",
    "pipeline.cli",
    "pipeline.trees.engine",
    "numba",
):
    # Whatever is wrong with one of them is told by the worker that needs it.
    with suppress(Exception):
        import_module(_module)

# What is imported stays: no worker need look through it for garbage, nor copy the memory that this would write to.
gc.collect()
gc.freeze()
