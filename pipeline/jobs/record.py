"""`JobRecord`: the content of ``job.json``; ids of jobs; checks of the stored plan and of the directory's owner."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from pipeline.errors import PlanMismatch, RefusedForSafety, StateCorrupt
from pipeline.plan.describe import difference
from pipeline.plan.plan import Plan
from pipeline.storage.store import Store

_JOB_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


def new_job_id(name: str, *, now: datetime, entropy: str) -> str:
    """Return an id such as ``churn-nightly-20260101-120000-a1b2``.

    Ids sort by name and time. ``entropy`` (a few hex digits) makes them unique.
    """
    return check_job_id(f"{name}-{now.astimezone(UTC):%Y%m%d-%H%M%S}-{entropy}")


def check_job_id(job: str) -> str:
    """Return ``job`` if it is valid as the name of a folder.

    :raises RefusedForSafety: when ``job`` is not valid.
    """
    if not _JOB_ID.fullmatch(job):
        raise RefusedForSafety(
            "invalid job id",
            where="--job",
            found=repr(job),
            expected="lower-case letters, digits, ._- (100 at most)",
            next_step="choose such an id, or leave --job out to get a new one",
        )
    return job


_FAN_OUT_FIELDS = ("children", "parent", "publishes_itself", "publishes_children_together")
_STAGE_FIELDS = ("stages", "stage")


def child_id(parent: str, slug: str) -> str:
    """Return the job id of a child of a fan-out."""
    return f"{parent}.{slug}"


@dataclass(frozen=True)
class JobRecord:
    """The content of ``job.json``. The file never changes; a job exists once it has this file."""

    job: str
    name: str
    created: str
    """UTC, ISO 8601."""
    plan: str
    """Digest of the plan."""
    spec: str
    """Digest of the job spec."""
    model: dict[str, str]
    """Name, version and digest of the pinned model version."""
    rows: int
    """Rows of the input files, including those that a filter will drop."""
    partitions: int
    sink: str
    working_directory: str
    """Folder that relative paths of the spec start from."""
    import_paths: tuple[str, ...] = ()
    """Folders from which the modules of the steps are imported."""
    children: int = 0
    """Number of children of a fan-out; 0 for any other job."""
    parent: str = ""
    """Job id of the fan-out whose child the job is, or of the job whose stage it is; empty for any other job."""
    publishes_itself: bool = True
    """False: its parent publishes the job together with the other children, or as the last of its stages."""
    publishes_children_together: bool = False
    """True for a fan-out that publishes its children only once all are ready."""
    stages: int = 0
    """Number of stages of a job with checkpoints between its steps; 0 for any other job."""
    stage: str = ""
    """Name of the folder of a stage; empty for a job. ``parent`` is then the job whose stage it is."""

    def to_json_bytes(self) -> bytes:
        """The record as stored, with a schema version. Fields of fan-outs are left out of other jobs."""
        record = asdict(self)
        if not self.children and not self.parent:
            record = {name: value for name, value in record.items() if name not in _FAN_OUT_FIELDS}
        record = {name: value for name, value in record.items() if value or name not in _STAGE_FIELDS}
        return json.dumps({"schema_version": 1, **record}, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes, *, where: str) -> JobRecord:
        """Inverse of `to_json_bytes`.

        :raises StateCorrupt: for anything else.
        """
        try:
            record = json.loads(data)
            if record.pop("schema_version") != 1:
                raise ValueError("unknown schema_version")
            return JobRecord(**{**record, "import_paths": tuple(record["import_paths"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateCorrupt(
                "job.json is damaged",
                where=where,
                found=f"{type(error).__name__}: {error}",
                expected="the JSON that was written when the job was made",
                next_step="restore the file, or run the job spec again as a new job",
            ) from error


def record_of(
    plan: Plan,
    *,
    job: str,
    created: str,
    working_directory: str,
    import_paths: tuple[str, ...],
    parent: JobRecord | None = None,
    stage: str = "",
) -> JobRecord:
    """Make the record of a new job.

    :param parent: Record of the fan-out whose child the job is, or of the job whose stage it is.
    :param stage: Name of a stage's folder; empty for any other job.
    """
    return JobRecord(
        job=job,
        name=plan.spec.name,
        created=created,
        plan=plan.digest,
        spec=plan.spec.digest,
        model=plan.model_details,
        rows=plan.rows,
        partitions=len(plan.partitions) + sum(child.partitions for child in plan.children),
        sink=plan.spec.sink.place,
        working_directory=working_directory,
        import_paths=import_paths,
        children=len(plan.children),
        parent=parent.job if parent else "",
        publishes_itself=not stage and (parent is None or not parent.publishes_children_together),
        publishes_children_together=plan.spec.fan_out is not None and plan.spec.fan_out.publish == "all",
        stages=0 if plan.children else len(plan.stages),
        stage=stage,
    )


def check_owner(store: Store) -> None:
    """Refuse a local folder that belongs to another user, who could run code as this user by writing there.

    :raises RefusedForSafety: when the folder belongs to another user.
    """
    if not store.is_local or not os.path.lexists(store.root):
        return
    owner, me = os.lstat(store.root).st_uid, os.geteuid()
    if owner != me:
        raise RefusedForSafety(
            "the job directory belongs to another user",
            where=store.root,
            found=f"user id {owner}",
            expected=f"user id {me}",
            next_step="choose another place with --directory or pipeline.directory",
        )


def same_work(stored: Plan, wanted: Plan, *, store: Store) -> Plan:
    """Return the stored plan if ``wanted`` describes the same work.

    :raises PlanMismatch: when the work differs; the error lists the differences.
    """
    if stored.digest == wanted.digest or stored.work_digest == wanted.work_digest:
        return stored
    raise PlanMismatch(
        "the job directory belongs to another plan",
        where=store.root,
        found="; ".join(difference(stored, wanted)) or f"plan {stored.digest[:12]}",
        expected=f"plan {wanted.digest[:12]}",
        next_step="run the job spec as a new job, or undo the change and resume",
    )
