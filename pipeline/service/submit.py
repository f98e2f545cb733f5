"""Submit a job: plan and check the job now, then drive it in a process of its own. One key gives one job."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from pipeline.common.units import iso_time, utc_now
from pipeline.driver.outcome import is_superseded
from pipeline.driver.prepare import check_output, draft, first_sink
from pipeline.errors import JobLocked, OutputExists
from pipeline.execution.clusters import settings_of
from pipeline.jobs import layout
from pipeline.jobs.cancellation import who
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.lease import Verdict
from pipeline.jobs.record import check_job_id, check_owner, new_job_id
from pipeline.jobs.status import Status
from pipeline.plan.plan import Plan
from pipeline.plan.table import PLAN_FILE, read_plan
from pipeline.scoring.steps import prepended_sys_path
from pipeline.service.driver_process import launch
from pipeline.service.queue import (
    KeyRecord,
    LeaseWatch,
    Need,
    RestartPolicy,
    Submission,
    claim_key,
    claim_start,
    find_key,
    last_submission,
    mark_queued,
    next_need,
    put_submission,
    view_job,
    withdrawn_on_error,
)
from pipeline.settings import Settings, setting_names
from pipeline.sinks import check_conditional_writes
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.precedence import Precedence
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import own_storage_options

BY_HAND = "by hand"
AT_ONCE = RestartPolicy(starts=1_000_000, delay=0.0)
"""Policy of a submission: start a driver now, however often drivers of the job have died."""


@dataclass(frozen=True)
class SubmitResult:
    """Result of a submission."""

    job: str
    is_new: bool
    """True if this call created the job."""
    directory: str
    status: Status
    is_resumed: bool = False
    """True if an existing unsuccessful job is resumed now."""


@own_storage_options()
def submit(
    spec: JobSpec,
    *,
    settings: Settings,
    key: str | None = None,
    force: bool = False,
    job_id: str | None = None,
    trigger: str = BY_HAND,
    priority: int = 0,
    start: bool = True,
    resume_existing: bool = True,
) -> SubmitResult:
    """Plan and store a job that runs in a process of its own, and survives this one.

    Any number of calls with one ``key``, concurrent or after a crash, give one job. A successful job is left alone;
    an unsuccessful job is resumed.

    :param key: Key of the job. Default: the digest of its work (spec, input, model and code of the steps).
    :param force: Create a new job and assign ``key`` to it.
    :param job_id: Id of a new job.
    :param trigger: Origin of the submission.
    :param priority: Priority among jobs that wait for a server: higher numbers start first.
    :param start: Start a driver now. False: a server does (``python -m pipeline serve``).
    :param resume_existing: Resume an existing job that ended without success.
    :raises PipelineError: for anything that `pipeline.runner.run` would refuse before it starts.
    """
    # Store the settings that count here and now; the driver may find another configuration.
    settings = settings_of(spec, settings=settings)
    root = open_store(settings.directory, private=True, fsync=settings.fsync)
    request = _Request(root, settings, key or "", trigger, priority, resume_existing)
    known = find_key(root, key) if key and not force else None
    if known is None or not _exists(root, known.job):
        with prepended_sys_path(settings.import_paths):
            plan = draft(spec, settings=settings).plan
        request = replace(request, key=key or plan.submission_digest)
        known = None if force else find_key(root, request.key)
        if known is None or not _exists(root, known.job):
            return _submit_new(request, plan, known, job_id=job_id, force=force, start=start)
    job = JobDirectory.open(f"{root.root}/{known.job}", fsync=settings.fsync)
    return _resume_existing(request, job, start=start)


@own_storage_options()
def submit_again(
    job: JobDirectory, *, settings: Settings, trigger: str = BY_HAND, priority: int = 0, start: bool = True
) -> SubmitResult:
    """Submit an existing job again, from its directory alone. A successful job is left alone.

    :param settings: Settings of the job from now on. The other options are those of `submit`.
    """
    root = open_store(job.root.rpartition("/")[0], private=True, fsync=settings.fsync)
    before = last_submission(job.store)
    request = _Request(root, settings, before.key if before else job.id, trigger, priority)
    if before is None and not job.status().is_success:
        put_submission(job.store, request.submission(1))
        mark_queued(root, job.id)
    return _resume_existing(request, job, start=start)


@dataclass(frozen=True)
class _Request:
    root: Store
    settings: Settings
    key: str
    trigger: str
    priority: int
    resume_existing: bool = True

    def submission(self, number: int) -> Submission:
        given, site = _settings_to_record(self.settings)
        return Submission(
            number=number,
            time=iso_time(utc_now()),
            by=who(),
            trigger=self.trigger,
            key=self.key,
            priority=self.priority,
            settings=given,
            config=site,
        )

    @property
    def reason(self) -> str:
        return f"submitted {self.trigger}, by {who()}"


def _settings_to_record(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return settings that the driver cannot find: settings given with the job, and settings of ``dask.config`` here.

    A cluster file outranks the settings of ``dask.config``.
    """
    given: dict[str, Any] = {}
    site: dict[str, Any] = {}
    for name in setting_names():
        choice = settings.choice(name)
        if name not in ("directory", "import_paths") and choice.rank not in (
            Precedence.BUILT_IN,
            Precedence.CLUSTER_FILE,
        ):
            (site if choice.rank is Precedence.DASK_CONFIG else given)[name] = choice.value
    return given, site


def _exists(root: Store, job: str) -> bool:
    return root.exists(f"{job}/{layout.JOB_FILE}")


def _submit_new(
    request: _Request, plan: Plan, known: KeyRecord | None, *, job_id: str | None, force: bool, start: bool
) -> SubmitResult:
    """Create the job, or complete the creation by another call. Several calls may do each step at once."""
    record, is_new = known, False
    if record is None:
        _check_new(request, plan, job_id=job_id, force=force)
        new_id = job_id or new_job_id(plan.spec.name, now=utc_now(), entropy=secrets.token_hex(2))
        record, is_new = claim_key(request.root, request.key, new_id, force=force)
    job = _create_job(request, plan, record.job)
    if job.status().is_final:
        return _resume_existing(request, job, start=start)
    if start:
        start_driver(job, by="submit", settings=request.settings)
    return SubmitResult(job.id, is_new, job.root, job.status())


def _check_new(request: _Request, plan: Plan, *, job_id: str | None, force: bool) -> None:
    """Refuse a job that cannot run, before the key is claimed."""
    root, settings = request.root, request.settings
    try:
        check_output(plan, settings=settings, job=job_id or "")
    except OutputExists:
        # A concurrent call may have made the output for this very submission.
        if force or find_key(root, request.key) is None:
            raise
    check_conditional_writes(first_sink(plan))
    if job_id is not None and _exists(root, check_job_id(job_id)):
        JobDirectory.open(f"{root.root}/{job_id}").check_plan(plan)


def _create_job(request: _Request, plan: Plan, job_id: str) -> JobDirectory:
    root, settings = request.root, request.settings
    store = open_store(f"{root.root}/{check_job_id(job_id)}", private=True, fsync=settings.fsync)
    check_owner(store)
    store.check_conditional_writes()
    put_submission(store, request.submission(1))
    mark_queued(root, job_id)
    if store.exists(PLAN_FILE) and not store.exists(layout.JOB_FILE):
        # The plan is from a call that died. The input may have changed since, but the stored plan defines the job.
        stored = read_plan(store)
        plan = plan if stored.work_digest == plan.work_digest else stored
    return JobDirectory.open_or_create(
        root.root,
        plan,
        job=job_id,
        store=store,
        options=JobOptions(
            import_paths=settings.import_paths, fsync=settings.fsync, first_status=Status.QUEUED, reason=request.reason
        ),
    )


def _resume_existing(request: _Request, job: JobDirectory, *, start: bool) -> SubmitResult:
    """Resume an existing job unless it succeeded or has a driver."""
    is_resumed = False
    if not job.status().is_success and request.resume_existing:
        is_resumed = requeue(job, root=request.root, submission=request.submission(0), reason=request.reason)
        if start:
            is_resumed |= start_driver(job, by="submit", settings=request.settings)
    return SubmitResult(job.id, False, job.root, job.status(), is_resumed)


def requeue(job: JobDirectory, *, root: Store, submission: Submission, reason: str) -> bool:
    """Queue a job that ended without success, or was never submitted.

    :param submission: Submission to store; its number is set here.
    :returns: False when the job is queued already, has a driver, or succeeded.
    """
    if not _can_be_queued(job):
        return False
    try:
        with job.hold():
            if not _can_be_queued(job):
                return False
            before = last_submission(job.store)
            job.set_status(Status.QUEUED, reason=reason)
            put_submission(job.store, replace(submission, number=before.number + 1 if before else 1))
            mark_queued(root, job.id)
            return True
    except JobLocked:
        return False


def _can_be_queued(job: JobDirectory) -> bool:
    status = job.status()
    if status is Status.PLANNED:
        # With a submission, the process that created the job is about to set QUEUED.
        return last_submission(job.store) is None
    return status.is_final and not status.is_success and not is_superseded(job)


def start_driver(job: JobDirectory, *, by: str, settings: Settings) -> bool:
    """Start a driver for ``job``. Return False if the job has a driver or needs none."""
    view = view_job(job, LeaseWatch(settings.lease_seconds), now=utc_now())
    if view is not None and view.lease is Verdict.WAIT:
        # Only time tells whether a driver on another machine lives. The new driver waits for that.
        view = replace(view, lease=Verdict.STALE)
    if view is None or next_need(view, AT_ONCE) is not Need.DRIVER:
        return False
    start = claim_start(job.store, number=view.last_start + 1, submission=view.submission, by=by)
    if start is None:
        return False
    with withdrawn_on_error(job.store, start):
        launch(job, start)
    return True
