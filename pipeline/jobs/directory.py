"""`JobDirectory`: the state of a job as files that ``ls`` and ``cat`` can read. It is the truth about the job.

Layout (docs/job-directory.md has every field)::

    <root>/<job id>/job.json  spec.yaml  plan.parquet  events.jsonl  report.json
                    rounds/<round>/{data,receipts,rejects}/  rounds/<n>.json  manifests/<n>.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipeline.common.secrets import redact_values
from pipeline.common.units import Clock, iso_time, utc_now
from pipeline.errors import (
    OutputConflict,
    StateCorrupt,
    StorageError,
)
from pipeline.events import StatusChanged
from pipeline.jobs import layout
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.manifest import Manifest, make_manifest
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.record import (
    JobRecord,
    check_job_id,
    check_owner,
    child_id,
    new_job_id,
    parse_event,
    record_of,
    same_work,
)
from pipeline.jobs.rounds import Round, RoundRecord, put_round, read_receipts, read_rounds
from pipeline.jobs.splits import partition_key
from pipeline.jobs.status import Status, check_transition
from pipeline.plan.plan import Plan
from pipeline.plan.recipe import StageRecipe
from pipeline.plan.table import PLAN_FILE, plan_bytes, read_plan
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import local_path, use_storage_options

__all__ = [
    "Committed",
    "JobDirectory",
    "JobRecord",
    "check_job_id",
    "check_owner",
    "new_job_id",
]


@dataclass(frozen=True)
class Committed:
    """A manifest that is durable."""

    manifest: Manifest
    landed: bool
    """False when the same one had been committed before."""


class JobDirectory:
    """One job's directory. Make one with `create`, `open` or `open_or_create`."""

    def __init__(
        self, store: Store, record: JobRecord, *, plan: Plan | None = None, fsync: bool = True, now: Clock = utc_now
    ) -> None:
        self.store = store
        self.fsync = fsync
        self.record = record
        self._plan = plan
        self._now = now
        self._rounds: dict[int, Round] = {}

    @property
    def root(self) -> str:
        """Absolute path or URL."""
        return self.store.root

    @property
    def job(self) -> str:
        """The id of the job."""
        return self.record.job

    @staticmethod
    def create(
        root: str | os.PathLike[str],
        plan: Plan,
        *,
        job: str,
        working_directory: str = "",
        import_paths: tuple[str, ...] = (),
        store: Store | None = None,
        fsync: bool = True,
        now: Clock = utc_now,
        first: Status = Status.PLANNED,
        reason: str = "run by hand",
        parent: JobRecord | None = None,
    ) -> JobDirectory:
        """Make the directory ``<root>/<job>`` for ``plan``. Of several that make the same one, all get the same job.

        :param root: folder or URL that holds the job directories.
        :param store: storage of the job's own directory, instead of the one at ``root``.
        :param fsync: see `pipeline.storage.store.open_store`; workers do the same.
        :param first: the status it begins with, for that ``reason``.
        :param parent: the fan-out whose child it is.
        :raises PlanMismatch: when the job is there with another plan.
        :raises RefusedForSafety: for a bad id, or a folder of another user.
        :raises UnsafeStore: when the storage cannot create a file exclusively.
        """
        store = store or open_store(f"{os.fspath(root)}/{check_job_id(job)}", private=True, fsync=fsync)
        check_owner(store)
        store.check_conditional_writes()
        store.put_if_absent(PLAN_FILE, plan_bytes(plan))
        children, plan = plan.children, same_work(read_plan(store), plan, store=store)
        store.put_if_absent(layout.SPEC_FILE, plan.spec.to_yaml().encode())
        record = record_of(
            plan,
            job=job,
            created=iso_time(now()),
            working_directory=working_directory or os.getcwd(),
            import_paths=import_paths,
            parent=parent,
        )
        for child in children or plan.children:
            # Before the job itself, whose presence means that all of it is there.
            place = open_store(store.url(layout.child_folder(child.slug)), private=True, fsync=fsync)
            JobDirectory.create(
                "", child.planned, job=child_id(job, child.slug), store=place, parent=record,
                working_directory=record.working_directory, import_paths=import_paths, fsync=fsync, now=now,
            )  # fmt: skip
        if store.put_if_absent(layout.JOB_FILE, record.to_json()):
            directory = JobDirectory(store, record, plan=plan, fsync=fsync, now=now)
            directory.append_event("status", before="", after=str(first), reason=reason)
            return directory
        return JobDirectory.open(store.root, store=store, fsync=fsync, now=now).check_plan(plan)

    @staticmethod
    def open(
        root: str | os.PathLike[str], *, store: Store | None = None, fsync: bool = True, now: Clock = utc_now
    ) -> JobDirectory:
        """The job whose directory is ``root``.

        :raises StateCorrupt: when it is no job directory.
        :raises RefusedForSafety: when it is another user's.
        """
        store = store or open_store(root, private=True, fsync=fsync)
        check_owner(store)
        try:
            record = JobRecord.from_json(store.read(layout.JOB_FILE), where=store.url(layout.JOB_FILE))
        except FileNotFoundError:
            raise StateCorrupt(
                "that is no job directory",
                where=store.root,
                found="no job.json",
                next_step="python -m pipeline list",
            ) from None
        return JobDirectory(store, record, fsync=fsync, now=now)

    @staticmethod
    def open_or_create(root: str | os.PathLike[str], plan: Plan, *, job: str, **options: Any) -> JobDirectory:
        """The job ``job`` under ``root`` when it has this very plan, made when it is not there. Options of `create`."""
        fsync, now = options.get("fsync", True), options.get("now", utc_now)
        store = options.pop("store", None)
        store = store or open_store(f"{os.fspath(root)}/{check_job_id(job)}", private=True, fsync=fsync)
        if store.exists(layout.JOB_FILE):
            return JobDirectory.open(store.root, store=store, fsync=fsync, now=now).check_plan(plan)
        return JobDirectory.create(root, plan, job=job, store=store, **options)

    def check_plan(self, plan: Plan) -> JobDirectory:
        """Itself, when ``plan`` does the work it was made for. The stored plan stays, however the other is cut: that
        depends on the cluster, and a job may be resumed on another one.

        :raises PlanMismatch: when not, with what differs.
        """
        if plan.digest == self.record.plan:
            self._plan = plan
        else:
            same_work(self.plan, plan, store=self.store)
        return self

    @property
    def plan(self) -> Plan:
        """The stored plan, read when it is first needed.

        :raises StateCorrupt: when it is not the one ``job.json`` names.
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
            use_storage_options(plan.spec.storage)
        return self._plan

    @cached_property
    def recipe(self) -> StageRecipe:
        """What workers need to do any partition."""
        return self.recipe_of(Round(0, self.record.plan, lambda: self.plan))

    def recipe_of(self, of: Round) -> StageRecipe:
        """What workers need to do any partition of a round."""
        paths = self.record.import_paths
        return of.plan.recipe(job=self.job, directory=self.root, fsync=self.fsync, import_paths=paths, round=of.number)

    def rounds(self) -> tuple[Round, ...]:
        """All rounds that were opened, by number; the first is that of the plan."""
        first = Round(0, self.record.plan, lambda: self.plan)
        found = read_rounds(self.store, self._rounds.get(0, first), known=self._rounds)
        self._rounds |= {one.number: one for one in found}
        return found

    def open_round(self, record: RoundRecord, plan: Plan) -> Round:
        """Put the next round on record. From then on it counts, and only it has something left to do.

        :raises Fenced: when another driver has opened a round of that number.
        """
        opened = put_round(self.store, record, plan)
        self.append_event("round", round=record.round, why=record.why, rows=record.rows)
        return opened

    def ledger(self, receipts: Iterable[Receipt] | None = None) -> Ledger:
        """What counts, over all rounds.

        :param receipts: of all rounds, when they are at hand; else they are read.
        """
        # The rounds first: a receipt that lands later is of one of these, or counts when the next one looks.
        rounds = self.rounds()
        return Ledger(rounds, self.each_receipt() if receipts is None else receipts)

    def children(self) -> tuple[JobDirectory, ...]:
        """The jobs of a fan-out, in the order of their values."""
        if not self.record.children:
            return ()
        places = (self.store.url(layout.child_folder(child.slug)) for child in self.plan.children)
        return tuple(JobDirectory.open(place, fsync=self.fsync, now=self._now) for place in places)

    @property
    def is_ended(self) -> bool:
        """Whether it succeeded, and no round was opened since; of a fan-out, in no child either."""
        if not self.status().is_success:
            return False
        if self.record.children:
            return all(child.is_ended for child in self.children())
        last = self.manifest()
        return last is not None and last.round == self.rounds()[-1].number

    def resolve(self, path: str) -> str:
        """``path`` of the spec as an absolute path or URL; relative ones start from where the job was made."""
        if "://" in path and not path.startswith("file://"):
            return path
        return str(local_path(os.path.join(self.record.working_directory, os.path.expanduser(path))))

    # Events and status

    def append_event(self, event: str, **fields: Any) -> None:
        """Add one line to ``events.jsonl``."""
        self.store.append(
            layout.EVENTS_FILE,
            json.dumps({"time": iso_time(self._now()), "event": event, **redact_values(fields)}, default=str),
        )

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first. Lines that a crash cut short are left out."""
        try:
            text = self.store.read(layout.EVENTS_FILE).decode(errors="replace")
        except FileNotFoundError:
            return []
        return [event for line in text.split("\n") if (event := parse_event(line)) is not None]

    def status(self) -> Status:
        """Where the job is in its life: the last status event decides."""
        for event in reversed(self.events()):
            if event["event"] == "status" and event.get("after") in Status.__members__:
                return Status(event["after"])
        # A crash may have come between the job and its first event.
        return Status.QUEUED if self.store.list(layout.SUBMISSIONS) else Status.PLANNED

    def set_status(self, after: Status, *, reason: str = "") -> StatusChanged:
        """Write the next status.

        :raises StateCorrupt: when it cannot follow on the present one.
        """
        before = self.status()
        check_transition(before, after)
        self.append_event("status", before=str(before), after=str(after), reason=reason)
        return StatusChanged(self.job, str(before), str(after), reason)

    # Receipts

    def receipts(self, *, round: int | None = None) -> tuple[Receipt, ...]:
        """All receipts of a round, or of all rounds, in source order, those of split partitions too.

        :param round: number of the round; None: all.
        :raises StateCorrupt: for one that is damaged, misnamed or of another plan.
        """
        found = self.each_receipt(round=round)
        return tuple(sorted(found, key=lambda receipt: (receipt.round, partition_key(receipt.partition))))

    def each_receipt(self, *, round: int | None = None) -> Iterator[Receipt]:
        """The same one after the other, in any order."""
        for one in self.rounds():
            if round in (None, one.number):
                yield from read_receipts(self.store, one)

    # Manifests and report

    def manifests(self) -> list[int]:
        """Numbers of the manifests that were committed, ascending."""
        return layout.numbers_of(self.store.list(layout.MANIFESTS))

    def manifest(self, number: int | None = None) -> Manifest | None:
        """The manifest with that number, or the last one; None when there is none."""
        numbers = self.manifests()
        number = number if number is not None else (numbers[-1] if numbers else None)
        if number not in numbers:
            return None
        name = layout.manifest_path(number)
        return Manifest.from_json(self.store.read(name), where=self.store.url(name))

    def next_manifest(self, ledger: Ledger) -> Manifest:
        """What `commit_manifest` takes: the manifest of ``ledger``, numbered on from the last one; that one itself
        when it names the same files of the same rounds already.

        :raises ReconciliationFailed: when the rows do not add up.
        """
        last = self.manifest()
        number, created = last.number if last else 1, iso_time(self._now())
        made = make_manifest(ledger, number=number, job=self.job, plan=self.record.plan, created=created)
        if last is None or (made.is_same_output(last) and made.round == last.round):
            return last or made
        return replace(made, number=last.number + 1)

    def commit_manifest(self, manifest: Manifest) -> Committed:
        """Write the manifest if its number is free. Only when this raises `OutputConflict` did it surely not land.

        :raises OutputConflict: when the number is taken by other content: another driver commits to this job.
        :raises StorageError: when the outcome is unknown; nothing may be deleted, and resume finds out.
        """
        name = layout.manifest_path(manifest.number)
        try:
            if self.store.put_if_absent(name, manifest.to_json()):
                return Committed(manifest, landed=True)
        except StorageError:
            # The reply may be lost while the file is there; when it is not, or cannot be read, the error stands.
            try:
                there = Manifest.from_json(self.store.read(name), where=self.store.url(name))
            except (OSError, StorageError, StateCorrupt):
                there = None
            if there is None or not there.is_same_output(manifest):
                raise
            return Committed(there, landed=True)
        there = Manifest.from_json(self.store.read(name), where=self.store.url(name))
        if not there.is_same_output(manifest):
            raise OutputConflict(
                "another driver has committed this job",
                where=self.store.url(name),
                found=f"{len(there.files)} files, {there.rows.out:,} rows, committed {there.created}",
                expected=f"{len(manifest.files)} files, {manifest.rows.out:,} rows",
                next_step=f"python -m pipeline status {self.job}",
            )
        return Committed(there, landed=False)

    def write_report(self, report: dict[str, Any]) -> None:
        """Set ``report.json``."""
        self.store.replace(
            layout.REPORT_FILE, json.dumps(redact_values(report), indent=1, default=str).encode() + b"\n"
        )

    def read_report(self) -> dict[str, Any] | None:
        """``report.json``; None when there is none (it can be made again from the receipts)."""
        try:
            report = json.loads(self.store.read(layout.REPORT_FILE))
        except (FileNotFoundError, ValueError):
            return None
        return report if isinstance(report, dict) else None
