"""Finding jobs under a root of job directories."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint import JOB_FILE, JobDirectory, JobRecord
from pipeline.errors import PipelineError, SpecError
from pipeline.files import open_store
from pipeline.lifecycle import Status

logger = logging.getLogger(__name__)
LAST = "@last"
_SHOWN = 5


@dataclass(frozen=True)
class JobSummary:
    """One line of a list of jobs."""

    record: JobRecord
    status: Status
    directory: str
    children: tuple[JobSummary, ...] = ()
    """Of a fan-out."""

    def details(self) -> dict[str, Any]:
        """As JSON output shows it."""
        record = self.record
        return {
            "job": record.job,
            "name": record.name,
            "status": str(self.status),
            "created": record.created,
            "model": record.model,
            "rows": record.rows,
            "output": record.sink,
            "directory": self.directory,
            "children": [child.details() for child in self.children],
        }


def list_jobs(root: str | os.PathLike[str]) -> tuple[JobSummary, ...]:
    """All jobs under ``root``, newest first. What cannot be read as a job is logged and left out."""
    directories = _directories(root, open_store(root).list_folders())
    summaries = (_summary(one) for one in directories)
    return tuple(sorted(summaries, key=lambda one: (one.record.created, one.record.job), reverse=True))


def _summary(job: JobDirectory) -> JobSummary:
    return JobSummary(job.record, job.status(), job.root, tuple(_summary(child) for child in job.children()))


def find_job(root: str | os.PathLike[str], name: str) -> JobDirectory:
    """The job that ``name`` means: ``@last``, its id, any prefix of the id that no other job has, or the path of its
    directory. A child of a fan-out is named by what names its parent, a dot, and any prefix of the rest of its id.

    :raises SpecError: when there is none, or more than one.
    """
    if "/" in name or open_store(os.fspath(name) if name not in (LAST, "") else ".").exists(JOB_FILE):
        return JobDirectory.open(name)
    folders = open_store(root).list_folders()
    if name in folders:
        return JobDirectory.open(f"{os.fspath(root)}/{name}")
    found = _directories(root, [folder for folder in folders if name == LAST or folder.startswith(name)])
    found.sort(key=lambda one: (one.record.created, one.job), reverse=True)
    if name == LAST and found:
        return found[0]
    if len(found) == 1 and name:
        return found[0]
    if not found and (child := _find_child(root, name, folders)) is not None:
        return child
    raise _no_such_job(root, name, found, folders)


def parent_of(job: JobDirectory) -> JobDirectory:
    """The fan-out whose child ``job`` is."""
    place = job.root.rstrip("/").rpartition("/")[0].rpartition("/")[0]
    return JobDirectory.open(place, fsync=job.fsync)


def _find_child(root: str | os.PathLike[str], name: str, folders: Sequence[str]) -> JobDirectory | None:
    """The child that ``name`` means: ids have dots of their own, so that each may be the one before the child's part.

    :raises SpecError: when it begins the ids of several children.
    """
    for position in [place for place, character in enumerate(name) if character == "."]:
        before, part = name[:position], name[position + 1 :]
        parents = [one for one in folders if before == LAST or one.startswith(before)]
        if before in folders:
            parents = [before]
        found = [one for one in _directories(root, parents) if one.record.children]
        found.sort(key=lambda one: (one.record.created, one.job), reverse=True)
        if not found or (len(found) > 1 and before != LAST):
            continue
        children = found[0].children()
        exact = [child for child in children if child.job == f"{found[0].job}.{part}"]
        near = exact or [child for child in children if child.job.startswith(f"{found[0].job}.{part}")]
        if len(near) == 1:
            return near[0]
        if near:
            raise _no_such_job(root, name, near, folders)
    return None


def _directories(root: str | os.PathLike[str], folders: Sequence[str]) -> list[JobDirectory]:
    found = []
    for folder in folders:
        store = open_store(f"{os.fspath(root)}/{folder}", private=True)
        if not store.exists(JOB_FILE):
            continue
        try:
            found.append(JobDirectory.open(store.root, store=store))
        except PipelineError as error:
            logger.warning("left out %s: %s", store.root, error.message)
    return found


def _no_such_job(
    root: str | os.PathLike[str], name: str, found: Sequence[JobDirectory], folders: Sequence[str]
) -> SpecError:
    where = open_store(root).root
    if found and name:
        ids = [one.job for one in found]
        return SpecError(
            "more than one job has an id that begins like that",
            where=where,
            found=name,
            expected="one of " + ", ".join(ids[:_SHOWN]) + (" …" if len(ids) > _SHOWN else ""),
            next_step="type more of the id",
        )
    recent = [one.job for one in sorted(_directories(root, folders), key=lambda one: one.record.created, reverse=True)]
    return SpecError(
        "there is no such job" if recent else "there are no jobs yet",
        where=where,
        found=name,
        expected=f"{LAST}, a path, or one of " + ", ".join(recent[:_SHOWN]) if recent else "",
        next_step="python -m pipeline list" if recent else "python -m pipeline run job.yaml",
    )
