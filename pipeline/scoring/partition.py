"""Score one partition on a worker: read, run the steps, predict, write, and commit the receipt, all as a stream.

The batch and the row group being written bound the memory, for partitions of any size. The next batch is read while
the current batch is scored, and only these two are held. Writing has no separate thread: other tasks use the cores,
so a thread would only cost memory.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa

from pipeline.common.agreement import Agreement, merged
from pipeline.common.arrow_memory import keep_freed_pages
from pipeline.common.imports import require_whole_imports
from pipeline.common.reasons import UNREADABLE
from pipeline.common.rows import Fragment, RowCounts
from pipeline.common.sketch import Sketches
from pipeline.common.step_output import OutputLine, StepOutput, capture
from pipeline.common.stopwatch import Stopwatch
from pipeline.errors import PlanMismatch, ReconciliationFailed
from pipeline.jobs import layout
from pipeline.jobs.answers import StoredAnswers
from pipeline.jobs.receipts import DataFile, FragmentCounts, Receipt, Timings
from pipeline.jobs.splits import even_split_points, split_receipt
from pipeline.models.cache import keep_models
from pipeline.models.device_engine import open_evaluator
from pipeline.models.endpoints.calls import Calls, NoKeptAnswers, attempt_calls
from pipeline.models.engines import EngineUse
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import ORIGIN, REJECT_MESSAGE, REJECT_REASON, REJECT_ROW, StageRecipe
from pipeline.scoring.batching import TimedBatchSizer, rebatch
from pipeline.scoring.checkpoint import CheckpointWriter
from pipeline.scoring.isolation import IsolatedScorer, Isolation, for_steps
from pipeline.scoring.outputs import reject_schema
from pipeline.scoring.partition_log import PartitionLog
from pipeline.scoring.predictors import NO_PREDICTORS, OpenPredictors, open_predictors
from pipeline.scoring.progress import MIN_REST_ROWS, AttemptProgress, track_attempt
from pipeline.scoring.reject_masking import RejectMask
from pipeline.scoring.scorer import ScoredBatch, Scorer
from pipeline.sources import Problem, SourceBatch, read_ahead, read_batches
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import own_storage_options, unique_name, use_storage_options

MOST_NAMED_MODELS = 32
"""Models named in the metadata of a file; of more, their number and joint digest."""


@own_storage_options()
def score_partition(
    recipe: StageRecipe,
    partition: Partition,
    versions: Versions | None = None,
    *,
    key: str = "",
    worker: str = "",
    isolation: Isolation | None = None,
    report: Callable[[int], None] | None = None,
    on_message: Callable[[OutputLine], object] | None = None,
) -> Receipt:
    """Score ``partition`` and commit its receipt. If another attempt has committed a receipt, return that receipt.

    An attempt that is asked to stop early (`pipeline.scoring.progress`) commits the rows it has scored as the first
    part of a split partition, and returns the receipt of the split.

    :param versions: planned versions of the input files; None: not checked.
    :param key: name by which the driver asks for the progress of this attempt. Default: the id of the partition.
    :param worker: name for the receipt; default: host and process.
    :param isolation: limits for scoring in a separate process. Default: score in this process.
    :param report: called with the number of rows that are done, at the end of each batch.
    :param on_message: called with the first line that each place in the code of steps and models prints.
    :raises PipelineError: when the partition cannot be scored. The files of this attempt are removed then.
    """
    use_storage_options(recipe.storage)
    keep_freed_pages(len(recipe.columns))
    store = open_store(round_folder(recipe), private=True, fsync=recipe.fsync)
    committed = _read_receipt(store, partition.id, recipe)
    if committed is not None:
        return committed
    with track_attempt(key or partition.id, rows=partition.rows, report=report) as progress:
        attempt = _Attempt(recipe, partition, store, progress, on_message)
        answers = StoredAnswers(store, partition.id) if recipe.service_rows else None
        try:
            worker = worker or f"{socket.gethostname()}:{os.getpid()}"
            with attempt.captured(), attempt_calls(Calls(recipe.service_share, answers or NoKeptAnswers())):
                receipt = attempt.score(versions, worker=worker, isolation=isolation)
        except BaseException:
            attempt.abandon()
            raise
    if attempt.output.counts:
        receipt = replace(receipt, messages=attempt.output.counts)
    committed = _commit(attempt, receipt, store, recipe)
    if answers is not None and not committed.splits:
        answers.remove()
    return committed


def _commit(attempt: _Attempt, receipt: Receipt, store: Store, recipe: StageRecipe) -> Receipt:
    """Commit ``receipt``, after that of a split if there is one. Return the receipt of the attempt that won."""
    # From here on, an error may hide a receipt that was written: never delete the files then.
    split = attempt.split
    winner = _commit_receipt(store, split or receipt, recipe)
    if split is not None and winner.attempt == split.attempt:
        # The split is on record: from now on any attempt may score the first part, too.
        first = _commit_receipt(store, receipt, recipe)
        if first.attempt != receipt.attempt:
            attempt.abandon()
    elif winner.attempt != receipt.attempt:
        attempt.abandon()
    return winner


def round_folder(recipe: StageRecipe) -> str:
    """Return the path or URL of the folder in which the attempts of ``recipe`` write."""
    return f"{recipe.directory}/{layout.round_folder(recipe.round)}"


class _Attempt:
    """One attempt at a partition. Its two files become part of the output once its receipt is committed."""

    def __init__(
        self,
        recipe: StageRecipe,
        partition: Partition,
        store: Store,
        progress: AttemptProgress,
        on_message: Callable[[OutputLine], object] | None = None,
    ) -> None:
        self.recipe = recipe
        self.partition = partition
        self.progress = progress
        self.split: Receipt | None = None
        """Receipt that splits the partition, once this attempt has stopped before its end."""
        self.name = unique_name()
        open_job = partial(open_store, recipe.directory, private=True, fsync=False)
        self.log = PartitionLog(open_job, layout.partition_log_path(partition.id, self.name))
        self.output = StepOutput(self.log.write, on_first=on_message)
        metadata = _file_metadata(recipe)
        output = pa.ipc.read_schema(pa.py_buffer(recipe.output_schema))
        source = pa.ipc.read_schema(pa.py_buffer(recipe.schema))
        self.mask = RejectMask.of(recipe.errors, source)
        self.data = CheckpointWriter(
            store,
            layout.data_name(partition.id, self.name),
            schema=output,
            metadata=metadata,
            compression=recipe.compression,
            row_group_rows=recipe.row_group_rows,
            row_group_bytes=recipe.row_group_bytes,
        )
        self.rejects = CheckpointWriter(
            store,
            layout.rejects_name(partition.id, self.name),
            schema=self.mask.schema(reject_schema(source)),
            metadata={**metadata, **self.mask.metadata},
            row_group_bytes=recipe.row_group_bytes,
        )

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Keep what steps and models print in this block, also if they raise."""
        try:
            with capture(self.output):
                yield
        finally:
            self.log.close(left_out=self.output.left_out)

    def score(self, versions: Versions | None, *, worker: str, isolation: Isolation | None = None) -> Receipt:
        """Read, score and write the rows. Return the receipt, which is not committed yet."""
        counter, reading, total = RowCounter(self.partition), Stopwatch(), Stopwatch()
        steps = model = 0.0
        with _open_scorer(self.recipe, self.partition, isolation) as opened:
            rows_at_a_time, ceiling = self.recipe.service_rows, opened.recipe.batch_rows
            self.sizer = (
                TimedBatchSizer.fixed(rows_at_a_time, ceiling=ceiling)
                if rows_at_a_time
                else TimedBatchSizer.start(ceiling, is_known=not self.recipe.maps)
            )
            rows = read_partition(opened.recipe, self.partition, versions=versions)
            with total, closing(read_ahead(_time_reading(rows, reading))) as read:
                for batch in self._resize(read, opened.scorer):
                    with Stopwatch() as watch:
                        scored = opened.scorer.score_batch(batch, paths=counter.paths)
                    self.sizer = self.sizer.after(batch.table.num_rows, watch.seconds)
                    counter.add(scored, batch.reasons)
                    steps, model = steps + scored.seconds_steps, model + scored.seconds_score
                    self.data.add(scored.table)
                    if scored.rejects is not None:
                        self.rejects.add(self.mask.apply(scored.rejects))
                    self.log.flush()
                    if self.progress.advance(counter.rows_done):
                        self.split = self._split_at(counter.rows_done)
                        break
            with total:
                files = counter.file_counts(is_complete=self.split is None)
                data, rejects = self.data.finish(), self.rejects.finish()
            # A partition that another attempt has committed by now need not be committed again.
            self.progress.check()
            write, models = self.data.watch.seconds + self.rejects.watch.seconds, opened.models
            load, model = models.seconds + models.lazy_seconds, model - models.lazy_seconds
            seconds = Timings(reading.seconds, steps, model, write, load, models.seconds + total.seconds)
            return self._make_receipt(counter, opened, files, data, rejects, seconds=seconds, worker=worker)

    def _resize(self, batches: Iterable[SourceBatch], scorer: Scorer | IsolatedScorer) -> Iterable[SourceBatch]:
        """Return batches that take about half a second each; an `IsolatedScorer` bounds its own time.

        Where a service scores, they have a few rows for each request that may be open.
        """
        if isinstance(scorer, IsolatedScorer) and not self.recipe.service_rows:
            return batches
        return rebatch(batches, self.partition.fragments, lambda: self.sizer.rows)

    def _make_receipt(
        self,
        counter: RowCounter,
        opened: _OpenScorer,
        files: tuple[FragmentCounts, ...],
        data: DataFile | None,
        rejects: DataFile | None,
        *,
        seconds: Timings,
        worker: str,
    ) -> Receipt:
        return Receipt(
            partition=self.split.splits[0] if self.split else self.partition.id,
            plan=self.recipe.plan,
            model=self.recipe.model_digest,
            attempt=self.name,
            data=data,
            rejects=rejects,
            rows=RowCounts.total(file.rows for file in files),
            files=files,
            seconds=seconds,
            worker=worker,
            batch_rows=opened.batch_rows,
            peak_memory=peak_memory(),
            reasons=dict(counter.reasons),
            engine=opened.engine_use(),
            round=self.recipe.round,
            before=dict(counter.previous_reasons),
            agreements=counter.agreements,
            model_loads=opened.models.loads,
            ended=round(time.time(), 3),
            sketches=counter.sketches.pack(),
            **opened.models.device_fields(),
        )

    def _split_at(self, row: int) -> Receipt:
        """Make the receipt of a split: the rows before ``row`` are the first part, the rest is divided evenly."""
        rest = even_split_points(row, self.partition.rows, parts=self.progress.parts, smallest=MIN_REST_ROWS)
        return split_receipt(
            self.partition.id,
            (row, *rest),
            plan=self.recipe.plan,
            model=self.recipe.model_digest,
            attempt=self.name,
            round=self.recipe.round,
        )

    def abandon(self) -> None:
        """Remove the files of this attempt."""
        self.data.abandon()
        self.rejects.abandon()


@dataclass(frozen=True)
class _OpenScorer:
    """A scorer with its model loaded."""

    recipe: StageRecipe
    """The recipe with the batches of the device that scores."""
    scorer: Scorer | IsolatedScorer
    engine_use: Callable[[], EngineUse]
    """Returns the engines that evaluated the model; call it after all rows are scored."""
    models: OpenPredictors = NO_PREDICTORS
    """Models in this process; none in a separate one."""

    @property
    def batch_rows(self) -> int:
        """Rows per batch at the end; fewer than at the start if memory ran short, here or on the GPU."""
        return min(self.scorer.batch_rows, self.models.rows_on_device or self.scorer.batch_rows)


@contextmanager
def _open_scorer(recipe: StageRecipe, partition: Partition, isolation: Isolation | None) -> Iterator[_OpenScorer]:
    """Open a scorer in this process, or in a separate process that ends with the block."""
    if isolation is None and any(recipe.time_limits):
        isolation = for_steps()
    if isolation is None:
        device, memory = recipe.device, recipe.device_memory
        if recipe.maps:
            # Before the model's library is imported in part, only to be imported again, whole, for the steps.
            require_whole_imports()
        keep_models(recipe.held_models)
        rows = recipe.device_batch_rows
        models = open_predictors(recipe, partial(open_evaluator, device=device, memory=memory, rows=rows))
        # As many rows as the GPU takes at a time, but no fewer than on a CPU: the GPU cuts batches itself.
        recipe = replace(recipe, batch_rows=max(recipe.batch_rows, min(rows, models.device_rows)))
        yield _OpenScorer(recipe, Scorer(recipe, models.predictors), models.engine_use, models)
        return
    with closing(IsolatedScorer(recipe, isolation, rows=partition.rows)) as isolated:
        yield _OpenScorer(recipe, isolated, isolated.engine_use)


def _commit_receipt(store: Store, receipt: Receipt, recipe: StageRecipe) -> Receipt:
    """Write ``receipt`` if its partition has none. Return the receipt that counts."""
    if store.put_if_absent(layout.receipt_name(receipt.partition), receipt.to_json_bytes()):
        return receipt
    return _read_receipt(store, receipt.partition, recipe) or receipt


def _read_receipt(store: Store, partition: str, recipe: StageRecipe) -> Receipt | None:
    """Return the receipt of ``partition``, or None.

    :raises PlanMismatch: when the receipt belongs to another plan.
    """
    name = layout.receipt_name(partition)
    try:
        data = store.read(name)
    except FileNotFoundError:
        return None
    receipt = Receipt.from_json(data, where=store.url(name))
    if receipt.plan != recipe.plan:
        raise PlanMismatch(
            "a receipt belongs to another plan",
            where=store.url(name),
            found=receipt.plan[:12],
            expected=recipe.plan[:12],
            next_step="run the job in a directory of its own",
        )
    return receipt


def _time_reading(batches: Generator[SourceBatch, None, None], watch: Stopwatch) -> Generator[SourceBatch, None, None]:
    """Yield ``batches``, with the time it takes to read each measured by ``watch``."""
    try:
        while True:
            with watch:
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            # Not kept here while the next one is read: it may be large.
            del batch
    finally:
        batches.close()


def peak_memory() -> int:
    """Return the peak resident bytes of this process; 0 if the system does not report them."""
    # Linux counts in KiB, macOS in bytes (getrusage(2)).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _file_metadata(recipe: StageRecipe) -> dict[str, str]:
    """Make the key-value metadata of a Parquet file: job, plan, and the model or the list of models, if any."""
    made = {"pipeline.job": recipe.job, "pipeline.plan": recipe.plan}
    models = [
        {"name": model.name, "version": model.version, "digest": model.digest, "uri": model.reference}
        for model in dict.fromkeys(score.model for score in recipe.scores)
    ]
    if len(models) == 1:
        made["pipeline.model"] = json.dumps(models[0])
    elif len(models) > MOST_NAMED_MODELS:
        made["pipeline.models"] = json.dumps({"count": len(models), "digest": recipe.model_digest})
    elif models:
        made["pipeline.models"] = json.dumps(models)
    return made


Versions = Mapping[str, tuple[int, str]]
"""Path of an input file -> its planned size in bytes and version."""

_ADDED = (
    pa.field(REJECT_ROW, pa.int64()),
    pa.field(REJECT_REASON, pa.string()),
    pa.field(REJECT_MESSAGE, pa.string()),
)


def read_partition(
    recipe: StageRecipe,
    partition: Partition,
    *,
    versions: Versions | None = None,
) -> Generator[SourceBatch, None, None]:
    """Yield the rows of ``partition`` that the filter keeps, in batches (see `pipeline.sources.read_batches`).

    :param versions: planned versions of the input files; None: not checked.
    """
    if partition.fragments and partition.fragments[0].rejected_from:
        return read_rejects(recipe, partition)
    if recipe.reads_origin:
        return _read_checkpoint(recipe, partition, versions=versions)
    return read_batches(
        partition,
        columns=recipe.columns,
        schema=pa.ipc.read_schema(pa.py_buffer(recipe.schema)),
        filter=recipe.filter,
        batch_rows=recipe.batch_rows,
        batch_bytes=recipe.batch_bytes,
        versions=versions,
        format=recipe.source_format,
        keep_problems=True,
    )


def _read_checkpoint(
    recipe: StageRecipe, partition: Partition, *, versions: Versions | None
) -> Generator[SourceBatch, None, None]:
    """Yield the rows of files of an earlier stage, with the hidden columns apart from those that steps see."""
    schema = pa.ipc.read_schema(pa.py_buffer(recipe.schema))
    batches = read_batches(
        partition,
        columns=(*recipe.columns, *ORIGIN.names),
        schema=pa.schema([*schema, *ORIGIN]),
        filter=recipe.filter,
        batch_rows=recipe.batch_rows,
        batch_bytes=recipe.batch_bytes,
        versions=versions,
        format=recipe.source_format,
        keep_problems=True,
    )
    for batch in batches:
        yield replace(batch, table=batch.table.select(schema.names), origin=batch.table.select(ORIGIN.names))


def read_rejects(recipe: StageRecipe, partition: Partition) -> Generator[SourceBatch, None, None]:
    """Yield the rows of a partition that consists of rejects, with their reasons and their row numbers in the input.

    The filter is not applied again: these rows have passed it.

    :returns: batches with the source's columns.
    :raises CorruptInput: when a rejects file is damaged.
    """
    schema = pa.ipc.read_schema(pa.py_buffer(recipe.schema))
    fragments = tuple(
        replace(fragment, path=f"{recipe.directory}/{fragment.path}", hive_keys=()) for fragment in partition.fragments
    )
    batches = read_batches(
        fragments,
        columns=(*schema.names, *(field.name for field in _ADDED)),
        schema=pa.schema([*schema, *_ADDED]),
        batch_rows=recipe.batch_rows,
        batch_bytes=recipe.batch_bytes,
    )
    for batch in batches:
        row = np.asarray(batch.table.column(REJECT_ROW).to_numpy(), dtype=np.int64)
        reasons = tuple(batch.table.column(REJECT_REASON).to_pylist())
        problems = _unreadable(reasons, batch.table.column(REJECT_MESSAGE))
        table = batch.table.select(schema.names)
        yield replace(batch, table=table, row=row, reasons=reasons, problems=problems)


def _unreadable(reasons: Sequence[str], messages: pa.ChunkedArray) -> tuple[Problem | None, ...]:
    """Return the problems of rejects that could not be read: the rejects hold nulls in place of their values."""
    kinds = tuple(f"{kind}:" for kind in UNREADABLE)
    if not any(reason.startswith(kinds) for reason in reasons):
        return ()
    pairs = zip(reasons, messages.to_pylist(), strict=True)
    return tuple(Problem(reason, message) if reason.startswith(kinds) else None for reason, message in pairs)


class RowCounter:
    """A counter of the rows of each fragment: out, rejected, filtered."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.paths = tuple(fragment.rejected_from or fragment.path for fragment in partition.fragments)
        self.reasons: Counter[str] = Counter()
        self.previous_reasons: Counter[str] = Counter()
        """Reasons for which an earlier round rejected the rows."""
        self.agreements: dict[str, Agreement] = {}
        """Comparison of each challenger, by its output column."""
        self.sketches = Sketches()
        """Distributions of scores and features."""
        # Rows: out, rejected, filtered. Columns: fragments.
        self._counts = np.zeros((3, len(self.paths)), dtype=np.int64)

    def add(self, scored: ScoredBatch, previous_reasons: Iterable[str] = ()) -> None:
        """Count the rows of a batch.

        :param previous_reasons: reason for which an earlier round rejected each row.
        """
        self.previous_reasons.update(previous_reasons)
        self.agreements = merged(self.agreements, scored.agreements)
        self.sketches += scored.sketches
        out = np.bincount(scored.fragment, minlength=len(self.paths))
        self._counts += np.stack([out, scored.rejected, scored.filtered])
        if scored.rejects is not None:
            self.reasons.update(scored.rejects.column(REJECT_REASON).to_pylist())

    @property
    def rows_done(self) -> int:
        """Number of input rows that are accounted for, rows filtered before the last scored one included."""
        return int(self._counts.sum())

    def file_counts(self, *, is_complete: bool = True) -> tuple[FragmentCounts, ...]:
        """Return the counts per fragment.

        :param is_complete: True if all rows were read, False if only the first `rows_done` rows.
        :raises ReconciliationFailed: if rows are missing, or there are too many.
        """
        fragments = self.partition.fragments
        read = [fragment.rows for fragment in fragments] if is_complete else _first_rows(fragments, self.rows_done)
        files = tuple(
            FragmentCounts(part.path, part.row_start, part.row_start + rows, RowCounts(rows, *map(int, counts)))
            for part, rows, counts in zip(fragments, read, self._counts.T, strict=True)
            if rows or is_complete
        )
        for file in files:
            if not file.rows.is_reconciled:
                raise ReconciliationFailed(
                    "rows of a partition are unaccounted for",
                    where=f"partition {self.partition.id}, {file.path} rows {file.row_start} to {file.row_stop}",
                    found=f"{file.rows.output} out, {file.rows.rejected} rejected, {file.rows.filtered} filtered",
                    expected=f"{file.rows.input} in all",
                    next_step="nothing of this attempt was kept; resume, and report it when it happens again",
                )
        return files


def _first_rows(fragments: Sequence[Fragment], rows: int) -> list[int]:
    """Return how many of the first ``rows`` rows each fragment has."""
    ends = np.cumsum([fragment.rows for fragment in fragments])
    return [int(take) for take in np.diff(np.minimum(ends, rows), prepend=0)]
