"""Open the rounds of a retry in the stages of a job.

A round scores again what its stage left out. What comes of it goes through the later stages in rounds of their own,
which `pipeline.driver.chain` opens once the stage before them is sealed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from pipeline.common.code_search import find_code
from pipeline.common.step_code import FoundCode, code_difference
from pipeline.common.units import iso_time, utc_now
from pipeline.driver.prepare import NO_FRAMES, chain_frames, check_chain_rules
from pipeline.driver.retry import (
    RetryRequest,
    RetryWork,
    added_memory,
    changed_spec,
    check_retried_output,
    find_work,
    known_columns,
    plan_changes,
    retry_models,
    sample_table,
    stored_discovery,
)
from pipeline.driver.score_models import scored_by
from pipeline.errors import SpecError
from pipeline.execution.clusters import cluster_of
from pipeline.jobs.code_archive import remember_packed
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.rounds import RoundReason, make_record
from pipeline.jobs.stages import StageState, stage_states
from pipeline.models.model import NO_MODEL
from pipeline.plan.chain import PlanDask, ResolvedChain, resolve_chain
from pipeline.plan.dask_recipe import DaskRecipe
from pipeline.plan.outline import outline, stage_spec
from pipeline.plan.plan import Limits, Plan
from pipeline.plan.pushdown import read_source
from pipeline.plan.recipe import ORIGIN, scores_of
from pipeline.scoring.steps import prepended_sys_path
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parts import DaskStep


def open_chain_retry(job: JobDirectory, request: RetryRequest, *, settings: Settings) -> bool:
    """Open a round in each stage with rows to score again. Return False when there are none, or only to resume.

    :param job: a job with stages, whose lease the caller holds.
    :raises SpecError: for a change that a retry cannot make.
    :raises OutputConflict: when another job has overwritten the output since.
    :raises PipelineError: for a step or model that cannot be used. In each case nothing was changed.
    """
    check_retried_output(job)
    stages = [(state, state.job, state.job.ledger()) for state in stage_states(job) if state.job is not None]
    if not stages:
        return False
    present = _present_spec(job.plan.spec, [(state, ledger) for state, _, ledger in stages])
    spec = changed_spec(present, request, settings=settings)
    _check_same_stages(present, spec)
    for _, directory, ledger in stages:
        remember_packed(directory.root, ledger.last.plan)
    code = find_code(spec.entrypoints, import_paths=job.record.import_paths)
    last = stages[-1][2].last.plan
    is_same = request.is_empty and not code_difference(last.code, code.steps)
    if is_same and any(ledger.last.number and ledger.todo for _, _, ledger in stages):
        return False
    chain = None
    if not is_same:
        with prepended_sys_path(job.record.import_paths):
            chain = _resolve(job, stages[0][2], present, spec, request, settings=settings, code=code)
    limits = cluster_of(spec, settings=settings).limits()
    opened = _find_rounds(stages, spec, chain, code=code, limits=limits)
    for directory, ledger, plan, work in opened:
        with directory.hold(lease_seconds=settings.lease_seconds) as lease:
            record = make_record(
                plan,
                number=directory.rounds.next_number(),
                reason=RoundReason.RETRY,
                epoch=lease.epoch,
                created=iso_time(utc_now()),
                supersedes=ledger.pending,
                changes=plan_changes(ledger.last.plan, plan),
                quarantined_files=work.still_rejected,
                repaired_files=[file.path for file in work.repaired],
            )
            directory.rounds.open(record, plan)
    return bool(opened)


Stages = Sequence[tuple[StageState, JobDirectory, Ledger]]


def _find_rounds(
    stages: Stages, spec: JobSpec, chain: ResolvedChain | None, *, code: FoundCode, limits: Limits
) -> list[tuple[JobDirectory, Ledger, Plan, RetryWork]]:
    """Return the rounds to open, with their plans. Behind a ``dask`` step that gets other rows there are none.

    :param chain: the changed steps; None if nothing changes.
    """
    opened: list[tuple[JobDirectory, Ledger, Plan, RetryWork]] = []
    for state, directory, ledger in stages:
        if state.stage.kind == "dask":
            # It makes all its rows anew, in another directory, if those before it get others.
            if opened and chain is not None:
                _check_unchanged_behind(state, stages, chain)
            if opened:
                break
            continue
        plan = ledger.last.plan
        if chain is not None:
            plan = _stage_plan(plan, state, ledger, spec, chain, code=code)
        work = find_work(directory, ledger, limits=limits)
        is_changed = plan.chain != ledger.last.plan.chain or plan.code != ledger.last.plan.code
        # A changed stage also gets a round without rows, for those that earlier stages add.
        if not work.partitions and not work.repaired and not (opened and is_changed):
            continue
        plan = replace(plan, files=work.files, partitions=work.partitions, pruned_rows=0, quarantined_files=())
        if chain is not None:
            plan.validate(limits)
        opened.append((directory, ledger, plan, work))
    return opened


def _present_spec(spec: JobSpec, stages: Sequence[tuple[StageState, Ledger]]) -> JobSpec:
    """Return the spec of a job with the steps that earlier retries have changed."""
    steps, errors = list(spec.steps), spec.errors
    for state, ledger in stages:
        changed = ledger.last.plan.spec
        steps[state.stage.first : state.stage.stop] = changed.steps
        limits = {"max_fraction": changed.errors.max_fraction, "max_rows": changed.errors.max_rows}
        errors = errors.model_copy(update=limits)
    return spec.model_copy(update={"steps": tuple(steps), "errors": errors})


def _check_same_stages(present: JobSpec, spec: JobSpec) -> None:
    before, after = ([stage.slug for stage in outline(one)] for one in (present, spec))
    if before != after:
        raise SpecError(
            "a retry cannot change where stages end",
            where="--set",
            found=", ".join(f"steps {slug}" for slug in after),
            expected=", ".join(f"steps {slug}" for slug in before),
            next_step="run the job spec again as a new job",
        )


def _resolve(
    job: JobDirectory,
    first: Ledger,
    present: JobSpec,
    spec: JobSpec,
    request: RetryRequest,
    *,
    settings: Settings,
    code: FoundCode,
) -> ResolvedChain:
    """Resolve all steps of the changed spec on the columns that the first stage reads."""
    for stage in outline(present):
        filters = [read_source(stage_spec(one, stage)).filter for one in (present, spec)]
        if filters[0] != filters[1]:
            raise SpecError(
                "a retry cannot change the filters with which files are read",
                where="--set",
                found=f"another filter step first in steps {stage.slug}",
                expected="the same filter steps there",
                next_step="run the job spec again as a new job",
            )
    models = retry_models(job.plan, spec, request, settings=settings)
    discovery = stored_discovery(first, stage_spec(spec, outline(spec)[0]))
    sample = sample_table(discovery, columns=first.base.plan.source_columns)
    frames = NO_FRAMES
    if spec.maps:
        frames = chain_frames(
            spec,
            sample,
            models,
            discovery,
            import_paths=job.record.import_paths,
            code=code,
            plan_dask=stored_dask(job.plan, present),
        )
    with known_columns(discovery.schema):
        scored = scored_by(spec, models)
        chain = resolve_chain(
            spec,
            discovery=discovery,
            map_schemas=frames.schemas,
            scored=scored,
            plan_dask=stored_dask(job.plan, present),
        )
    check_chain_rules(chain, sample.select(chain.source.names))
    return chain


def stored_dask(plan: Plan, spec: JobSpec) -> PlanDask:
    """Return what gives the ``dask`` steps of a job as they were planned.

    :param spec: spec of the job before the retry.
    """
    steps = [step for step in spec.steps if isinstance(step, DaskStep)]
    recipes = [step for step in plan.chain if isinstance(step, DaskRecipe)]

    def planned(step: DaskStep, schema: pa.Schema) -> DaskRecipe:
        for known, recipe in zip(steps, recipes, strict=True):
            if known == step:
                return recipe
        raise SpecError(
            "a retry cannot change a dask step",
            where="--set",
            found=step.dask,
            expected=", ".join(step.dask for step in steps),
            next_step="run the job spec again as a new job: all its rows are made anew",
        )

    return planned


def _check_unchanged_behind(state: StageState, stages: Stages, chain: ResolvedChain) -> None:
    """Refuse to change steps behind a ``dask`` step that is computed anew: they have no rows to retry.

    :raises SpecError: if a step behind the stage ``state`` is another one.
    """
    for later, _, ledger in stages:
        if later.stage.number <= state.stage.number or later.stage.kind == "dask":
            continue
        if ledger.last.plan.chain != chain.stages[later.stage.number].recipes:
            raise SpecError(
                "a retry cannot change steps on both sides of a dask step",
                where="--set, --model",
                found=f"rejected rows before steps {state.stage.slug}, and a change in steps {later.stage.slug}",
                expected="changes before the dask step only: all behind it is made anew",
                next_step="run the job spec again as a new job",
            )


def _stage_plan(
    last: Plan, state: StageState, ledger: Ledger, spec: JobSpec, chain: ResolvedChain, *, code: FoundCode
) -> Plan:
    """Return the plan of the last round of a stage with its changed steps.

    :raises SpecError: when they need other columns than the stage reads, or make other columns than it made.
    """
    resolved = chain.stages[state.stage.number]
    base = ledger.base.plan
    reads, writes = (pa.ipc.read_schema(pa.py_buffer(one)) for one in (base.source_schema, base.output_schema))
    missing = [name for name in resolved.source.names if name not in reads.names]
    if missing:
        raise SpecError(
            "a changed step needs a column that its stage does not read",
            where=f"steps {state.stage.slug}",
            found=", ".join(missing),
            expected=f"columns of {', '.join(reads.names)}",
            next_step="run the job spec again as a new job",
        )
    hidden = len(ORIGIN) if base.role and base.role.keeps_origin else 0
    made = [f"{field.name}: {field.type}" for field in list(writes)[: len(writes) - hidden]]
    wanted = [f"{field.name}: {field.type}" for field in resolved.output]
    if made != wanted:
        raise SpecError(
            "a retry must give the columns that the output has",
            where=f"--set, --model: steps {state.stage.slug}",
            found=", ".join(wanted),
            expected=", ".join(made),
            next_step="keep the columns and their order, or run the job spec again as a new job",
        )
    scores = scores_of(resolved.recipes)
    plan = replace(
        last,
        spec=stage_spec(spec, state.stage, folder=str(last.spec.source.path)),
        model=scores[0].model if scores else NO_MODEL,
        features=scores[0].features if scores else (),
        source_rules=chain.source_rules if not state.stage.number else (),
        chain=resolved.recipes,
        code=code.steps,
        sources=code.sources,
    )
    return replace(plan, task_memory=last.task_memory + added_memory(last, plan.models))
