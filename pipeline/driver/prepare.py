"""Prepare a job: turn a job spec into a plan, and select the input files. Nothing is written.

A job scores all files of its source; an incremental job, the files that are new to its sink.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipeline.common.code_search import find_code
from pipeline.common.digest import digest_json
from pipeline.common.rows import InputFile
from pipeline.common.step_code import FoundCode, StepCode, digests_of
from pipeline.common.step_output import shown_once
from pipeline.driver.score_models import resolve_models, scored_by, scored_steps, scored_version, with_listed_models
from pipeline.errors import InputChanged, MissingInput, PipelineError, SpecError
from pipeline.execution.clusters import ClusterAdapter, cluster_of, settings_of
from pipeline.execution.clusters.devices import options_on, with_expected
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import list_jobs
from pipeline.jobs.record import child_id
from pipeline.models.device_options import DeviceOptions, check_device, device_options
from pipeline.models.engines import check_engine
from pipeline.models.model import ModelVersion
from pipeline.plan.chain import ChainFrames, PlanDask, ResolvedChain, resolve_chain
from pipeline.plan.dask_recipe import DaskRecipe, DaskTable
from pipeline.plan.fan_out import Planner, plan_fan_out
from pipeline.plan.incremental import FULL_INPUT, IncrementalState, ListedFile, select_files
from pipeline.plan.outline import outline
from pipeline.plan.plan import Limits, Plan
from pipeline.plan.planner import last_schema, make_chain_plan, make_plan, plan_stages
from pipeline.plan.pushdown import located, pushed_filters, read_source
from pipeline.plan.recipe import CheckRecipe, scores_of_columns
from pipeline.scoring.contract import check_rules, has_values
from pipeline.scoring.outputs import prediction_schema
from pipeline.settings import Settings, device_choice
from pipeline.sinks import SinkRequest, check, read_published_inputs
from pipeline.sources import Discovery, FileSelection, discover, find_source, parse_filter, sample_batch
from pipeline.sources.changes import version_text
from pipeline.sources.locate import SourceFile, locate
from pipeline.sources.quarantine import check_file_count
from pipeline.sources.types import empty_table
from pipeline.sources.versions import is_same_version
from pipeline.spec.job_spec import AnyStep, JobSpec
from pipeline.spec.load import absolute, input_paths
from pipeline.spec.parts import DaskStep, Incremental
from pipeline.spec.precedence import Precedence
from pipeline.spec.score import Score, ScoreStep
from pipeline.spec.sink import Sink
from pipeline.storage.urls import is_local_path, local_path, use_storage_options

_NOT_THE_WORK = {
    "model",
    "models",
    "meta",
    "engine",
    "tolerance",
    "flavor",
    "allow_code",
    "threads",
    "model_files",
    "endpoint",
}
"""Fields of a ``score`` step that change no row, or are known from the model."""


_LATER = ("on_error", "timeout", "row_timeout", "concurrency", "rows_per_call")
"""Fields of ``map`` steps that digests leave out while they are empty: they came later."""


NO_FRAMES = ChainFrames()
"""Frames of a job without ``map`` steps."""


@dataclass(frozen=True)
class Prepared:
    """A plan that fits its cluster."""

    plan: Plan
    limits: Limits
    cluster: ClusterAdapter
    device: DeviceOptions
    """Devices that may evaluate the model; of a fan-out, that of its first child."""


def prepare(
    spec: JobSpec,
    *,
    settings: Settings,
    job: str = "",
    pins: Mapping[str, ModelVersion] | None = None,
    cluster: ClusterAdapter | None = None,
) -> Prepared:
    """Resolve the models, read the footers, plan, and reject a job that cannot run.

    :param job: Id of the job, if it may exist already.
    :param pins: Model version of each reference that is pinned already.
    :param cluster: the chosen cluster, if its file was read already.
    :raises PipelineError: for anything in the spec, the input or the model that would not work.
    """
    prepared = draft(spec, settings=settings, pins=pins, cluster=cluster)
    check_output(prepared.plan, settings=settings, job=job)
    if spec.gate is not None:
        from pipeline.report.gate import check_gate_plan  # plans of most jobs need no report

        check_gate_plan(prepared.plan, root=settings.directory)
    return prepared


def draft(
    spec: JobSpec,
    *,
    settings: Settings,
    pins: Mapping[str, ModelVersion] | None = None,
    planned: Collection[InputFile] | None = None,
    cluster: ClusterAdapter | None = None,
) -> Prepared:
    """Prepare a job without checking its sink.

    :param pins: Model version of each reference that is pinned already.
    :param planned: The only input files to plan, if they were planned before.
    :param cluster: the chosen cluster, if its file was read already.
    :raises PipelineError: for anything in the spec, the input or the model that would not work.
    """
    use_storage_options(spec.storage)
    cluster = cluster or cluster_of(spec, settings=settings)
    settings = settings_of(spec, settings=settings)
    drafting = _Drafting(settings, cluster.limits(), planned, dict(pins or {}))
    if spec.fan_out is not None:
        refuse_incremental(spec)
        _refuse_quarantine(spec)
        plan = plan_fan_out(drafting.with_models(absolute(spec)), Planner(drafting.discover, drafting.plan))
    else:
        spec = drafting.with_models(absolute(spec))
        discovery, progress = select_input(
            spec, drafting.models(spec), settings=settings, planned=planned, code=drafting.code(spec).steps
        )
        check_file_count(discovery.rejected, limit=spec.errors.max_files)
        plan = drafting.plan(spec, discovery, progress=progress)
    first = plan.children[0].planned if plan.children else plan
    device = options_on(cluster, requested_device(first.spec, first.score_models, settings=drafting.settings))
    device = with_expected(device, cluster, first, threads=drafting.limits.threads)
    return Prepared(plan, drafting.limits, cluster, device)


def requested_device(spec: JobSpec, versions: Sequence[ModelVersion], *, settings: Settings) -> DeviceOptions:
    """Return the devices that can evaluate all models of a job, by what was requested.

    :param versions: model version of each model reference, in order.
    :param settings: with those of the chosen cluster's file.
    :raises ModelError: when GPUs are requested, and they cannot compute the CPU's bits.
    """
    choice = device_choice(spec, settings=settings)
    is_given = choice.rank is not Precedence.BUILT_IN
    if not versions:
        return DeviceOptions("cpu", ("no step scores",), is_given)
    has_limits = any(step.timeout is not None or step.row_timeout is not None for step in spec.maps)
    found = []
    for version, score in zip(versions, scored_steps(spec), strict=True):
        asked: dict[str, Any] = {"kind": score.output_spec.kind, "engine": score.engine, "has_limits": has_limits}
        check_device(choice.value, version, **asked)
        found.append(device_options(choice.value, version, is_given=is_given, **asked))
    reasons = tuple(dict.fromkeys(reason for options in found for reason in options.reasons))
    return replace(found[0], reasons=reasons)


def _refuse_quarantine(spec: JobSpec) -> None:
    """Refuse to quarantine files in a fan-out: the child that an unreadable file belongs to is unknown.

    :raises SpecError: when the spec requests it.
    """
    if spec.errors.files == "quarantine":
        raise SpecError(
            "a fan-out cannot quarantine files",
            where="errors.files",
            found="quarantine, and fan_out",
            expected="fail",
            next_step="leave errors.files out, or run the job without fan_out",
        )


@dataclass
class _Drafting:
    """A planner of jobs that computes the parts shared by several children once."""

    settings: Settings
    limits: Limits
    planned: Collection[InputFile] | None = None
    versions: dict[str, ModelVersion] = field(default_factory=dict)
    """Model versions by reference: the pinned ones, and those that were resolved."""
    samples: dict[tuple[Any, ...], Sample] = field(default_factory=dict)
    """Rows of the source and after the steps, by steps, input schema and columns without nulls."""
    listings: dict[str, dict[str, str]] = field(default_factory=dict)
    """References of the models of each listing, by key: listed once, so that the plan holds what was inspected."""
    dask_recipes: dict[tuple[str, bytes], DaskRecipe] = field(default_factory=dict)
    """Planned ``dask`` steps, by step and schema of their rows."""
    tables: dict[str, DaskTable] = field(default_factory=dict)
    """Tables of ``dask`` steps, each discovered once."""
    codes: dict[tuple[str, ...], FoundCode] = field(default_factory=dict)
    """Code of the ``map`` steps, by their names."""

    def discover(self, spec: JobSpec) -> Discovery:
        """Return the files of the source of ``spec``."""
        return discover_input(absolute(spec), planned=self.planned)

    def plan(self, spec: JobSpec, discovery: Discovery, *, progress: IncrementalState = FULL_INPUT) -> Plan:
        """Return the plan of one job over the discovered files.

        :param progress: State that an incremental job continues from.
        :raises PipelineError: for anything that would not work.
        """
        spec = self.with_models(absolute(spec))
        refuse_restart(spec)
        versions = self.models(spec)
        for score, version in zip(scored_steps(spec), versions, strict=True):
            check_engine(score.engine, version, kind=score.output_spec.kind)
        requested_device(spec, versions, settings=self.settings)
        plan = self._plan_chain if not spec.is_plain else self._plan_plain
        made = plan(spec, versions, discovery, progress)
        made.validate(self.limits)
        code = self.code(spec)
        return replace(made, code=code.steps, sources=code.sources)

    def _plan_plain(
        self, spec: JobSpec, versions: Sequence[ModelVersion], discovery: Discovery, progress: IncrementalState
    ) -> Plan:
        """Return the plan of ``map`` steps and one score of all rows."""
        frames = self._sample(spec, discovery, discovery.schema).schemas if spec.maps else ()
        plan = make_plan(
            spec,
            model=versions[0],
            discovery=discovery,
            frame_schemas=frames,
            predictions=prediction_schema(versions[0], spec.score.output_spec),
            limits=self.limits,
            progress=progress,
        )
        self._check_contract(plan, discovery)
        return plan

    def _plan_chain(
        self, spec: JobSpec, versions: Sequence[ModelVersion], discovery: Discovery, progress: IncrementalState
    ) -> Plan:
        """Return the plan of steps in any number and order."""
        sample = _source_sample(spec, discovery, discovery.schema) if spec.maps or spec.contract else None
        frames = NO_FRAMES
        if sample is not None and spec.maps:
            paths = self.settings.import_paths
            frames = chain_frames(
                spec,
                sample,
                versions,
                discovery,
                import_paths=paths,
                code=self.code(spec),
                plan_dask=self._plan_dask(spec),
            )
        scored = scored_by(spec, versions)
        chain = resolve_chain(
            spec, discovery=discovery, map_schemas=frames.schemas, scored=scored, plan_dask=self._plan_dask(spec)
        )
        check_chain_rules(chain, sample and sample.select(chain.source.names))
        plan = make_chain_plan(spec, chain=chain, discovery=discovery, limits=self.limits, progress=progress)
        return plan_stages(plan, chain, limits=self.limits, never_null=frames.never_null)

    def _plan_dask(self, spec: JobSpec) -> PlanDask | None:
        """Return what plans the ``dask`` steps of ``spec``; None if it has none."""
        if not any(isinstance(step, DaskStep) for step in spec.steps):
            return None
        from pipeline.driver.dask_plan import plan_step  # imports dask.dataframe, which takes seconds

        def plan(step: DaskStep, schema: pa.Schema) -> DaskRecipe:
            key = step.model_dump_json(), bytes(schema.serialize().to_pybytes())
            if key not in self.dask_recipes:
                self.dask_recipes[key] = plan_step(
                    step, schema, code=self.code(spec), settings=self.settings, tables=self.tables
                )
            return self.dask_recipes[key]

        return plan

    def code(self, spec: JobSpec) -> FoundCode:
        """Return the code of the steps of ``spec``. It is read once, so that the sample runs what the plan names."""
        entrypoints = spec.entrypoints
        if entrypoints not in self.codes:
            self.codes[entrypoints] = find_code(entrypoints, import_paths=self.settings.import_paths)
        return self.codes[entrypoints]

    def _check_contract(self, plan: Plan, discovery: Discovery) -> None:
        """Make every check of the contract and of the model's own rules, as workers will; see `check_rules`."""
        sample, schema = None, pa.ipc.read_schema(pa.py_buffer(plan.source_schema))
        if has_values((*plan.source_rules, *plan.score_rules)):
            sample = self._sample(plan.spec, discovery, schema)
        check_rules(schema, plan.source_rules, sample=sample and sample.source)
        check_rules(last_schema(plan.frames, schema), plan.score_rules, sample=sample and sample.mapped)

    def _sample(self, spec: JobSpec, discovery: Discovery, schema: pa.Schema) -> Sample:
        key = tuple(step.model_dump_json() for step in spec.maps), schema.serialize().to_pybytes(), discovery.never_null
        if key not in self.samples:
            self.samples[key] = _read_sample(spec, discovery, schema, settings=self.settings, code=self.code(spec))
        return self.samples[key]

    def models(self, spec: JobSpec) -> tuple[ModelVersion, ...]:
        """Return the model version of each model reference of ``spec``, in order."""
        pairs = list(zip(spec.references, scored_steps(spec), strict=True))
        self.versions |= resolve_models(pairs, known=self.versions, settings=self.settings)
        return tuple(scored_version(self.versions[reference], score) for reference, score in pairs)

    def with_models(self, spec: JobSpec) -> JobSpec:
        """Return ``spec`` with the models that each of its listings has now, by name.

        :raises ModelError: for a listing without models.
        """
        return with_listed_models(spec, settings=self.settings, listed=self.listings)


def check_output(plan: Plan, *, settings: Settings, job: str = "") -> None:
    """Refuse a plan whose sink cannot or must not be written; see `pipeline.sinks.check`.

    :param job: Id of the job, if it may have published already.
    """
    for child in plan.children:
        if child.plan is not None:
            check_output(child.plan, settings=settings, job=child_id(job, child.slug) if job else "")
    if plan.children:
        return
    request = SinkRequest(
        sources=input_paths(plan.spec),
        job=job,
        schema=plan.output_schema,
        plan=plan.digest,
        state=(str(local_path(settings.directory)),) if is_local_path(settings.directory) else (),
    )
    check(plan.spec.sink, request)


def first_sink(plan: Plan) -> Sink:
    """Return the sink of a plan; for a fan-out, the sink of its first child."""
    first = plan.children[0].plan if plan.children else None
    return (first or plan).spec.sink


@dataclass(frozen=True)
class Sample:
    """The first rows of a source, which planning reads."""

    source: pa.Table
    """Rows with the columns that the job reads; none if the first files hold no row that the filter keeps."""
    mapped: pa.Table
    """Those rows after the last ``map`` step."""
    schemas: tuple[pa.Schema, ...]
    """Schema after each ``map`` step."""


def _read_sample(
    spec: JobSpec, discovery: Discovery, schema: pa.Schema, *, settings: Settings, code: FoundCode
) -> Sample:
    """Read the first rows of the source, and run the ``map`` steps on them.

    :param schema: schema of a source batch.
    """
    rows = _source_sample(spec, discovery, schema)
    if not spec.maps:
        return Sample(rows, rows, ())
    from pipeline.scoring.step_plan import plan_frames  # imports pandas, which only steps need

    # The text that a step prints must not mix with the result of a command.
    with shown_once():
        frames = plan_frames(
            spec.maps, rows, never_null=discovery.never_null, import_paths=settings.import_paths, code=code
        )
    return Sample(rows, frames.rows, frames.schemas)


def _source_sample(spec: JobSpec, discovery: Discovery, schema: pa.Schema) -> pa.Table:
    """Return the first rows of the source; none if the first files hold no row that the filter keeps."""
    columns = [name for name in schema.names if name not in discovery.key_names]
    is_lenient = spec.errors.files == "quarantine"
    batch = sample_batch(discovery, columns=columns, schema=schema, skip_unreadable=is_lenient)
    return empty_table(schema) if batch is None else batch.table


def chain_frames(
    spec: JobSpec,
    sample: pa.Table,
    versions: Sequence[ModelVersion],
    discovery: Discovery,
    *,
    import_paths: Sequence[str],
    code: FoundCode,
    plan_dask: PlanDask | None = None,
) -> ChainFrames:
    """Return the columns after each ``map`` step of a chain, by running the steps on rows of the source."""
    from pipeline.scoring.chain_plan import plan_chain_frames  # imports pandas, which only steps need

    with shown_once():
        return plan_chain_frames(
            spec.steps,
            sample,
            models=versions,
            never_null=discovery.never_null,
            import_paths=import_paths,
            code=code,
            ends=[stage.first for stage in outline(spec)[1:]],
            plan_dask=plan_dask,
        )


def check_chain_rules(chain: ResolvedChain, sample: pa.Table | None) -> None:
    """Make every check of the rules of a chain, as workers will; see `check_rules`.

    :param sample: rows of the source.
    """
    check_rules(chain.source, chain.source_rules, sample=sample)
    for recipe, schema in zip(chain.recipes, chain.before, strict=True):
        if isinstance(recipe, CheckRecipe):
            check_rules(schema, recipe.rules)
        for score in scores_of_columns(recipe):
            check_rules(schema, score.rules)


def discover_input(spec: JobSpec, **options: Any) -> Discovery:
    """Return the files of the source of ``spec``, read with its pushed ``filter`` steps; see `discover`.

    :param spec: Job spec with absolute paths.
    :raises SpecError: for a filter that the source's columns do not fit.
    """
    options = {"count_nulls": bool(spec.maps), **options}
    pushed = pushed_filters(spec)
    if not pushed:
        return discover(spec.source, **options)
    try:
        return discover(read_source(spec), **options)
    except SpecError:
        schema = discover(spec.source, **options).schema  # raises what is wrong with the source alone
        for number, text in pushed.items():
            try:
                parse_filter(text).check(schema)
            except SpecError as error:
                raise located(error, f"steps.{number}.filter") from None
        raise


def select_input(
    spec: JobSpec,
    models: Sequence[ModelVersion],
    *,
    settings: Settings,
    planned: Collection[InputFile] | None = None,
    code: Sequence[StepCode] = (),
) -> tuple[Discovery, IncrementalState]:
    """Return the files to score, and the state that an incremental job continues from.

    :param spec: Job spec with absolute paths.
    :param planned: The only files, if they were planned before.
    :param code: Code of the ``map`` steps.
    :raises SpecError: for an incremental job that does not append.
    :raises PipelineError: for an unusable input, or an unreadable history in the sink.
    """
    policy, is_lenient = spec.source.incremental, spec.errors.files == "quarantine"
    if policy is False:
        return discover_input(spec, planned=planned, quarantine_files=is_lenient), FULL_INPUT
    if planned is not None:
        selection = {file.path: FileSelection(file.reason, file.published_row_groups) for file in planned}
        discovery = discover_input(spec, planned=planned, selection=selection)
        return discovery, IncrementalState(work=work_digest(spec, models, code))
    return _select_increment(spec, policy, work=work_digest(spec, models, code), settings=settings)


def _select_increment(
    spec: JobSpec, policy: bool | Incremental, *, work: str, settings: Settings
) -> tuple[Discovery, IncrementalState]:
    """Return the files that are new since the last publication, and the state that the job continues from."""
    is_lenient = spec.errors.files == "quarantine"
    if spec.sink.mode != "append":
        raise SpecError(
            "an incremental job adds to its sink",
            where="sink.mode",
            found=spec.sink.mode,
            expected="append",
            next_step="--set sink.mode=append; to publish everything again, choose an empty sink.path",
        )
    unusable: list[MissingInput] | None = [] if is_lenient else None
    located = {file.path: file for file in locate(spec.source.path, base=spec.source.base, unusable=unusable)}
    before = read_published_inputs(spec.sink, name=spec.name)
    increment = select_files(
        [ListedFile(file.path, file.size, file.identity) for file in located.values()],
        before.work,
        kept=before.files,
        work=work,
        on_model_change=policy.on_model_change if isinstance(policy, Incremental) else "new",
        marks=lambda path: find_source(spec.source.reader).identify(located[path]),
        failed=_failed_before(spec.name, settings),
    )
    discovery = discover_input(spec, selection=increment.files, quarantine_files=is_lenient)
    if not increment.files:
        return replace(discovery, files=(), rejected=(), measured=()), increment.progress
    _check_unchanged(discovery, located)
    return discovery, increment.progress


def refuse_restart(spec: JobSpec) -> None:
    """Refuse a job of several stages that starts over when a model or code changes: sealed stages would keep the old.

    :raises SpecError: if the spec requests it.
    """
    if spec.has_dask and spec.source.incremental is not False:
        raise SpecError(
            "an incremental job has no dask steps",
            where="source.incremental",
            found="a dask step among the steps",
            expected="all rows: a join or a group of only the new ones would be wrong",
            next_step="leave source.incremental out",
        )
    for name in ("on_alias_change", "step_change"):
        if spec.has_stages and getattr(spec, name) == "restart":
            raise SpecError(
                "a job with checkpoints does not start over by itself",
                where=name,
                found="restart, and a checkpoint among the steps",
                expected="pin or fail",
                next_step=f"{name}: fail stops such a job before it publishes; then run it as a new job",
            )


def refuse_incremental(spec: JobSpec) -> None:
    """Refuse a fan-out over an incremental source.

    :raises SpecError: if the source is incremental.
    """
    if spec.source.incremental is not False:
        raise SpecError(
            "an incremental job does not fan out",
            where="source.incremental",
            found="fan_out beside it",
            expected="one of the two",
            next_step="write a job spec, or a trigger with params, for each value",
        )


def work_digest(spec: JobSpec, models: Sequence[ModelVersion], code: Sequence[StepCode] = ()) -> str:
    """Return the SHA-256 of everything that is done with a row: models, steps and their code, filter, contract.

    :param models: model version of each model reference, in order.
    """
    scores = list(map(_identity, spec.scores))
    if spec.is_plain:
        (model,) = models
        steps = {
            "model": [model.digest, model.flavor],
            "maps": list(map(_step_identity, spec.maps)),
            "score": scores[0],
        }
    else:
        others = [step for step in spec.steps if not isinstance(step, ScoreStep)]
        steps = {
            "models": [[model.digest, model.flavor] for model in models],
            "kinds": [type(step).__name__ for step in spec.steps],
            "steps": list(map(_step_identity, others)),
            "scores": scores,
        }
    return digest_json(
        {
            **steps,
            "code": digests_of(code),
            "filter": spec.source.filter,
            "contract": {name: rule.model_dump(mode="json") for name, rule in spec.contract.items()},
        }
    )


def _step_identity(step: AnyStep) -> dict[str, Any]:
    """Return what a step other than ``score`` does with a row, with defaults but for fields that came later."""
    record = step.model_dump(mode="json")
    return {name: value for name, value in record.items() if value or name not in _LATER}


def _identity(score: Score) -> dict[str, Any]:
    """Return what a ``score`` step does with a row, apart from its models."""
    record = score.model_dump(mode="json", exclude=_NOT_THE_WORK)
    if score.meta is None:  # as before there were stacks
        del record["meta_input"]
    if score.by is None:  # as before there was a model by key
        return {name: value for name, value in record.items() if name not in ("by", "other")}
    other = {"other": "model"} if score.other_model is not None else {}
    return {**record, "keys": list(score.keyed_models), **other}


def _check_unchanged(discovery: Discovery, located: dict[str, SourceFile]) -> None:
    for file in discovery.files:
        before = located[file.path]
        if not is_same_version(file.path, (file.size, file.version), (before.size, before.identity)):
            raise InputChanged(
                "an input file changed while the job was planned",
                where=file.path,
                found=version_text(file.size, file.version),
                expected=version_text(before.size, before.identity),
                next_step="run it again once the file is complete",
            )


def _failed_before(name: str, settings: Settings) -> dict[str, str]:
    """Return the files of the last job of that name, with its id, if the job failed. They explain a selection."""
    try:
        last = next((job for job in list_jobs(settings.directory) if job.record.name == name), None)
        if last is None or last.status.is_success or not last.status.is_final:
            return {}
        paths: Sequence[str] = [file.path for file in JobDirectory.open(last.directory).plan.files]
    except PipelineError:
        return {}
    return dict.fromkeys(paths, last.record.job)
