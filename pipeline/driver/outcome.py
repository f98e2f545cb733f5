"""Outcome of a job by manifest and sink, and the ends that no driver records: cancel a job, or give a job up.

The last status event is not the truth about the output: a driver may die after it has published, and before it says so.
"""

from __future__ import annotations

import json
from enum import StrEnum

from pipeline.common.units import iso_time, utc_now
from pipeline.errors import ConflictError, JobLocked
from pipeline.jobs import layout
from pipeline.jobs.cancellation import CancelOutcome, CancelRequest, who
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import LEASE_SECONDS, highest_epoch
from pipeline.jobs.manifest import Manifest
from pipeline.jobs.status import Status
from pipeline.report.build import decide_status, make_report
from pipeline.sinks import read_published


class Outcome(StrEnum):
    """State of the output of a job's last round."""

    PUBLISHED = "published"
    """The sink has published the manifest."""
    COMMITTED = "committed"
    """The manifest exists, and the sink has not published it: a driver must publish it, and nothing may undo it."""
    OPEN = "open"
    """There is no manifest of the last round."""


def outcome(job: JobDirectory) -> Outcome:
    """Return the outcome of ``job``. For a fan-out that publishes together, the first commit of a child counts."""
    if job.record.children:
        if not job.record.publishes_children_together:
            return Outcome.OPEN
        outcomes = {outcome(child) for child in job.children()}
        # No fan-out is recorded as a success here: its driver also writes the commit.
        return Outcome.OPEN if outcomes == {Outcome.OPEN} else Outcome.COMMITTED
    manifest = _last_manifest(job)
    if manifest is None:
        return Outcome.OPEN
    return Outcome.PUBLISHED if read_published(manifest, job) is not None else Outcome.COMMITTED


def has_output(job: JobDirectory) -> bool:
    """Return True if any round of ``job`` has committed: rows of its input are in the output, or will be."""
    if job.record.children:
        return any(has_output(child) for child in job.children())
    return bool(job.manifests.numbers())


def _last_manifest(job: JobDirectory) -> Manifest | None:
    """Return the manifest of the last round, of all stages; None if there is none."""
    return job.committed()


def record_success(job: JobDirectory) -> Status:
    """Record the end of a job whose output is published. The caller holds the lease.

    :returns: the status that was set.
    """
    manifest = job.manifests.last()
    if job.record.stages and manifest is not None:
        ledger, rejected = None, manifest.rows.rejected
        has_warnings = bool(rejected or manifest.quarantined_files)
        status = Status.SUCCEEDED_WITH_WARNINGS if has_warnings else Status.SUCCEEDED
    else:
        ledger = job.ledger()
        status, rejected = decide_status(ledger, job=job.id), ledger.rows.rejected
    if job.status() is not Status.PUBLISHING:
        job.set_status(Status.PUBLISHING, reason="the output is published; its driver ended before it recorded that")
    job.write_report(make_report(job, ledger=ledger, status=status).to_dict())
    job.set_status(status, reason=f"published; {rejected:,} rows were rejected")
    return status


def cancel_job(
    job: JobDirectory,
    *,
    now: bool = False,
    reason: str = "",
    superseded_by: str = "",
    lease_seconds: float = LEASE_SECONDS,
) -> CancelOutcome:
    """Ask the driver of ``job`` to stop. Without a driver, set the status CANCELLED, unless the job has committed.

    If the driver may be dead on another machine, wait for a heartbeat: at most ``lease_seconds``, or the driver's own
    if that is longer.

    :param superseded_by: Owner of the job's input from now on. The job is then cancelled for good: no resume may score
        the same rows a second time, unless the job has committed.
    """
    if superseded_by and not job.status().is_success:
        record = {"schema_version": 1, "by": superseded_by, "time": iso_time(utc_now())}
        job.store.put_if_absent(layout.SUPERSEDED_FILE, json.dumps(record, indent=1).encode() + b"\n")
    if job.status().is_final and _is_settled(job):
        return CancelOutcome.ENDED
    request = CancelRequest(highest_epoch(job.store), iso_time(utc_now()), who(), now, reason)
    # Stored before the lease is read, so that a running driver finds the request in any case.
    job.store.replace(layout.cancel_path(request.epoch), request.to_json_bytes())
    try:
        with job.hold(lease_seconds=lease_seconds):
            return _cancel_held(job, request, lease_seconds=lease_seconds)
    except JobLocked:
        # A driver that acquired the lease in between holds a higher epoch than the request names.
        epoch = highest_epoch(job.store)
        if epoch != request.epoch:
            moved = CancelRequest(epoch, request.time, request.by, now, reason)
            job.store.replace(layout.cancel_path(epoch), moved.to_json_bytes())
        return CancelOutcome.ASKED


def _cancel_held(job: JobDirectory, request: CancelRequest, *, lease_seconds: float) -> CancelOutcome:
    status = job.status()
    if status.is_final and _is_settled(job):
        # The driver may have cancelled the job meanwhile, as requested.
        return CancelOutcome.CANCELLED if status is Status.CANCELLED else CancelOutcome.ENDED
    match outcome(job):
        case Outcome.PUBLISHED:
            record_success(job)
            return CancelOutcome.PUBLISHED
        case Outcome.COMMITTED:
            return CancelOutcome.COMMITTED
    job.set_status(Status.CANCELLED, reason=request.description)
    for child in job.children():
        cancel_job(child, now=request.now, reason=request.reason, lease_seconds=lease_seconds)
    return CancelOutcome.CANCELLED


def _is_settled(job: JobDirectory) -> bool:
    """Return True if the final status of ``job`` agrees with its output."""
    return job.status().is_success or job.status() is Status.SCORED or outcome(job) is Outcome.OPEN


def is_superseded(job: JobDirectory) -> bool:
    """Return True if another job scores the input of ``job``, so that ``job`` must not run any more."""
    return job.store.exists(layout.SUPERSEDED_FILE) and not has_output(job)


def check_superseded(job: JobDirectory) -> None:
    """Refuse to run a job whose input belongs to another job.

    :raises ConflictError: see `is_superseded`.
    """
    if is_superseded(job):
        raise ConflictError(
            "another job scores the input of this job",
            where=f"job {job.id}",
            found=f"{layout.SUPERSEDED_FILE}: it was cancelled for a newer job",
            expected="a job that was cancelled by hand, or not at all",
            next_step="look at the newer job (python -m pipeline list), or run the job spec as a new job",
        )


def give_up(job: JobDirectory, *, reason: str) -> Status:
    """End a job whose drivers died too often: FAILED, or its success if its output is published. Hold the lease.

    A job that has committed and not published fails, too. A resume then publishes it.
    """
    if outcome(job) is Outcome.PUBLISHED:
        return record_success(job)
    job.set_status(Status.FAILED, reason=reason)
    return Status.FAILED
