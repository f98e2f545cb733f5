"""Score the first rows of a job's source in this process."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from threading import Thread

import pandas as pd

from pipeline.common.step_modules import restore_modules
from pipeline.common.units import plural
from pipeline.driver.prepare import draft
from pipeline.errors import SpecError
from pipeline.execution.clusters import find_cluster
from pipeline.jobs.code_archive import packed_sources
from pipeline.jobs.splits import sub_fragment
from pipeline.models.flavors import find_flavor
from pipeline.plan.plan import Partition, Plan
from pipeline.scoring.frames import score_to_frame
from pipeline.scoring.steps import prepended_sys_path
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.storage.urls import own_storage_options

logger = logging.getLogger(__name__)
_ENDINGS = {".ubj": "xgboost", ".json": "xgboost", ".onnx": "onnx", ".cbm": "catboost", ".skops": "sklearn"}
"""Flavors of models by how the names of their files end."""


def first_rows(spec: JobSpec, *, settings: Settings, rows: int) -> pd.DataFrame:
    """Return the output of the first ``rows`` rows of the source.

    :raises SpecError: for a number of rows below 1, and for a fan-out.
    :raises PipelineError: for anything that a plan of the job would raise.
    """
    if rows < 1:
        raise SpecError("a preview needs a row", found=str(rows), expected="n of at least 1")
    if spec.fan_out is not None:
        raise SpecError(
            "a fan-out has no rows of its own", where="fan_out", next_step="remove fan_out, and filter for a value"
        )
    _import_ahead(spec)
    # No cluster is connected: the rows are scored here.
    cluster = find_cluster("local", settings=settings)
    with own_storage_options(), prepended_sys_path(settings.import_paths):
        plan = draft(spec, settings=settings, cluster=cluster).plan
        recipe = plan.recipe(job=spec.name, directory="", import_paths=settings.import_paths)
        recipe = replace(recipe, functions=packed_sources(plan))
        try:
            frame = score_to_frame(recipe, _first(plan, rows), plan.versions)
        finally:
            restore_modules()
    rejected = sum(frame.attrs["reasons"].values())
    if rejected:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in frame.attrs["reasons"].items())
        logger.warning("%s of the first %d would be rejected: %s", plural(rejected, "row"), rows, reasons)
    return frame


def _import_ahead(spec: JobSpec) -> None:
    """Import the libraries of the models in a thread, while child processes read the footers and the models.

    The names of the files say which; where they do not, the library is imported when its model is loaded.
    """
    models = {str(score.model) for score in spec.scores}
    flavors = {_ENDINGS[ending] for model in models for ending in _ENDINGS if model.endswith(ending)}
    libraries = {library for flavor in flavors for library in find_flavor(flavor).libraries} - set(sys.modules)
    if libraries:
        Thread(target=_import_all, args=(sorted(libraries),), name="import-ahead", daemon=True).start()


def _import_all(libraries: list[str]) -> None:
    for library in libraries:
        with suppress(ImportError):  # whoever needs it tells how to install it
            import_module(library)


def _first(plan: Plan, rows: int) -> Partition:
    """Return a partition of the first rows of a plan."""
    files, fragments, left = {file.path: file for file in plan.files}, [], rows
    for fragment in (fragment for partition in plan.partitions for fragment in partition.fragments):
        if left <= 0:
            break
        stop = min(fragment.row_stop, fragment.row_start + left)
        fragments.append(sub_fragment(fragment, files[fragment.path], row_start=fragment.row_start, row_stop=stop))
        left -= stop - fragment.row_start
    return Partition("preview", tuple(fragments))
