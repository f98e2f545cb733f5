"""Find and remove files that jobs left behind and that count nowhere.

A data file may be removed once its partition has a receipt that names another file: the first receipt wins. Without a
receipt the file stays, because a worker that outlived its driver may still write one. Files that only a driver writes
may be removed while no driver runs. The lease of the job is held during removal.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from stat import S_ISREG
from typing import Any

from pipeline.common.units import iso_time, plural
from pipeline.errors import JobLocked, PipelineError, SpecError
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import LEASE_SECONDS, acquire_lease, hold_lease, wait_until_free
from pipeline.jobs.retention import mark_rejects_removed, retention
from pipeline.jobs.rounds import plan_path
from pipeline.jobs.splits import files_of_split_attempts
from pipeline.jobs.stages import stage_states
from pipeline.sinks import SinkLeftover, SinkLeftoverKind, leftovers, read_published, remove_leftover
from pipeline.storage.local import LocalStore
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import is_unfinished, storage_errors, unique_name

_AGE = re.compile(r"(\d+)\s*([hdw])")
UNFINISHED_AGE = timedelta(hours=1)
"""Age from which an unfinished file has no writer any more: one is written in less than a second."""
_HOURS = {"h": 1, "d": 24, "w": 24 * 7}


@dataclass(frozen=True)
class Leftover:
    """A file or folder that may be removed."""

    kind: str
    """Kind of the leftover.

    ``attempt`` (data that no receipt names), ``unfinished`` (an incomplete file), ``merged`` (files made to be
    published), ``staging`` (a folder beside the sink), ``unlisted`` (a file in the sink that no publication lists),
    ``checkpoint`` (data of a stage that later stages have read), ``rejects`` (rejected rows whose ``errors.retain`` has
    passed), ``stage`` (a stage that is no part of the output), ``job`` (a whole directory).
    """
    path: str
    """Path or URL."""
    bytes: int
    """Bytes that removal frees. A file with another hard link frees nothing."""
    name: str = ""
    """Path in the store of the job, if the leftover is inside of the store."""


@dataclass(frozen=True)
class Sweep:
    """Leftovers of one job."""

    job: str
    directory: str
    status: str = ""
    leftovers: tuple[Leftover, ...] = ()
    kept: str = ""
    """Reason why some or all leftovers must stay."""

    def to_dict(self) -> dict[str, Any]:
        """The sweep as JSON output shows it."""
        leftovers = [
            {key: value for key, value in asdict(leftover).items() if key != "name"} for leftover in self.leftovers
        ]
        return {
            "job": self.job,
            "status": self.status,
            "directory": self.directory,
            "leftovers": leftovers,
            "kept": self.kept,
        }


def parse_age(text: str) -> timedelta:
    """Parse an age such as ``30d``, ``12h`` or ``2w``.

    :raises SpecError: for an invalid age.
    """
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise SpecError("not a valid age", where="--older-than", found=repr(text), expected="such as 30d, 12h or 2w")
    return timedelta(hours=int(match[1]) * _HOURS[match[2]])


def lost_attempts(names: Iterable[str], *, named: set[str], settled: set[str] | None) -> list[str]:
    """Return the files ``data/<partition>-<attempt>.parquet`` that can never count.

    :param named: Files that receipts and manifests name.
    :param settled: Partitions with a final outcome, see `Ledger.settled`; None: all.
    """
    unnamed = (name for name in names if name not in named)
    return [name for name in unnamed if settled is None or _partition(name) in settled]


def _partition(name: str) -> str:
    return name.rpartition("/")[2].rpartition("-")[0]


def is_old(events: Iterable[dict[str, Any]], *, now: datetime, age: timedelta) -> bool:
    """True if the last event is at least ``age`` old; False if unknown."""
    times = [str(event.get("time", "")) for event in events]
    try:
        return bool(times) and now - datetime.fromisoformat(times[-1]) >= age
    except (ValueError, TypeError):
        return False


def sweep_job(
    job: JobDirectory,
    *,
    now: datetime,
    older_than: timedelta | None = None,
    lease_seconds: float = LEASE_SECONDS,
    delete: bool = False,
    stages: bool = False,
) -> Sweep:
    """Find the leftovers of ``job``, and remove them if ``delete``. A job with a running driver is skipped.

    :param now: UTC.
    :param older_than: Remove the whole directory of a finished job of that age. Default: never.
    :param stages: Remove the data files of all stages but the last, once the job has succeeded. Default: never.
    """
    try:
        if not delete:
            wait_until_free(job.store, lease_seconds=lease_seconds)
            return _find(job, now=now, older_than=older_than, stages=stages)
        with hold_lease(job.store, lease_seconds=lease_seconds):
            sweep = _find(job, now=now, older_than=older_than, stages=stages)
            for stage in {leftover.name.split("/")[1] for leftover in sweep.leftovers if leftover.kind == "checkpoint"}:
                job.store.put_if_absent(f"{layout.stage_folder(stage)}/{layout.REMOVED_FILE}", _mark(now))
            for folder in {leftover.name.partition("rounds/")[0] for leftover in _rejects(sweep)}:
                mark_rejects_removed(job.store, folder=folder, now=now)
            for leftover in sweep.leftovers:
                if leftover.kind != "job":
                    _remove(job, leftover)
        if any(leftover.kind == "job" for leftover in sweep.leftovers):
            # Acquire the lease without a heartbeat, which would create the folder again.
            acquire_lease(job.store, lease_seconds=lease_seconds)
            remove_job(job.store)
        return sweep
    except JobLocked as error:
        return Sweep(job.id, job.root, str(job.status()), kept=f"{error.message}: {error.found}")
    except PipelineError as error:
        return Sweep(job.id, job.root, kept=f"{error.kind}: {error.message} ({error.where})")


def sweep_root(root: str | os.PathLike[str], *, delete: bool = False) -> Sweep:
    """Find job directories in ``root`` whose removal was interrupted, and remove them if ``delete``."""
    store = open_store(root, private=True)
    interrupted = []
    for folder in store.list_folders():
        if is_unfinished(folder):
            inside = open_store(f"{store.root}/{folder}", private=True)
            interrupted.append(Leftover("job", inside.root, _folder_bytes(inside), folder))
            if delete:
                _remove_all(inside)
    return Sweep("", store.root, leftovers=tuple(interrupted))


def remove_job(store: Store) -> None:
    """Remove a job directory. After an interruption, the rest is not a job that could be resumed."""
    if isinstance(store, LocalStore):
        path = Path(store.root)
        gone = path.with_name(f".{path.name}.{unique_name()[:8]}.tmp")
        with storage_errors(store.root):
            os.rename(path, gone)
        store = open_store(gone, private=True)
    _remove_all(store)


def _remove_all(store: Store) -> None:
    store.remove(layout.JOB_FILE)
    if isinstance(store, LocalStore):
        with storage_errors(store.root):
            shutil.rmtree(store.root)
    else:
        store.remove_folder("")


def _mark(now: datetime) -> bytes:
    return json.dumps({"schema_version": 1, "time": iso_time(now)}).encode() + b"\n"


def _rejects(sweep: Sweep) -> Iterator[Leftover]:
    return (leftover for leftover in sweep.leftovers if leftover.kind == "rejects")


def _due_rejects(job: JobDirectory) -> Iterator[Leftover]:
    """All files of rejects, of a job whose ``errors.retain`` has passed."""
    for folder in (layout.rejects_folder(number) for number in _round_numbers(job)):
        for name in (f"{folder}/{file}" for file in job.store.list(folder)):
            yield Leftover("rejects", job.store.url(name), _file_bytes(job.store, name), name)


def _with_rejects(found: Sequence[Leftover], job: JobDirectory) -> list[Leftover]:
    """Return ``found`` and the files of rejects that are due, each file once."""
    due = list(_due_rejects(job))
    names = {leftover.name for leftover in due}
    return [*(leftover for leftover in found if leftover.name not in names), *due]


def _is_due(job: JobDirectory, now: datetime) -> bool:
    """True if the rejected rows of ``job`` are to be removed, whether it has succeeded or not."""
    if job.record.children:
        return False
    age = retention(job.plan.spec.errors)
    return age is not None and is_old(job.events.read(), now=now, age=age)


def _of_stages(
    job: JobDirectory, *, is_finished: bool, now: datetime, stages: bool, is_due: bool = False
) -> Iterator[Leftover]:
    """Leftovers of the stages of a job, and with ``stages`` the files that only its own stages have read."""
    if not job.record.stages:
        return
    states = stage_states(job)
    for name in job.store.list_folders(layout.STEPS):
        folder = layout.stage_folder(name)
        stage = next((state for state in states if state.name == name), None)
        if stage is None or stage.job is None:
            # It reads files of a manifest that no stage has any more.
            if is_finished:
                yield Leftover("stage", job.store.url(folder), _folder_bytes(job.store, folder), folder)
            continue
        is_sealed = stage.sealed is not None
        attempts, _ = _attempts(stage.job, is_finished=is_sealed)
        inside = [*attempts, *_unfinished(stage.job, is_finished=is_sealed, now=now), *_unopened(stage.job)]
        inside = _with_rejects(inside, stage.job) if is_due else inside
        if stages and is_finished and not stage.stage.is_last:
            lost = {leftover.name for leftover in inside}
            data = [file.name for file in stage.sealed.manifest.files] if stage.sealed else []
            inside += [
                Leftover("checkpoint", stage.job.store.url(name), _file_bytes(stage.job.store, name), name)
                for name in data
                if name not in lost and stage.job.store.exists(name)
            ]
        yield from (replace(leftover, name=f"{folder}/{leftover.name}") for leftover in inside)


def _find(job: JobDirectory, *, now: datetime, older_than: timedelta | None, stages: bool = False) -> Sweep:
    status = job.status()
    is_finished = job.is_ended
    attempts, unsettled = _attempts(job, is_finished=is_finished)
    in_job = [*attempts, *_unfinished(job, is_finished=is_finished, now=now), *_merged(job), *_unopened(job)]
    is_due = _is_due(job, now)
    if is_due and not job.record.stages:
        in_job = _with_rejects(in_job, job)
    in_job += _of_stages(job, is_finished=is_finished, now=now, stages=stages, is_due=is_due)
    in_sink = [_of_sink(leftover) for leftover in leftovers(job)]
    reason = ""
    if unsettled:
        reason = f"{plural(unsettled, 'file')} of partitions without a receipt: resume the job, then gc again"
    if older_than is not None and is_old(job.events.read(), now=now, age=older_than):
        reason = _why_whole_job_stays(job) or ""
        if not reason:
            in_job = [Leftover("job", job.root, _folder_bytes(job.store))]
    return Sweep(job.id, job.root, str(status), (*in_sink, *in_job), reason)


def _of_sink(leftover: SinkLeftover) -> Leftover:
    if leftover.kind is SinkLeftoverKind.STAGING:
        return Leftover(leftover.kind, leftover.path, _folder_bytes(open_store(leftover.path)))
    if leftover.kind is SinkLeftoverKind.STAGED:
        return Leftover(leftover.kind, leftover.path, 0)
    folder, _, name = leftover.path.rpartition("/")
    return Leftover(leftover.kind, leftover.path, _file_bytes(open_store(folder), name))


def _why_whole_job_stays(job: JobDirectory) -> str:
    if not job.is_ended:
        return "it has not succeeded: resume it, or remove its directory yourself"
    manifest = job.manifests.last()
    if manifest is None or read_published(manifest, job) is None:
        return "its output is not where it was published: its checkpoints may be all there is"
    return ""


def _attempts(job: JobDirectory, *, is_finished: bool) -> tuple[list[Leftover], int]:
    """Return data files that can never count, and the number of files that may still count."""
    store = job.store
    # Listed before the receipts are read: a partition that completes in between keeps its files until the next sweep.
    names = [
        f"{folder}/{name}"
        for round in _round_numbers(job)
        for folder in (layout.data_folder(round), layout.rejects_folder(round))
        for name in store.list(folder)
    ]
    named = {file.name for number in job.manifests.numbers() for file in _files_of(job, number)}
    ledger = job.ledger()
    named |= {
        layout.round_file(receipt.round, file.name)
        for receipt in ledger.done
        for file in (receipt.data, receipt.rejects)
        if file
    }
    lost: list[str] = []
    for round in _round_numbers(job):
        settled = None if is_finished else ledger.settled(round)
        split_files = files_of_split_attempts(ledger.receipts(round))
        waiting = set() if is_finished else {layout.round_file(round, name) for name in split_files}
        here = [n for n in names if layout.round_of(n) == round and n not in waiting]
        lost += lost_attempts(here, named=named, settled=settled)
    attempts = [Leftover("attempt", store.url(name), _file_bytes(store, name), name) for name in lost]
    return attempts, len(set(names) - named - set(lost))


def _files_of(job: JobDirectory, number: int) -> Iterator[Any]:
    manifest = job.manifests.find(number)
    if manifest is not None:
        yield from (*manifest.files, *manifest.rejects)


_OF_A_WORKER = re.compile(rf"{layout.ROUNDS}/[0-9]+/")
"""Folders in which workers write."""


def _unfinished(job: JobDirectory, *, is_finished: bool, now: datetime) -> Iterator[Leftover]:
    """Interrupted files.

    In ``rounds`` of an unfinished job they stay: a worker may still write them. Elsewhere young ones stay: commands and
    servers write submissions, cancellations and starts without the lease.
    """
    if not isinstance(job.store, LocalStore):
        return
    for path in sorted(Path(job.root).rglob(".*.tmp")):
        name = path.relative_to(job.root).as_posix()
        # Children are swept one by one: a driver may run a child. Stages have rules of their own.
        if name.startswith((f"{layout.CHILDREN}/", f"{layout.STEPS}/")):
            continue
        is_of_worker = _OF_A_WORKER.match(name) is not None
        if not is_unfinished(path.name) or (is_of_worker and not is_finished):
            continue
        if _is_file_since(path, now - UNFINISHED_AGE):
            yield Leftover("unfinished", str(path), _file_bytes(job.store, name), name)


def _is_file_since(path: Path, moment: datetime) -> bool:
    """True if ``path`` is a file that has not changed since ``moment``."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return S_ISREG(status.st_mode) and status.st_mtime <= moment.timestamp()


def _unopened(job: JobDirectory) -> Iterator[Leftover]:
    """Plans of rounds that were never opened."""
    known = {plan_path(round_.record) for round_ in job.rounds.all() if round_.record}
    for name in (f"{layout.ROUNDS}/{name}" for name in job.store.list(layout.ROUNDS) if name.endswith(".parquet")):
        if name not in known:
            yield Leftover("unfinished", job.store.url(name), _file_bytes(job.store, name), name)


def _round_numbers(job: JobDirectory) -> list[int]:
    return sorted(int(name) for name in job.store.list_folders(layout.ROUNDS) if name.isdigit())


def _merged(job: JobDirectory) -> Iterator[Leftover]:
    for round in _round_numbers(job):
        if layout.MERGED in job.store.list_folders(layout.round_folder(round)):
            name = layout.merged_folder(round)
            yield Leftover("merged", job.store.url(name), _folder_bytes(job.store, name), name)


def _remove(job: JobDirectory, leftover: Leftover) -> None:
    if leftover.kind in tuple(SinkLeftoverKind):
        remove_leftover(job, leftover.path)
    elif leftover.kind in ("merged", "stage"):
        job.store.remove_folder(leftover.name)
    else:
        job.store.remove(leftover.name)


def _file_bytes(store: Store, name: str) -> int:
    if not isinstance(store, LocalStore):
        return store.size(name)
    try:
        status = store.path(name).lstat()
    except FileNotFoundError:
        return 0
    return status.st_size if status.st_nlink == 1 else 0


def _folder_bytes(store: Store, folder: str = "") -> int:
    if isinstance(store, LocalStore):
        paths = [path.relative_to(store.root).as_posix() for path in store.path(folder).rglob("*") if path.is_file()]
        return sum(_file_bytes(store, path) for path in paths)
    prefix = f"{folder}/" if folder else ""
    inside = sum(_folder_bytes(store, prefix + name) for name in store.list_folders(folder))
    return inside + sum(_file_bytes(store, prefix + name) for name in store.list(folder))
