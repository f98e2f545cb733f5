"""Find jobs under a root of job directories."""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from pipeline.errors import PipelineError, SpecError
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.record import JobRecord, child_id
from pipeline.jobs.stages import stage_states
from pipeline.jobs.status import Status
from pipeline.storage.store import open_store
from pipeline.storage.urls import is_local_path, with_storage_options

logger = logging.getLogger(__name__)
LAST = "@last"
_SHOWN = 5
_READERS = 32
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class JobSummary:
    """One line of a list of jobs."""

    record: JobRecord
    status: Status
    directory: str
    children: tuple[JobSummary, ...] = ()
    """Children of a fan-out."""
    done: int = 0
    """Number of partitions that have a receipt; for a successful job, all."""
    planned: int = 0
    """Number of planned partitions; estimated for stages that are not planned yet."""

    def to_dict(self, *, now: datetime) -> dict[str, Any]:
        """The summary as JSON output shows it.

        :param now: UTC.
        """
        record = self.record
        return {
            "job": record.job,
            "name": record.name,
            "status": str(self.status),
            "created": record.created,
            "age": self.age(now),
            "partitions": {"done": self.done, "planned": self.planned},
            "model": record.model,
            "rows": record.rows,
            "output": record.sink,
            "directory": self.directory,
            "children": [child.to_dict(now=now) for child in self.children],
        }

    def age(self, now: datetime) -> float:
        """Return the seconds since the job was created; 0 if unknown."""
        try:
            return max(0.0, (now - datetime.fromisoformat(self.record.created)).total_seconds())
        except (ValueError, TypeError):
            return 0.0


def list_jobs(
    root: str | os.PathLike[str],
    *,
    name: str = "",
    statuses: Collection[Status] = (),
    limit: int | None = None,
    since: str = "",
) -> tuple[JobSummary, ...]:
    """Return the jobs under ``root``, newest first. A directory that cannot be read as a job is logged and left out.

    There is no index that could be wrong. The record of every job is read: 2,000 in half a second on a local disk.
    Events are read only of jobs that may be shown.

    :param name: Pattern such as ``churn-*`` for the name in the job spec, or for the id. Empty: all.
    :param statuses: Statuses to select. Empty: all.
    :param limit: Maximum number of jobs.
    :param since: Only jobs that were made at this time or later, UTC, ISO 8601. Empty: all.
    """
    jobs = [job for job in _directories(root, _folders(root)) if not name or _has_name(job.record, name)]
    jobs = [job for job in jobs if job.record.created >= since]
    jobs.sort(key=lambda job: (job.record.created, job.record.job), reverse=True)
    summaries: list[JobSummary] = []
    # Read in pieces: with a limit alone, no more of thousands of jobs than will be shown.
    size = len(jobs) if limit is None or statuses else max(1, limit)
    for start in range(0, len(jobs), max(1, size)):
        batch = read_each(root, _summary, jobs[start : start + size])
        summaries += [job for job in batch if not statuses or job.status in statuses]
        if limit is not None and len(summaries) >= limit:
            break
    return tuple(summaries[:limit])


def _has_name(record: JobRecord, pattern: str) -> bool:
    return fnmatch.fnmatchcase(record.name, pattern) or fnmatch.fnmatchcase(record.job, pattern)


def _summary(job: JobDirectory) -> JobSummary:
    status, children = job.status(), tuple(_summary(child) for child in job.children())
    if job.record.stages:
        return _summary_of_stages(job, status)
    if status.is_success:
        done = job.record.partitions
    elif children:
        done = sum(child.done for child in children)
    else:
        done = len(job.store.list(layout.receipts_folder(0)))
    planned = job.record.partitions
    return JobSummary(job.record, status, job.root, children, min(done, planned), planned)


def _summary_of_stages(job: JobDirectory, status: Status) -> JobSummary:
    stages = [state.job for state in stage_states(job) if state.job is not None]
    planned = [stage.record.partitions for stage in stages]
    done = [len(stage.store.list(layout.receipts_folder(0))) for stage in stages]
    later = sum(stage.partitions for stage in job.plan.stages[len(stages) :])
    return JobSummary(job.record, status, job.root, (), sum(map(min, done, planned)), sum(planned) + later)


def read_each(root: str | os.PathLike[str], call: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """Return the result of ``call`` for each item, in order; called in parallel if each makes requests to a service."""
    if is_local_path(os.fspath(root)):
        return [call(item) for item in items]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(with_storage_options(call), items))


def _folders(root: str | os.PathLike[str]) -> list[str]:
    """Return folders that may be jobs. Folders of servers and submissions begin with a dot."""
    return [name for name in open_store(root).list_folders() if not name.startswith(".")]


def job_ids(root: str | os.PathLike[str]) -> list[str]:
    """Return names of folders that may be jobs under ``root``, in reverse order; nothing in them is read."""
    return sorted(_folders(root), reverse=True)


def find_job(root: str | os.PathLike[str], name: str) -> JobDirectory:
    """Return the job that ``name`` means.

    ``name`` is ``@last``, an id, a prefix of one id only, or the path of a job directory. For a child of a fan-out:
    the id of its parent, a prefix of that id, or ``@last``, then a dot and a prefix of the rest of the child's id.

    :raises SpecError: when no job matches, or more than one.
    """
    if "/" in name or open_store(os.fspath(name) if name not in (LAST, "") else ".").exists(layout.JOB_FILE):
        return JobDirectory.open(name)
    folders = _folders(root)
    if name in folders:
        return JobDirectory.open(f"{os.fspath(root)}/{name}")
    jobs = _directories(root, [folder for folder in folders if name == LAST or folder.startswith(name)])
    jobs.sort(key=lambda job: (job.record.created, job.id), reverse=True)
    if name == LAST and jobs:
        return jobs[0]
    if len(jobs) == 1 and name:
        return jobs[0]
    if not jobs and (child := _find_child(root, name, folders)) is not None:
        return child
    raise _no_such_job(root, name, jobs, folders)


def previous_job(job: JobDirectory) -> JobDirectory | None:
    """Return the newest job of the same name that was made before ``job`` and succeeded; None without one.

    Of a child of a fan-out: the child with the same value, of the newest such fan-out. A stage has none.
    """
    if job.record.stage:
        return None
    if job.record.parent:
        before = previous_job(parent_of(job))
        wanted = child_id(before.id, job.id.removeprefix(child_id(job.record.parent, ""))) if before else ""
        return next((child for child in before.children() if child.id == wanted), None) if before else None
    root = job.root.rpartition("/")[0]
    done = [Status.SUCCEEDED, Status.SUCCEEDED_WITH_WARNINGS]
    for summary in list_jobs(root, name=job.record.name, statuses=done):
        if summary.record.job != job.id and summary.record.created <= job.record.created:
            return find_job(root, summary.record.job)
    return None


def parent_of(job: JobDirectory) -> JobDirectory:
    """Return the fan-out whose child ``job`` is."""
    root = job.root.rstrip("/").rpartition("/")[0].rpartition("/")[0]
    return JobDirectory.open(root, fsync=job.fsync)


def _find_child(root: str | os.PathLike[str], name: str, folders: Sequence[str]) -> JobDirectory | None:
    """Return the child that ``name`` means. Ids may contain dots, so each dot may be the one before the child's part.

    :raises SpecError: when ``name`` begins the ids of several children.
    """
    for position in [index for index, character in enumerate(name) if character == "."]:
        before, part = name[:position], name[position + 1 :]
        parents = [folder for folder in folders if before == LAST or folder.startswith(before)]
        if before in folders:
            parents = [before]
        fan_outs = [folder for folder in _directories(root, parents) if folder.record.children]
        fan_outs.sort(key=lambda folder: (folder.record.created, folder.id), reverse=True)
        if not fan_outs or (len(fan_outs) > 1 and before != LAST):
            continue
        children = fan_outs[0].children()
        exact = [child for child in children if child.id == f"{fan_outs[0].id}.{part}"]
        near = exact or [child for child in children if child.id.startswith(f"{fan_outs[0].id}.{part}")]
        if len(near) == 1:
            return near[0]
        if near:
            raise _no_such_job(root, name, near, folders)
    return None


def _directories(root: str | os.PathLike[str], folders: Sequence[str]) -> list[JobDirectory]:
    roots = [f"{os.fspath(root)}/{folder}" for folder in folders]
    return [job for job in read_each(root, _open, roots) if job is not None]


def _open(root: str) -> JobDirectory | None:
    store = open_store(root, private=True)
    try:
        return JobDirectory.open(store.root, store=store) if store.exists(layout.JOB_FILE) else None
    except PipelineError as error:
        logger.warning("left out %s: %s", store.root, error.message)
        return None


def _no_such_job(
    root: str | os.PathLike[str], name: str, jobs: Sequence[JobDirectory], folders: Sequence[str]
) -> SpecError:
    where = open_store(root).root
    if jobs and name:
        ids = [job.id for job in jobs]
        return SpecError(
            "more than one job has an id that begins like that",
            where=where,
            found=name,
            expected="one of " + ", ".join(ids[:_SHOWN]) + (" …" if len(ids) > _SHOWN else ""),
            next_step="type more of the id",
        )
    recent = [job.id for job in sorted(_directories(root, folders), key=lambda job: job.record.created, reverse=True)]
    return SpecError(
        "unknown job" if recent else "there are no jobs yet",
        where=where,
        found=name,
        expected=f"{LAST}, a path, or one of " + ", ".join(recent[:_SHOWN]) if recent else "",
        next_step="python -m pipeline list" if recent else "python -m pipeline run job.yaml",
    )
