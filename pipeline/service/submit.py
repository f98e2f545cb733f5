"""Submitting a job: planned and checked at once, driven by a process of its own, and one job however often."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from pipeline.common.units import iso_time, utc_now
from pipeline.driver.prepare import check_output, draft, first_sink
from pipeline.errors import JobLocked, OutputExists
from pipeline.execution.clusters import settings_of
from pipeline.jobs import layout
from pipeline.jobs.cancellation import who
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.lease import Verdict, hold_lease
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
)
from pipeline.settings import Settings, setting_names
from pipeline.sinks import check_conditional_writes
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.precedence import Precedence
from pipeline.storage.store import Store, open_store

BY_HAND = "by hand"
AT_ONCE = RestartPolicy(starts=1_000_000, delay=0.0)
"""Whoever submits a job wants it to start now, however often its drivers have died."""


@dataclass(frozen=True)
class SubmitResult:
    """What became of a submission."""

    job: str
    is_new: bool
    """Whether this call made the job."""
    directory: str
    status: Status
    is_resumed: bool = False
    """Whether the job was there, had not ended well, and goes on now."""


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
    """Plan and store a job; it goes on when this process dies. Any number of calls with one ``key``, at once or after
    crashes anywhere in here, give one job: one that ended without success goes on, a success stays as it is.

    :param key: default: the digest of what is to be done: spec, input and model.
    :param force: a new job, whatever ``key`` means; it means the new one from then on.
    :param job_id: id of the job, where it is made.
    :param trigger: what submits it.
    :param priority: of several that wait for a server, higher ones start first.
    :param start: start a driver now; else a server does (``python -m pipeline serve``).
    :param resume_existing: whether a job that is there and ended without success goes on.
    :raises PipelineError: for anything that `pipeline.runner.run` would refuse before it begins.
    """
    # What is stored is what counts here and now, whatever configuration its driver will find.
    settings = settings_of(spec, settings=settings)
    root = open_store(settings.directory, private=True, fsync=settings.fsync)
    request = _Request(root, settings, key or "", trigger, priority, resume_existing)
    known = find_key(root, key) if key and not force else None
    if known is None or not _exists(root, known.job):
        with prepended_sys_path(settings.import_paths):
            plan = draft(spec, settings=settings).plan
        request = replace(request, key=key or plan.work_digest)
        known = None if force else find_key(root, request.key)
        if known is None or not _exists(root, known.job):
            return _submit_new(request, plan, known, job_id=job_id, force=force, start=start)
    job = JobDirectory.open(f"{root.root}/{known.job}", fsync=settings.fsync)
    return _take_up(request, job, start=start)


def submit_again(
    job: JobDirectory, *, settings: Settings, trigger: str = BY_HAND, priority: int = 0, start: bool = True
) -> SubmitResult:
    """Let a job that is there go on by itself, from its directory alone; a success stays as it is.

    :param settings: how it is to run from now on. Options as of `submit`.
    """
    root = open_store(job.root.rpartition("/")[0], private=True, fsync=settings.fsync)
    before = last_submission(job.store)
    request = _Request(root, settings, before.key if before else job.id, trigger, priority)
    if before is None and not job.status().is_success:
        put_submission(job.store, request.submission(1))
        mark_queued(root, job.id)
    return _take_up(request, job, start=start)


@dataclass(frozen=True)
class _Request:
    root: Store
    settings: Settings
    key: str
    trigger: str
    priority: int
    resume_existing: bool = True

    def submission(self, number: int) -> Submission:
        given, site = _recorded(self.settings)
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
    def said(self) -> str:
        return f"submitted {self.trigger}, by {who()}"


def _recorded(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must be kept of ``settings`` for another process: what was given with the job, and what ``dask.config`` says
    here, over which the file of a cluster goes. The rest is told by the job directory, or found again."""
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
    """Make the job, or help whoever is making it: every step may be done by several at once."""
    record, is_new = known, False
    if record is None:
        _check(request, plan, job_id=job_id, force=force)
        wanted = job_id or new_job_id(plan.spec.name, now=utc_now(), entropy=secrets.token_hex(2))
        record, is_new = claim_key(request.root, request.key, wanted, force=force)
    job = _make(request, plan, record.job)
    if job.status().is_final:
        return _take_up(request, job, start=start)
    if start:
        start_driver(job, by="submit", settings=request.settings)
    return SubmitResult(job.id, is_new, job.root, job.status())


def _check(request: _Request, plan: Plan, *, job_id: str | None, force: bool) -> None:
    """What must be refused before the key means anything."""
    root, settings = request.root, request.settings
    try:
        check_output(plan, settings=settings, job=job_id or "")
    except OutputExists:
        # Unless what is there is of this very submission, made by another call meanwhile.
        if force or find_key(root, request.key) is None:
            raise
    check_conditional_writes(first_sink(plan))
    if job_id is not None and _exists(root, check_job_id(job_id)):
        JobDirectory.open(f"{root.root}/{job_id}").check_plan(plan)


def _make(request: _Request, plan: Plan, job_id: str) -> JobDirectory:
    root, settings = request.root, request.settings
    store = open_store(f"{root.root}/{check_job_id(job_id)}", private=True, fsync=settings.fsync)
    check_owner(store)
    store.check_conditional_writes()
    put_submission(store, request.submission(1))
    mark_queued(root, job_id)
    if store.exists(PLAN_FILE) and not store.exists(layout.JOB_FILE):
        # What a call that died had planned: the input may have changed since, and the job is the one of then.
        stored = read_plan(store)
        plan = plan if stored.work_digest == plan.work_digest else stored
    return JobDirectory.open_or_create(
        root.root,
        plan,
        job=job_id,
        store=store,
        options=JobOptions(
            import_paths=settings.import_paths, fsync=settings.fsync, first_status=Status.QUEUED, reason=request.said
        ),
    )


def _take_up(request: _Request, job: JobDirectory, *, start: bool) -> SubmitResult:
    """A job that is there already: a success stays, one that nobody drives goes on."""
    is_resumed = False
    if not job.status().is_success and request.resume_existing:
        is_resumed = requeue(job, root=request.root, submission=request.submission(0), reason=request.said)
        if start:
            is_resumed |= start_driver(job, by="submit", settings=request.settings)
    return SubmitResult(job.id, False, job.root, job.status(), is_resumed)


def requeue(job: JobDirectory, *, root: Store, submission: Submission, reason: str) -> bool:
    """Put a job that ended without success, or was never submitted, into the queue; False when it is there, somebody
    drives it, or it is a success.

    :param submission: how it is to run; its number is set here.
    """
    if not _can_be_queued(job):
        return False
    try:
        with hold_lease(job.store):
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
        # With a submission, whoever made the job is about to say that it is QUEUED.
        return last_submission(job.store) is None
    return status.is_final and not status.is_success


def start_driver(job: JobDirectory, *, by: str, settings: Settings) -> bool:
    """Start a driver for ``job`` unless it has one or needs none; False then."""
    view = view_job(job, LeaseWatch(settings.lease_seconds), now=utc_now())
    if view is not None and view.lease is Verdict.WAIT:
        # Only time tells whether a driver on another machine lives. The new one waits for that by itself.
        view = replace(view, lease=Verdict.STALE)
    if view is None or next_need(view, AT_ONCE) is not Need.DRIVER:
        return False
    start = claim_start(job.store, number=view.last_start + 1, submission=view.submission, by=by)
    if start is None:
        return False
    launch(job, start)
    return True
