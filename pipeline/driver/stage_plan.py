"""Plan a stage from the files of the stage before it, and the rows that a retry of that stage has added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from pipeline.common.units import iso_time, utc_now
from pipeline.driver.dask_plan import plan_work
from pipeline.driver.retry import number_partitions
from pipeline.errors import StateCorrupt
from pipeline.execution.clusters import cluster_of
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.rounds import RoundReason, make_record
from pipeline.jobs.stages import SealedStage
from pipeline.plan.outline import Stage, stage_spec
from pipeline.plan.plan import Plan
from pipeline.plan.planner import plan_stage
from pipeline.plan.pushdown import read_source
from pipeline.settings import Settings
from pipeline.sources import Discovery, discover


def plan_next_stage(plan: Plan, stage: Stage, before: SealedStage | None, *, settings: Settings) -> Plan:
    """Return the plan of a stage.

    :param plan: plan of the job.
    :param before: the stage whose files it reads; None for the first stage.
    :raises InsufficientMemory: when a worker cannot run it.
    """
    limits = cluster_of(plan.spec, settings=settings).limits()
    if stage.kind == "dask":
        files = None if before is None else discover_files(plan, stage, before, before.paths())
        folder = "" if before is None else before.job.store.url(layout.ROUNDS)
        inputs = () if before is None else (before.input,)
        return plan_work(plan, stage, files, inputs=inputs, folder=folder, limits=limits, settings=settings)
    if before is None:
        planned = plan_stage(plan, stage, limits=limits)
    else:
        planned = plan_stage(
            plan,
            stage,
            discovery=discover_files(plan, stage, before, before.paths()),
            inputs=(before.input,),
            folder=before.job.store.url(layout.ROUNDS),
            limits=limits,
        )
    planned.validate(limits)
    return planned


def discover_files(plan: Plan, stage: Stage, before: SealedStage, paths: Sequence[str]) -> Discovery:
    """Return files of the stage before, in the order of their rows, with the columns that ``stage`` reads."""
    schema = pa.ipc.read_schema(pa.py_buffer(plan.stages[stage.number - 1].output_schema))
    source = read_source(stage_spec(plan.spec, stage, folder=before.job.store.url(layout.ROUNDS)))
    if not paths:
        return Discovery((), schema, available=tuple(schema.names), filter=source.filter)
    found = discover(source.model_copy(update={"path": tuple(paths)}), columns=tuple(schema.names))
    if found.schema.names != schema.names or found.schema.types != schema.types:
        raise StateCorrupt(
            "the files of a stage have other columns than planned",
            where=before.job.root,
            found=", ".join(f"{field.name}: {field.type}" for field in found.schema),
            expected=", ".join(f"{field.name}: {field.type}" for field in schema),
            next_step="run the job spec again as a new job",
        )
    order = {path: number for number, path in enumerate(paths)}
    pairs = sorted(zip(found.files, found.measured, strict=True), key=lambda pair: order[pair[0].path])
    return replace(found, files=tuple(file for file, _ in pairs), measured=tuple(one for _, one in pairs))


def open_upstream_round(
    job: JobDirectory, plan: Plan, stage: Stage, before: SealedStage, *, settings: Settings
) -> None:
    """Open a round over the files that a retry has added to the stage before; none if the stage reads them already.

    Partitions that are left of earlier rounds are a part of it, since only the last round may have some.

    :param job: directory of ``stage``.
    :param plan: plan of the job whose stage it is.
    """
    ledger = job.ledger()
    if before.input in ledger.inputs:
        return
    added = [path for path in before.paths() if path not in ledger.files]
    limits = cluster_of(plan.spec, settings=settings).limits()
    folder = before.job.store.url(layout.ROUNDS)
    round_plan = plan_stage(
        plan,
        stage,
        discovery=discover_files(plan, stage, before, added),
        inputs=(before.input,),
        folder=folder,
        limits=limits,
    )
    last = ledger.last.plan
    # Code and models of the last round: a retry may have changed them, and one output has one of each.
    round_plan = replace(
        round_plan, spec=last.spec, chain=last.chain, model=last.model, features=last.features, code=last.code
    )
    pending = [partition.fragments for partition in ledger.todo]
    used = {fragment.path for fragments in pending for fragment in fragments}
    known = {**{file.path: file for file in last.files}, **ledger.files}
    round_plan = replace(
        round_plan,
        files=(*round_plan.files, *(known[path] for path in sorted(used - set(added)))),
        partitions=number_partitions([*(partition.fragments for partition in round_plan.partitions), *pending]),
    )
    round_plan.validate(limits)
    with job.hold(lease_seconds=settings.lease_seconds) as lease:
        record = make_record(
            round_plan,
            number=job.rounds.next_number(),
            reason=RoundReason.UPSTREAM,
            epoch=lease.epoch,
            created=iso_time(utc_now()),
            supersedes=ledger.pending,
            changes=(f"{before.name}: manifest {before.number}, {len(added):,} files added",),
        )
        job.rounds.open(record, round_plan)
