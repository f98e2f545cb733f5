"""Folders that publishing left beside a sink when it died: half of a new output, or the old one that was replaced."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import RefusedForSafety
from pipeline.jobs.directory import JobDirectory
from pipeline.sinks.guards import real_place
from pipeline.sinks.parquet import layout, swap
from pipeline.storage.local import LocalStore
from pipeline.storage.urls import is_local_path


def find_asides(directory: JobDirectory) -> tuple[Path, ...]:
    """The folders that attempts to publish any manifest of the job left, those apart that hold something else too."""
    path = directory.resolve(directory.plan.spec.sink.path)
    if not is_local_path(path):
        return ()
    place = Path(real_place(path))
    found = (aside for number in directory.manifests() for aside in _asides(place, directory.job, number))
    return tuple(aside for aside in found if _is_output(aside, job=directory.job))


def _asides(place: Path, job: str, number: int) -> list[Path]:
    return [path for path in swap.find_asides(place, job=job, number=number) if path.is_dir() and not path.is_symlink()]


def _is_output(aside: Path, *, job: str) -> bool:
    """Whether ``aside`` holds nothing but output: of this job, finished or not, or of others, whole."""
    store = LocalStore(aside)
    try:
        if layout.data_names(store, job=job):
            layout.check_replaceable(store)
    except RefusedForSafety:
        return False
    return True
