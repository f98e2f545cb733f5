"""Read the published rows of a job, from exactly the files of its last manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa

from pipeline.errors import OutputConflict, SpecError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.manifest import Manifest
from pipeline.scoring.pandas_frame import default_frame
from pipeline.sinks import find_sink, read_published
from pipeline.sources.types import empty_table
from pipeline.storage.urls import own_storage_options, use_storage_options

if TYPE_CHECKING:
    from pipeline.execution.graph import DaskFrame


@own_storage_options()
def output_frame(job: JobDirectory) -> pd.DataFrame:
    """Return the published rows of a job as a pandas DataFrame, in source order."""
    files, meta, read = _published(job)
    frames = [read(path) for path in files]
    return pd.concat(frames, ignore_index=True) if frames else meta


@own_storage_options()
def output_dask(job: JobDirectory) -> DaskFrame:
    """Return the published rows of a job as a lazy Dask DataFrame, one Dask partition per file."""
    from pipeline.execution.graph import from_files

    files, meta, read = _published(job)
    return from_files(read, files, meta=meta)


@own_storage_options()
def read_file(path: str, *, format: str, storage: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows of one published file.

    :param format: ``sink.format`` of the job spec.
    :param storage: ``storage`` of the job spec.
    """
    use_storage_options(storage)
    return default_frame(
        find_sink(format).read_file(path), next_step=f"read {path} with Arrow, which holds every value"
    )


def published_schema(job: JobDirectory) -> tuple[pa.Schema, list[str]]:
    """Return the Arrow schema of the published rows of a job, and the path or URL of each file.

    :raises SpecError: if the job has not published anything.
    :raises OutputConflict: if another job has replaced the output.
    """
    manifest = job.manifests.last()
    if manifest is None:
        raise _unpublished(job)
    return pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(manifest.schema))), _files(job, manifest)


def _unpublished(job: JobDirectory) -> SpecError:
    return SpecError(
        "the job has not published anything",
        where=job.root,
        found=str(job.status()),
        next_step=f"python -m pipeline resume {job.id}",
    )


def _published(job: JobDirectory) -> tuple[list[str], pd.DataFrame, Callable[[str], pd.DataFrame]]:
    """Return the published files, an empty frame with their columns, and a function that reads one file."""
    pairs = [(leaf, leaf.manifests.last()) for leaf in (job.children() if job.record.children else [job])]
    committed = [(leaf, manifest) for leaf, manifest in pairs if manifest is not None]
    if not committed:
        raise _unpublished(job)
    files = [path for leaf, manifest in committed for path in _files(leaf, manifest)]
    schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(committed[0][1].schema)))
    meta = default_frame(empty_table(schema), next_step="read the output with Arrow, which holds every value")
    spec = committed[0][0].plan.spec
    return files, meta, partial(read_file, format=spec.sink.format, storage=spec.storage)


def _files(job: JobDirectory, manifest: Manifest) -> list[str]:
    contents = read_published(manifest, job)
    if contents is None or contents.is_replaced:
        raise OutputConflict(
            "the output of the job was replaced" if contents else "the output of the job is not published",
            where=job.plan.spec.sink.place,
            next_step="run the job again" if contents else f"python -m pipeline resume {job.id}",
        )
    return [f"{contents.folder}/{file.name}" for file in contents.files]
