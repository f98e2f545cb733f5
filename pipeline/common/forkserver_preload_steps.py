"""The imports of workers that run map steps; see `pipeline.common.forkserver`."""

from contextlib import suppress
from importlib import import_module

from pipeline.common.imports import frozen_imports

with frozen_imports():
    # Steps may use all of xgboost.
    for _module in ("pipeline.scoring.step_frames", "xgboost"):
        # If the import fails, the worker that needs the module reports the error.
        with suppress(Exception):
            import_module(_module)
