"""`JobDirectory`: the state of a job, in files that ``ls`` and ``cat`` can read. The files are the truth about the job.

The parts of a directory are `EventLog`, `RoundLog`, `ReceiptFolder` and `ManifestLog`. `pipeline.jobs.layout` has the
paths, docs/job-directory.md every field.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipeline.common.secrets import is_reference, redact_values
from pipeline.common.sketch import sample_every
from pipeline.common.units import Clock, iso_time, utc_now
from pipeline.errors import StateCorrupt
from pipeline.events import StatusChanged
from pipeline.jobs import layout
from pipeline.jobs.code_archive import put_sources
from pipeline.jobs.event_log import EventLog, last_status
from pipeline.jobs.lease import LEASE_SECONDS, Lease, hold_lease
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.manifest import Manifest
from pipeline.jobs.manifest_log import ManifestLog
from pipeline.jobs.receipt_folder import ReceiptFolder
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.record import JobRecord, check_job_id, check_owner, child_id, record_of, same_work
from pipeline.jobs.round_log import RoundLog
from pipeline.jobs.rounds import Round
from pipeline.jobs.status import Status, check_transition
from pipeline.plan.plan import Plan
from pipeline.plan.recipe import StageRecipe
from pipeline.plan.table import PLAN_FILE, plan_bytes, read_plan
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import local_path, use_storage_options


@dataclass(frozen=True)
class JobOptions:
    """Options for the creation of a job directory, apart from the plan."""

    working_directory: str = ""
    """Folder that relative paths of the spec start from. Default: the current one."""
    import_paths: tuple[str, ...] = ()
    """Folders from which the modules of the steps are imported."""
    fsync: bool = True
    """See `pipeline.storage.store.open_store`; workers do the same."""
    now: Clock = utc_now
    first_status: Status = Status.PLANNED
    reason: str = "run by hand"
    """Reason of the first status."""
    parent: JobRecord | None = None
    """Fan-out whose child the job is, or job whose stage it is."""
    stage: str = ""
    """Name of a stage's folder; empty for any other job."""


DEFAULT_OPTIONS = JobOptions()


class JobDirectory:
    """A job on disk. Make one with `create`, `open` or `open_or_create`."""

    def __init__(
        self, store: Store, record: JobRecord, *, plan: Plan | None = None, fsync: bool = True, now: Clock = utc_now
    ) -> None:
        self.store = store
        self.record = record
        self.fsync = fsync
        self.events = EventLog(store, now=now)
        self.rounds = RoundLog(store, Round(0, record.plan, lambda: self.plan), events=self.events)
        self.receipts = ReceiptFolder(store, self.rounds)
        self.manifests = ManifestLog(store, record, now=now)
        self._plan = plan
        self._now = now

    @property
    def root(self) -> str:
        """Absolute path or URL."""
        return self.store.root

    @property
    def id(self) -> str:
        """Id of the job."""
        return self.record.job

    @staticmethod
    def create(
        root: str | os.PathLike[str],
        plan: Plan,
        *,
        job: str,
        store: Store | None = None,
        options: JobOptions = DEFAULT_OPTIONS,
    ) -> JobDirectory:
        """Create the directory ``<root>/<job>`` for ``plan``. Concurrent callers with one id all get the same job.

        :param root: Folder or URL that holds the job directories.
        :param job: Id of the job.
        :param store: Storage of the job's own directory, instead of the one at ``root``.
        :raises PlanMismatch: when the job exists with another plan.
        :raises RefusedForSafety: for a bad id, or a folder of another user.
        :raises UnsafeStore: when the storage cannot create a file exclusively.
        """
        store = store or _open_store(root, job, fsync=options.fsync)
        check_owner(store)
        store.check_conditional_writes()
        store.put_if_absent(PLAN_FILE, plan_bytes(plan))
        put_sources(store, plan)
        children, plan = plan.children, same_work(read_plan(store), plan, store=store)
        store.put_if_absent(layout.SPEC_FILE, plan.spec.to_yaml().encode())
        record = record_of(
            plan,
            job=job,
            created=iso_time(options.now()),
            working_directory=options.working_directory or os.getcwd(),
            import_paths=options.import_paths,
            parent=options.parent,
            stage=options.stage,
        )
        for child in children or plan.children:
            # Children come first: once job.json exists, the whole job must exist.
            _create_child(store, child.planned, slug=child.slug, parent=record, options=options)
        if store.put_if_absent(layout.JOB_FILE, record.to_json_bytes()):
            directory = JobDirectory(store, record, plan=plan, fsync=options.fsync, now=options.now)
            directory.events.append("status", before="", after=str(options.first_status), reason=options.reason)
            return directory
        return JobDirectory.open(store.root, store=store, fsync=options.fsync, now=options.now).check_plan(plan)

    @staticmethod
    def open(
        root: str | os.PathLike[str], *, store: Store | None = None, fsync: bool = True, now: Clock = utc_now
    ) -> JobDirectory:
        """Open the job whose directory is ``root``.

        :raises StateCorrupt: when ``root`` is not a job directory.
        :raises RefusedForSafety: when ``root`` belongs to another user.
        """
        store = store or open_store(root, private=True, fsync=fsync)
        check_owner(store)
        try:
            record = JobRecord.from_json(store.read(layout.JOB_FILE), where=store.url(layout.JOB_FILE))
        except FileNotFoundError:
            raise StateCorrupt(
                "not a job directory",
                where=store.root,
                found="no job.json",
                next_step="python -m pipeline list",
            ) from None
        return JobDirectory(store, record, fsync=fsync, now=now)

    @staticmethod
    def open_or_create(
        root: str | os.PathLike[str],
        plan: Plan,
        *,
        job: str,
        store: Store | None = None,
        options: JobOptions = DEFAULT_OPTIONS,
    ) -> JobDirectory:
        """Open the job ``job`` if it exists with this plan; create it if it does not exist. See `create`."""
        store = store or _open_store(root, job, fsync=options.fsync)
        if store.exists(layout.JOB_FILE):
            return JobDirectory.open(store.root, store=store, fsync=options.fsync, now=options.now).check_plan(plan)
        return JobDirectory.create(root, plan, job=job, store=store, options=options)

    def check_plan(self, plan: Plan) -> JobDirectory:
        """Return self if ``plan`` describes the same work.

        Partition boundaries are not compared: they depend on the cluster, and a job may be resumed on another one.

        :raises PlanMismatch: when the work differs; the error lists the differences.
        """
        if plan.digest == self.record.plan:
            self._plan = plan
        else:
            same_work(self.plan, plan, store=self.store)
        return self

    @property
    def plan(self) -> Plan:
        """The stored plan, read when it is first needed. This thread works for the job from then on.

        :raises StateCorrupt: when the digest of the stored plan is not the one in ``job.json``.
        """
        if self._plan is None:
            plan = read_plan(self.store)
            if plan.digest != self.record.plan:
                raise StateCorrupt(
                    "plan.parquet is not the plan of this job",
                    where=self.store.url(PLAN_FILE),
                    found=plan.digest,
                    expected=self.record.plan,
                    next_step="restore the file, or run the job spec again as a new job",
                )
            self._plan = plan
        use_storage_options(self._plan.spec.storage)
        return self._plan

    @cached_property
    def recipe(self) -> StageRecipe:
        """Recipe with which workers score any partition of round 0."""
        return self.recipe_of(self.rounds.first)

    def recipe_of(self, round_: Round) -> StageRecipe:
        """Return the recipe with which workers score any partition of a round."""
        return round_.plan.recipe(
            job=self.id,
            directory=self.root,
            fsync=self.fsync,
            import_paths=self.record.import_paths,
            round=round_.number,
            # Of the whole job, so that rows that are scored again are of the same sample.
            sketch_every=sample_every(self.plan.rows) if self.plan.spec.report.distributions else 0,
        )

    def ledger(self, receipts: Iterable[Receipt] | None = None) -> Ledger:
        """Return the ledger over all rounds.

        :param receipts: Receipts of all rounds. Default: read from the directory.
        """
        # Rounds are read first: a receipt that lands later belongs to one of them, or counts in the next ledger.
        rounds = self.rounds.all()
        return Ledger(rounds, self.receipts.each() if receipts is None else receipts)

    def children(self) -> tuple[JobDirectory, ...]:
        """Return the jobs of a fan-out, in the order of their values."""
        if not self.record.children:
            return ()
        urls = (self.store.url(layout.child_folder(child.slug)) for child in self.plan.children)
        return tuple(JobDirectory.open(url, fsync=self.fsync, now=self._now) for url in urls)

    @property
    def is_ended(self) -> bool:
        """True if the job succeeded and no round was opened since. For a fan-out, all children must have ended, too."""
        if not self.status().is_success:
            return False
        if self.record.children:
            return all(child.is_ended for child in self.children())
        return self.committed() is not None

    def committed(self) -> Manifest | None:
        """Return the last manifest, if it names the rows of all rounds; those of the stages, too, if there are some."""
        last = self.manifests.last()
        if last is None or last.round != self.rounds.all()[-1].number:
            return None
        for sealed in last.inputs if self.record.stages else ():
            stage = JobDirectory.open(self.store.url(layout.stage_folder(sealed.stage)), fsync=self.fsync)
            found = stage.committed()
            if found is None or found.number != sealed.manifest:
                return None
        return last

    def resolve(self, path: str) -> str:
        """Return ``path`` of the spec as an absolute path or URL.

        Relative paths start from the folder in which the job was created.
        """
        if is_reference(path) or ("://" in path and not path.startswith("file://")):
            return path
        return str(local_path(os.path.join(self.record.working_directory, os.path.expanduser(path))))

    @contextmanager
    def hold(self, *, lease_seconds: float = LEASE_SECONDS) -> Iterator[Lease]:
        """Hold the lease of the job inside the block. Events that this object writes carry the epoch of the lease.

        :raises JobLocked: when another driver holds the lease.
        """
        with hold_lease(self.store, lease_seconds=lease_seconds) as lease:
            self.events.acquired(lease)
            yield lease

    def status(self) -> Status:
        """Return the status of the job, from the last status event that counts."""
        if (event := last_status(self.events.read())) is not None:
            return Status(event["after"])
        # A crash may have come between the creation of the job and its first event.
        return Status.QUEUED if self.store.list(layout.SUBMISSIONS) else Status.PLANNED

    def set_status(self, after: Status, *, reason: str = "", error: dict[str, Any] | None = None) -> StatusChanged:
        """Write the next status, with the fields of the error that caused it.

        A job that succeeded continues only where a round was opened since.

        :raises StateCorrupt: when ``after`` cannot follow the present status.
        :raises Fenced: when another driver has taken over the job.
        """
        before = self.status()
        check_transition(before, after, is_open=before is Status.SUCCEEDED and not self.is_ended)
        details = {"error": error} if error else {}
        self.events.append("status", before=str(before), after=str(after), reason=reason, **details)
        return StatusChanged(self.id, str(before), str(after), reason)

    def write_report(self, report: dict[str, Any]) -> None:
        """Write ``report.json``."""
        text = json.dumps(redact_values(report), indent=1, default=str)
        self.store.replace(layout.REPORT_FILE, text.encode() + b"\n")

    def read_report(self) -> dict[str, Any] | None:
        """Return ``report.json``; None if the file is missing or damaged. The report can be made from the receipts."""
        try:
            report = json.loads(self.store.read(layout.REPORT_FILE))
        except (FileNotFoundError, ValueError):
            return None
        return report if isinstance(report, dict) else None


def _open_store(root: str | os.PathLike[str], job: str, *, fsync: bool) -> Store:
    return open_store(f"{os.fspath(root)}/{check_job_id(job)}", private=True, fsync=fsync)


def _create_child(store: Store, plan: Plan, *, slug: str, parent: JobRecord, options: JobOptions) -> None:
    """Create the job directory of one child inside of its parent's."""
    JobDirectory.create(
        "",
        plan,
        job=child_id(parent.job, slug),
        store=open_store(store.url(layout.child_folder(slug)), private=True, fsync=options.fsync),
        options=replace(
            options,
            working_directory=parent.working_directory,
            first_status=DEFAULT_OPTIONS.first_status,
            reason=DEFAULT_OPTIONS.reason,
            parent=parent,
        ),
    )
