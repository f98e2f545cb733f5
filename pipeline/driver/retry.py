"""Open the round of a retry: rows that are still rejected, pending partitions, and files that were repaired.

The round is planned and recorded here; `pipeline.runner` runs it. Rejected rows become partitions of its plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.common.code_search import find_code
from pipeline.common.rows import Fragment, InputFile, QuarantinedFile, RowGroup
from pipeline.common.step_code import FoundCode, code_difference
from pipeline.common.text import listed
from pipeline.common.units import iso_time, utc_now
from pipeline.driver.prepare import NO_FRAMES, chain_frames, check_chain_rules
from pipeline.driver.score_models import resolve_model, scored_by, scored_steps, scored_version, with_listed_models
from pipeline.errors import InputError, OutputConflict, SchemaDrift, SpecError, StateCorrupt
from pipeline.execution.clusters import cluster_of
from pipeline.jobs.code_archive import remember_packed
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger, rejects_path
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.retention import rejects_removed
from pipeline.jobs.rounds import Round, RoundReason, make_record
from pipeline.jobs.splits import sub_fragment
from pipeline.models.engines import check_engine
from pipeline.models.model import NO_MODEL, ModelVersion
from pipeline.plan.chain import resolve_chain
from pipeline.plan.columns import Columns, resolve_columns
from pipeline.plan.describe import spec_difference
from pipeline.plan.memory import shared_memory
from pipeline.plan.packing import pack
from pipeline.plan.plan import Limits, Partition, Plan
from pipeline.plan.planner import last_schema
from pipeline.plan.pushdown import pushed_filters, read_source
from pipeline.plan.recipe import REJECT_FILE, scores_of
from pipeline.scoring.contract import check_rules
from pipeline.scoring.outputs import prediction_schema
from pipeline.scoring.reject_masking import masked_columns
from pipeline.scoring.steps import prepended_sys_path
from pipeline.settings import Settings
from pipeline.sinks import read_published
from pipeline.sources import Discovery, SourceBatch, find_source, parse_filter, sample_batch
from pipeline.sources.locate import has_version
from pipeline.sources.types import empty_table
from pipeline.spec.job_spec import NOT_THE_WORK, JobSpec
from pipeline.spec.load import absolute
from pipeline.spec.parts import SelectStep
from pipeline.spec.score import ScoreStep
from pipeline.storage.store import Store

MAY_CHANGE = ("steps", "contract", "errors")
"""Fields of a job spec that a retry may set."""
_SAMPLED_FILES = 8


@dataclass(frozen=True)
class RetryRequest:
    """Changes that the caller of a retry requests. By default, the retry uses what the last round used."""

    model: str | None = None
    """Model reference or file."""
    overrides: tuple[str, ...] = ()
    """``field=value`` each, such as ``steps.0.map=features:build_fixed``."""

    @property
    def is_empty(self) -> bool:
        """True if no change is requested."""
        return self.model is None and not self.overrides


def open_retry(job: JobDirectory, request: RetryRequest, *, epoch: int, settings: Settings) -> Round | None:
    """Open the round of a retry. Return None when nothing is left to retry, or an unfinished round only has to resume.

    An unfinished round is resumed if ``request`` is empty. Otherwise the new round supersedes its pending partitions.

    :param epoch: Epoch of this driver.
    :raises SpecError: for a change that a retry cannot make.
    :raises OutputConflict: when another job has overwritten the output since.
    :raises PipelineError: for a step or model that cannot be used. In each case nothing was changed.
    """
    _check_fan_out(job)
    check_retried_output(job)
    ledger = job.ledger()
    spec = changed_spec(ledger.last.plan.spec, request, settings=settings)
    for round_ in job.rounds.all():
        remember_packed(job.root, round_.plan)
    code = find_code(spec.entrypoints, import_paths=job.record.import_paths)
    is_same_code = not code_difference(ledger.last.plan.code, code.steps)
    if request.is_empty and ledger.last.number and ledger.todo and is_same_code:
        return None
    with prepended_sys_path(job.record.import_paths):
        plan = _replan(ledger, spec, request, settings=settings, code=code, import_paths=job.record.import_paths)
    plan = replace(plan, code=code.steps, sources=code.sources)
    limits = cluster_of(spec, settings=settings).limits()
    work = find_work(job, ledger, limits=limits)
    if not work.partitions and not work.repaired:
        return None
    plan = replace(plan, files=work.files, partitions=work.partitions, pruned_rows=0, quarantined_files=())
    if not request.is_empty:
        plan.validate(limits)
    record = make_record(
        plan,
        number=job.rounds.next_number(),
        reason=RoundReason.RETRY,
        epoch=epoch,
        created=iso_time(utc_now()),
        supersedes=ledger.pending,
        changes=plan_changes(ledger.last.plan, plan),
        quarantined_files=work.still_rejected,
        repaired_files=[file.path for file in work.repaired],
    )
    return job.rounds.open(record, plan)


def _check_fan_out(job: JobDirectory) -> None:
    """Refuse to retry a fan-out, or a child whose output was published together with that of the others.

    :raises SpecError: in both cases.
    """
    if job.record.children:
        raise SpecError(
            "a fan-out is retried child by child",
            where=job.id,
            found=f"{job.record.children:,} children",
            next_step=f"python -m pipeline status {job.id}, then: python -m pipeline retry CHILD",
        )
    if not job.record.publishes_itself and job.status().is_success:
        raise SpecError(
            "a retry cannot repair the output of a child that was published together with the others",
            where=job.id,
            expected="a child that publishes its own output (fan_out.publish: each)",
            next_step="run the fan-out again as a new job",
        )


def check_retried_output(job: JobDirectory) -> None:
    """Refuse to repair an output that another job has overwritten.

    :raises OutputConflict: if it has.
    """
    manifest = job.manifests.last()
    published = read_published(manifest, job) if manifest else None
    if published is not None and published.is_replaced:
        raise OutputConflict(
            "cannot repair the output: another job has overwritten it",
            where=f"sink.path: {published.path}",
            next_step="run the job spec again as a new job",
        )


def changed_spec(spec: JobSpec, request: RetryRequest, *, settings: Settings) -> JobSpec:
    """Return ``spec`` with the requested changes.

    :raises SpecError: for a field that is not in `MAY_CHANGE`, and for an invalid value.
    """
    overrides = list(request.overrides)
    if request.model is not None:
        overrides.append(f"steps.{_scored_step(spec)}.score.model={json.dumps(request.model)}")
    if not overrides:
        return spec
    changed = with_listed_models(absolute(JobSpec.load(spec.to_yaml(), overrides=overrides)), settings=settings)
    exempt = {*MAY_CHANGE, *NOT_THE_WORK}
    if differences := spec_difference(spec.to_dict(exclude=exempt), changed.to_dict(exclude=exempt)):
        raise SpecError(
            "a retry cannot change this field",
            where="--set",
            found="; ".join(differences),
            expected="steps, contract or errors",
            next_step="run the job spec again as a new job",
        )
    return changed


def _scored_step(spec: JobSpec) -> int:
    """Return the number of the only ``score`` step.

    :raises SpecError: for a job without or with several of them.
    """
    numbers = [number for number, step in enumerate(spec.steps) if isinstance(step, ScoreStep)]
    if len(numbers) != 1:
        raise SpecError(
            "--model does not say which score step gets the model",
            where="--model",
            found=f"{len(numbers)} score steps",
            expected="one",
            next_step=f"--set steps.{numbers[0]}.score.model=…" if numbers else "leave --model out",
        )
    return numbers[0]


def _replan(
    ledger: Ledger,
    spec: JobSpec,
    request: RetryRequest,
    *,
    settings: Settings,
    code: FoundCode,
    import_paths: Sequence[str],
) -> Plan:
    """Return the plan of the last round, with the changes of ``spec``, of its steps' code and of a requested model."""
    last = ledger.last.plan
    is_same_code = not code_difference(last.code, code.steps)
    if request.is_empty and is_same_code:
        return last
    models = retry_models(last, spec, request, settings=settings)
    is_same_spec = spec.steps == last.spec.steps and spec.contract == last.spec.contract
    if is_same_spec and is_same_code and models == retry_models(last, last.spec, RetryRequest(), settings=settings):
        return replace(last, spec=spec)
    discovery = stored_discovery(ledger, spec)
    if not (spec.is_plain and last.is_plain):
        return _replan_chain(ledger, spec, models, discovery, code=code, import_paths=import_paths)
    (model,) = models
    predictions = prediction_schema(model, spec.score.output_spec)
    is_same_frame = spec.maps == last.spec.maps and is_same_code
    sample = sample_table(discovery, columns=ledger.base.plan.source_columns)
    frames, mapped = (last.frames, None) if spec.maps else ((), sample)
    if spec.maps and not (is_same_frame and last.frames):
        frames, mapped = _run_steps(spec, discovery, sample, code, import_paths)
    columns = _columns(spec, model, discovery, frames, outputs=tuple(predictions.names))
    check_rules(discovery.schema, columns.source_rules, sample=sample)
    check_rules(last_schema(frames, discovery.schema), columns.score_rules, sample=mapped)
    _check_same_output(ledger.base.plan, columns.keep, predictions)
    return replace(
        last,
        spec=spec,
        model=model,
        source_rules=columns.source_rules,
        score_rules=columns.score_rules,
        features=columns.features,
        task_memory=last.task_memory + added_memory(last, models),
        never_null=tuple(sorted(discovery.never_null)) if spec.maps else (),
        frame_schemas=tuple(schema.serialize().to_pybytes() for schema in frames),
    )


def retry_models(last: Plan, spec: JobSpec, request: RetryRequest, *, settings: Settings) -> tuple[ModelVersion, ...]:
    """Return the version of each ``score`` step: that of the last plan, unless the retry names another model."""
    pins = {} if request.model is not None else last.pins
    models = []
    for reference, score in zip(spec.references, scored_steps(spec), strict=True):
        version = pins.get(reference) or resolve_model(reference, settings=settings, score=score)
        models.append(scored_version(version, score))
        check_engine(score.engine, models[-1], kind=score.output_spec.kind)
    return tuple(models)


def _replan_chain(
    ledger: Ledger,
    spec: JobSpec,
    models: Sequence[ModelVersion],
    discovery: Discovery,
    *,
    code: FoundCode,
    import_paths: Sequence[str],
) -> Plan:
    """Return the plan of the last round with the steps of ``spec``, which may be in any number and order."""
    last = ledger.last.plan
    if pushed_filters(spec) != pushed_filters(last.spec):
        raise SpecError(
            "a retry cannot change the filters with which files are read",
            where="--set",
            found="another filter step before the first map and score",
            expected="the same filter steps there",
            next_step="run the job spec again as a new job",
        )
    sample = sample_table(discovery, columns=ledger.base.plan.source_columns)
    frames = NO_FRAMES
    if spec.maps:
        frames = chain_frames(spec, sample, models, discovery, import_paths=import_paths, code=code)
    scored = scored_by(spec, models)
    with known_columns(discovery.schema):
        chain = resolve_chain(spec, discovery=discovery, map_schemas=frames.schemas, scored=scored)
    check_chain_rules(chain, sample.select(chain.source.names))
    _check_same_schema(ledger.base.plan, chain.output)
    scores = scores_of(chain.recipes)
    plan = replace(
        last,
        spec=spec,
        model=scores[0].model if scores else NO_MODEL,
        source_rules=chain.source_rules,
        score_rules=(),
        features=scores[0].features if scores else (),
        never_null=tuple(sorted(discovery.never_null)) if spec.maps else (),
        frame_schemas=(),
        chain=chain.recipes,
    )
    return replace(plan, task_memory=last.task_memory + added_memory(last, plan.models))


def _check_same_schema(base: Plan, output: pa.Schema) -> None:
    expected = pa.ipc.read_schema(pa.py_buffer(base.output_schema))
    if not output.equals(expected):
        texts = [", ".join(f"{field.name}: {field.type}" for field in schema) for schema in (output, expected)]
        raise SpecError(
            "a retry must give the columns that the output has",
            where="--set, --model",
            found=texts[0],
            expected=texts[1],
            next_step="keep the columns and their order, or run the job spec again as a new job",
        )


def added_memory(last: Plan, models: Sequence[ModelVersion]) -> int:
    """Return the bytes by which ``models`` need more memory than those of the plan; 0 if they need less."""
    engine = last.can_use_tree_engine
    needed, had = (sum(model.nbytes for model in group) for group in (models, last.models))
    return max(0, shared_memory(needed, engine=engine) - shared_memory(had, engine=engine))


def stored_discovery(ledger: Ledger, spec: JobSpec) -> Discovery:
    """Return the files and columns of the job as they were planned."""
    base = ledger.base.plan
    schema = pa.ipc.read_schema(pa.py_buffer(base.source_schema))
    return Discovery(
        files=tuple(ledger.files.values()),
        schema=schema,
        key_names=tuple(name for name in schema.names if name not in base.source_columns),
        available=tuple(schema.names),
        filter=read_source(spec).filter,
        format=spec.source.reader,
        never_null=frozenset(base.never_null),
    )


def _columns(
    spec: JobSpec,
    model: ModelVersion,
    discovery: Discovery,
    frames: Sequence[pa.Schema],
    *,
    outputs: tuple[str, ...],
) -> Columns:
    schema = discovery.schema
    with known_columns(schema):
        frame = last_schema(frames, schema)
        return resolve_columns(spec, model=model, discovery=discovery, frame=frame, outputs=outputs)


@contextmanager
def known_columns(schema: pa.Schema) -> Iterator[None]:
    """Add to errors about columns that a retry has no others."""
    try:
        yield
    except (SpecError, SchemaDrift) as error:
        error.next_step = (
            f"{error.next_step}; a retry has only the columns that the job read ({', '.join(schema.names)}): "
            "for others, run the job spec again as a new job"
        ).removeprefix("; ")
        raise


def sample_table(discovery: Discovery, *, columns: Sequence[str]) -> pa.Table:
    """Return rows of an unchanged input file; none if there is no such file."""
    batch = _sample(discovery, columns=columns)
    return empty_table(discovery.schema) if batch is None else batch.table


def _run_steps(
    spec: JobSpec, discovery: Discovery, sample: pa.Table, code: FoundCode, import_paths: Sequence[str]
) -> tuple[tuple[pa.Schema, ...], pa.Table]:
    """Return the schema after each ``map`` step, and the rows of ``sample`` after the last one."""
    from pipeline.scoring.step_plan import plan_frames  # imports pandas, which only steps need

    frames = plan_frames(spec.maps, sample, never_null=discovery.never_null, import_paths=import_paths, code=code)
    return frames.schemas, frames.rows


def _sample(discovery: Discovery, *, columns: Sequence[str]) -> SourceBatch | None:
    """Return rows of the first unchanged input file. Rejected rows are no sample: they may all fail."""
    tried = 0
    for file in discovery.files:
        try:
            if tried == _SAMPLED_FILES or not has_version(file.path, file.size, file.version):
                continue
            tried += 1
            batch = sample_batch(replace(discovery, files=(file,)), columns=columns, schema=discovery.schema)
        except (InputError, FileNotFoundError):
            continue
        if batch is not None:
            return batch
    return None


def _check_same_output(base: Plan, keep: Sequence[str], predictions: pa.Schema) -> None:
    schema = pa.ipc.read_schema(pa.py_buffer(base.output_schema))
    columns = [*keep, *(f"{field.name}: {field.type}" for field in predictions)]
    outputs = [schema.field(name) for name in base.outputs]
    expected = [*base.keep, *(f"{field.name}: {field.type}" for field in outputs)]
    if columns != expected:
        raise SpecError(
            "a retry must give the columns that the output has",
            where="--set, --model",
            found=", ".join(columns),
            expected=", ".join(expected),
            next_step="name score.keep and score.output as the job had them, or run the job spec again as a new job",
        )


@dataclass(frozen=True)
class RetryWork:
    """Rows and files that a round of a retry scores."""

    files: tuple[InputFile, ...]
    partitions: tuple[Partition, ...]
    repaired: tuple[InputFile, ...]
    still_rejected: tuple[QuarantinedFile, ...]


def find_work(job: JobDirectory, ledger: Ledger, *, limits: Limits) -> RetryWork:
    """Find rejected rows, pending partitions, and quarantined files that were repaired."""
    threads = max(1, limits.workers * limits.threads)
    pending = [partition.fragments for partition in ledger.todo if not partition.fragments[0].rejected_from]
    repaired, still_rejected = _recheck_quarantined(ledger)
    rejected = find_rejected(job.store, ledger, threads=threads, skips_masked=bool(pending or repaired))
    packed = [*rejected.partitions, *pending, *pack(repaired, threads=threads)]
    known = {**{file.path: file for file in ledger.last.plan.files}, **ledger.files}
    used = {fragment.path for fragments in pending for fragment in fragments}
    files = (*rejected.files, *(file for path, file in known.items() if path in used), *repaired)
    return RetryWork(files, number_partitions(packed), repaired, still_rejected)


def number_partitions(fragments: Sequence[Sequence[Fragment]]) -> tuple[Partition, ...]:
    """Return the partitions of a round, with ids in the given order."""
    width = max(5, len(str(len(fragments))))
    return tuple(Partition(f"{number:0{width}d}", tuple(parts)) for number, parts in enumerate(fragments))


def _reads_all(plan: Plan) -> bool:
    """Return True if the job read all columns of its source, whichever these are."""
    spec = plan.spec
    if any(isinstance(step, SelectStep) for step in spec.steps):
        return False
    return bool(spec.maps) or not spec.scores or spec.scores[-1].keep is None


def _recheck_quarantined(ledger: Ledger) -> tuple[tuple[InputFile, ...], tuple[QuarantinedFile, ...]]:
    """Return the quarantined files that can be read now, and those that still cannot, with the current reason."""
    plan = ledger.base.plan
    source = read_source(plan.spec)
    adapter = find_source(source.reader)
    condition = parse_filter(source.filter) if source.filter is not None else None
    # A job that reads all columns still rejects a file with an extra one, as it did when it was planned.
    is_all = source.columns is None and _reads_all(plan)
    rechecked = [
        adapter.recheck(
            file,
            schema=pa.ipc.read_schema(pa.py_buffer(plan.source_schema)),
            columns=plan.source_columns,
            is_all=is_all,
            condition=condition,
        )
        for file in ledger.quarantined_files
    ]
    repaired = tuple(file for file in rechecked if isinstance(file, InputFile))
    return repaired, tuple(file for file in rechecked if isinstance(file, QuarantinedFile))


def plan_changes(before: Plan, after: Plan) -> tuple[str, ...]:
    """Return the differences between the plans of two rounds, in words."""
    changes = spec_difference(before.spec.to_dict(exclude=NOT_THE_WORK), after.spec.to_dict(exclude=NOT_THE_WORK))
    changes += code_difference(before.code, after.code)
    if before.model.digest != after.model.digest:
        changes.append(f"model {after.model.name}: sha256 {before.model.digest[:12]} -> {after.model.digest[:12]}")
    return tuple(changes)


_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class RejectedRows:
    """Rejected rows to retry."""

    files: tuple[InputFile, ...]
    """The reject files that hold the rows."""
    partitions: tuple[tuple[Fragment, ...], ...]
    """The fragments of each partition: adjacent rows from one input file."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(fragment.rows for fragments in self.partitions for fragment in fragments)


def find_rejected(store: Store, ledger: Ledger, *, threads: int, skips_masked: bool = False) -> RejectedRows:
    """Find the rows that are still rejected, packed like the rows of input files.

    :param store: Store of the job directory.
    :param threads: Threads of all workers together.
    :param skips_masked: Leave out rows that are not stored as they were read, instead of raising.
    :raises SpecError: for rows that are not stored as they were read, or no longer.
    :raises StateCorrupt: when a reject file is missing or damaged.
    """
    receipts = {rejects_path(receipt): receipt for receipt in ledger.done if ledger.still_rejected_ranges(receipt)}
    if reason := _missing_values(store, receipts):
        if skips_masked:
            return RejectedRows((), ())
        raise SpecError(
            "the rejected rows cannot be retried",
            where=store.root,
            found=reason,
            expected="rows that are stored with all columns",
            next_step="run the job spec again as a new job, which reads these rows from the input",
        )
    files = {path: _read_file(store, path, receipt) for path, receipt in receipts.items()}
    packed = pack([rejects.file for rejects in files.values()], threads=threads)
    partitions = []
    for fragments in packed:
        rejected = [
            part
            for fragment in fragments
            for part in _split_fragment(
                fragment, files[fragment.path], ranges=ledger.still_rejected_ranges(receipts[fragment.path])
            )
        ]
        if rejected:
            partitions.append(tuple(rejected))
    return RejectedRows(tuple(rejects.file for rejects in files.values()), tuple(partitions))


def _missing_values(store: Store, receipts: Mapping[str, Receipt]) -> str:
    """Return why files of rejects do not have all values as they were read; empty if they have."""
    removed = rejects_removed(store)
    for path in receipts:
        if removed and not store.exists(path):
            return f"they were removed on {removed}, as errors.retain says"
        try:
            with store.open_input(path) as opened:
                masked = masked_columns(pq.read_schema(opened).metadata)
        except (OSError, pa.ArrowException):
            continue  # Reading the file says what is wrong with it.
        if masked:
            return f"without their values of {listed(masked, shown=8)}, as errors.keep_columns and hash_columns say"
    return ""


@dataclass(frozen=True)
class _RejectFile:
    file: InputFile
    runs: tuple[tuple[int, int, str], ...]
    """First row, row after the last, and input file of each run of rows from one input file."""


def _read_file(store: Store, path: str, receipt: Receipt) -> _RejectFile:
    assert receipt.rejects is not None
    try:
        with store.open_input(path) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
            metadata = file.metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            runs = tuple(_runs(file))
    except (OSError, pa.ArrowException) as error:
        raise StateCorrupt(
            "a reject file cannot be read",
            where=store.url(path),
            found=f"{type(error).__name__}: {error}",
            expected=f"{receipt.rejects.rows:,} rows, as its receipt says",
            next_step="restore the file, or run the job spec again as a new job",
        ) from error
    sizes = tuple(RowGroup(group.num_rows, group.total_byte_size, group.total_byte_size) for group in groups)
    return _RejectFile(InputFile(path, receipt.rejects.bytes, receipt.rejects.checksum, sizes), runs)


def _runs(file: pq.ParquetFile) -> Iterator[tuple[int, int, str]]:
    """Yield first row, row after the last, and input file of each run of rows from one input file."""
    start = stop = 0
    current: str | None = None
    for batch in file.iter_batches(_BATCH_ROWS, columns=[REJECT_FILE]):
        encoded = pc.run_end_encode(batch.column(0))
        first = stop
        for end, path in zip(encoded.run_ends.to_pylist(), encoded.values.to_pylist(), strict=True):
            if current is not None and path != current:
                yield start, stop, current
                start = stop
            current, stop = path, first + end
    if current is not None:
        yield start, stop, current


def _split_fragment(
    fragment: Fragment, rejects: _RejectFile, *, ranges: Sequence[tuple[int, int]]
) -> Iterator[Fragment]:
    """Yield the parts of ``fragment`` in the row ``ranges``, each from one input file."""
    for low, high in ranges:
        for start, stop, rejected_from in rejects.runs:
            first, last = max(fragment.row_start, low, start), min(fragment.row_stop, high, stop)
            if first < last:
                part = sub_fragment(fragment, rejects.file, row_start=first, row_stop=last)
                yield replace(part, rejected_from=rejected_from)
