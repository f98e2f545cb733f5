"""The imports of workers that run map steps; see `pipeline.common.forkserver`."""

from contextlib import suppress
from importlib import import_module

from pipeline.common.imports import frozen_imports

with frozen_imports(), suppress(Exception):
    # If the import fails, the worker that needs the module reports the error.
    import_module("pipeline.scoring.step_frames")
