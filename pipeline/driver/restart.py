"""Start a job over: a round that scores every row again, after its model or the code of a step changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.common.units import iso_time, utc_now
from pipeline.driver.prepare import check_output, draft
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import Lease
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.rounds import RoundReason, make_record
from pipeline.models.model import ModelVersion
from pipeline.plan.plan import Plan
from pipeline.settings import Settings


def replan(job: JobDirectory, ledger: Ledger, *, pins: Mapping[str, ModelVersion], settings: Settings) -> Plan:
    """Return the plan of all rows of the files that count, with the code of the steps as it is now.

    :param pins: model version of each reference.
    """
    settings = replace(settings, import_paths=job.record.import_paths or settings.import_paths)
    spec, files = ledger.last.plan.spec, tuple(ledger.files.values())
    drafted = draft(spec, settings=settings, pins=pins, planned=files)
    check_output(drafted.plan, settings=settings, job=job.id)
    return replace(drafted.plan, quarantined_files=ledger.quarantined_files)


def open_restart_round(
    job: JobDirectory, lease: Lease, plan: Plan, *, reason: RoundReason, changes: Sequence[str]
) -> None:
    """Open the round of ``plan``, which scores every row again. No earlier round counts.

    :raises Fenced: when another driver has taken over the job.
    """
    record = make_record(
        plan,
        number=job.rounds.next_number(),
        reason=reason,
        epoch=lease.epoch,
        created=iso_time(utc_now()),
        supersedes={},
        changes=changes,
        rescore_all=True,
    )
    job.rounds.open(record, plan)
