"""What a worker does with a partition: read, run the steps, score, write, and put the receipt, all as a stream.

Memory is bounded by the batch and the row group being written, whatever the size of the partition: the next batch is
read while this one is scored, and no more than that is held. (Writing has no thread of its own: the cores are busy
with the tasks beside this one, so that it would only cost memory.)

Read the rows of a partition: from input files, or from files of rejects those that an earlier round rejected.

What became of the rows of a partition, counted as its batches pass.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from time import perf_counter

import numpy as np
import pyarrow as pa

from pipeline.common.rows import Fragment, RowCounts
from pipeline.errors import PlanMismatch, ReconciliationFailed
from pipeline.jobs import layout
from pipeline.jobs.receipts import FragmentCounts, Receipt, Timings
from pipeline.jobs.splits import even_cuts, split_receipt
from pipeline.models.engines import EngineUse, get_evaluator
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import REJECT_REASON, REJECT_ROW, StageRecipe
from pipeline.scoring.batching import TimedBatchSizer, rebatch
from pipeline.scoring.checkpoint import CheckpointWriter
from pipeline.scoring.isolation import IsolatedScorer, Isolation
from pipeline.scoring.outputs import reject_schema
from pipeline.scoring.progress import SMALLEST_REST, AttemptProgress, track_attempt
from pipeline.scoring.scorer import ScoredBatch, Scorer
from pipeline.sources import SourceBatch, read_ahead, read_batches
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import unique_name, use_storage_options


def run_partition(
    recipe: StageRecipe,
    partition: Partition,
    versions: Versions | None = None,
    *,
    worker: str = "",
    isolation: Isolation | None = None,
) -> Receipt:
    """Score ``partition`` and commit it; when it is committed already, by whomever, return that receipt.

    An attempt that is asked to (`pipeline.scoring.progress`) commits what it has scored as the first of several parts,
    and returns the receipt that says how the partition was cut.

    :param versions: of its files, as planned; None: not checked.
    :param worker: name for the receipt; default: host and process.
    :param isolation: score in a process of its own, with these limits. Default: in this one.
    :raises PipelineError: when it cannot be done; no file of this attempt is left then.
    """
    use_storage_options(recipe.storage)
    store = open_store(round_folder(recipe), private=True, fsync=recipe.fsync)
    committed = _committed(store, partition.id, recipe)
    if committed is not None:
        return committed
    with track_attempt(round_folder(recipe), partition.id, rows=partition.rows) as progress:
        attempt = _Attempt(recipe, partition, store, progress)
        try:
            worker = worker or f"{socket.gethostname()}:{os.getpid()}"
            receipt = attempt.run(versions, worker=worker, isolation=isolation)
        except BaseException:
            attempt.abandon()
            raise
    # From here on an error leaves open whether the receipt landed, so that the files stay.
    cut = attempt.cut
    winner = _commit(store, cut or receipt, recipe)
    if cut is not None and winner.attempt == cut.attempt:
        # The cut is on record: from here on anybody may do the first part, too.
        first = _commit(store, receipt, recipe)
        if first.attempt != receipt.attempt:
            attempt.abandon()
    elif winner.attempt != receipt.attempt:
        attempt.abandon()
    return winner


def round_folder(recipe: StageRecipe) -> str:
    """Path or URL of the folder in which the attempts of ``recipe`` write."""
    return f"{recipe.directory}/{layout.round_folder(recipe.round)}"


class _Attempt:
    """One try at a partition: two files that become part of the output when the receipt lands, and not before."""

    def __init__(self, recipe: StageRecipe, partition: Partition, store: Store, progress: AttemptProgress) -> None:
        self.recipe = recipe
        self.partition = partition
        self.progress = progress
        self.cut: Receipt | None = None
        """The receipt that divides the partition, once this attempt has stopped before its end."""
        self.pace = TimedBatchSizer.begin(recipe.batch_rows, is_known=not recipe.maps)
        self.name = unique_name()
        metadata = _file_metadata(recipe)
        output = pa.ipc.read_schema(pa.py_buffer(recipe.output_schema))
        rejects = reject_schema(pa.ipc.read_schema(pa.py_buffer(recipe.schema)))
        self.data = CheckpointWriter(
            store,
            layout.data_name(partition.id, self.name),
            schema=output,
            metadata=metadata,
            compression=recipe.compression,
            row_group_rows=recipe.row_group_rows,
        )
        self.rejects = CheckpointWriter(
            store, layout.rejects_name(partition.id, self.name), schema=rejects, metadata=metadata
        )

    def run(self, versions: Versions | None, *, worker: str, isolation: Isolation | None = None) -> Receipt:
        """Everything up to the receipt, which is returned, not put."""
        with _open_scorer(self.recipe, self.partition, isolation) as (scorer, model_load, finish):
            return self._run(scorer, versions, worker=worker, model_load=model_load, finish=finish)

    def _run(
        self,
        scorer: Scorer | IsolatedScorer,
        versions: Versions | None,
        *,
        worker: str,
        model_load: float,
        finish: Callable[[], EngineUse],
    ) -> Receipt:
        start = perf_counter() - model_load
        ledger = RowCounter(self.partition)
        reading = [0.0]
        steps = score = 0.0
        rows = read_partition(self.recipe, self.partition, versions=versions)
        with closing(read_ahead(_timed(rows, reading))) as read:
            # A process of its own looks after time and size by itself.
            is_isolated = isinstance(scorer, IsolatedScorer)
            for batch in read if is_isolated else rebatch(read, self.partition.fragments, lambda: self.pace.rows):
                begin = perf_counter()
                scored = scorer.score(batch, paths=ledger.paths)
                self.pace = self.pace.after(batch.table.num_rows, perf_counter() - begin)
                ledger.add(scored, batch.reasons)
                steps, score = steps + scored.seconds_steps, score + scored.seconds_score
                self.data.add(scored.table)
                if scored.rejects is not None:
                    self.rejects.add(scored.rejects)
                if self.progress.advance(ledger.rows_done):
                    self.cut = self._cut_at(ledger.rows_done)
                    break
        files = ledger.files(is_whole=self.cut is None)
        data, rejects = self.data.finish(), self.rejects.finish()
        write = self.data.seconds + self.rejects.seconds
        # What is done elsewhere by now need not be committed.
        self.progress.check()
        return Receipt(
            partition=self.cut.splits[0] if self.cut else self.partition.id,
            plan=self.recipe.plan,
            model=self.recipe.score.model.digest,
            attempt=self.name,
            data=data,
            rejects=rejects,
            rows=RowCounts.total(file.rows for file in files),
            files=files,
            seconds=Timings(reading[0], steps, score, write, model_load, perf_counter() - start),
            worker=worker,
            batch_rows=scorer.batch_rows,
            peak_memory=peak_memory(),
            reasons=dict(ledger.reasons),
            engine=finish(),
            round=self.recipe.round,
            before=dict(ledger.before),
        )

    def _cut_at(self, row: int) -> Receipt:
        """Says that the rows before ``row`` are the first part, and how the rest is divided."""
        rest = even_cuts(row, self.partition.rows, parts=self.progress.pieces, smallest=SMALLEST_REST)
        model = self.recipe.score.model.digest
        return split_receipt(
            self.partition.id,
            (row, *rest),
            plan=self.recipe.plan,
            model=model,
            attempt=self.name,
            round=self.recipe.round,
        )

    def abandon(self) -> None:
        """Remove what this attempt wrote."""
        self.data.abandon()
        self.rejects.abandon()


@contextmanager
def _open_scorer(
    recipe: StageRecipe, partition: Partition, isolation: Isolation | None
) -> Iterator[tuple[Scorer | IsolatedScorer, float, Callable[[], EngineUse]]]:
    """What scores the partition, the seconds it took to have it, and what tells of the engine at the end."""
    if isolation is None:
        evaluator, seconds = get_evaluator(recipe.score)
        yield Scorer(recipe, evaluator), seconds, evaluator.finish
        return
    with closing(IsolatedScorer(recipe, isolation, rows=partition.rows)) as scorer:
        yield scorer, 0.0, scorer.finish


def _commit(store: Store, receipt: Receipt, recipe: StageRecipe) -> Receipt:
    """Put ``receipt`` if its partition has none; the one that counts."""
    if store.put_if_absent(layout.receipt_name(receipt.partition), receipt.to_json()):
        return receipt
    return _committed(store, receipt.partition, recipe) or receipt


def _committed(store: Store, partition: str, recipe: StageRecipe) -> Receipt | None:
    """The receipt of ``partition``, if there is one.

    :raises PlanMismatch: when it belongs to another plan.
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


def _timed(batches: Generator[SourceBatch, None, None], seconds: list[float]) -> Generator[SourceBatch, None, None]:
    """``batches``, with the wall time it takes to make them added to ``seconds[0]``."""
    try:
        while True:
            start = perf_counter()
            batch = next(batches, None)
            seconds[0] += perf_counter() - start
            if batch is None:
                return
            yield batch
            # Not kept here while the next one is made: it may be large.
            del batch
    finally:
        batches.close()


def peak_memory() -> int:
    """Most resident bytes this process has had; 0 where that cannot be told."""
    # Linux counts in KiB, macOS in bytes (getrusage(2)).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _file_metadata(recipe: StageRecipe) -> dict[str, str]:
    """What every file says about where it is from."""
    model = recipe.score.model
    return {
        "pipeline.job": recipe.job,
        "pipeline.plan.planner": recipe.plan,
        "pipeline.models.model": json.dumps(
            {"name": model.name, "version": model.version, "digest": model.digest, "uri": model.reference}
        ),
    }


Versions = Mapping[str, tuple[int, str]]
"""Path of an input file -> its size in bytes and version, as planned."""

_ADDED = (pa.field(REJECT_ROW, pa.int64()), pa.field(REJECT_REASON, pa.string()))


def read_partition(
    recipe: StageRecipe,
    partition: Partition,
    *,
    versions: Versions | None = None,
) -> Generator[SourceBatch, None, None]:
    """The rows of ``partition`` that the filter keeps, at most a batch at a time; see `pipeline.sources.read_batches`.

    :param versions: of its files, as planned; None: not checked.
    """
    if partition.fragments and partition.fragments[0].origin:
        return read_rejects(recipe, partition)
    return read_batches(
        partition,
        columns=recipe.columns,
        schema=pa.ipc.read_schema(pa.py_buffer(recipe.schema)),
        filter=recipe.filter,
        batch_rows=recipe.batch_rows,
        versions=versions,
    )


def read_rejects(recipe: StageRecipe, partition: Partition) -> Generator[SourceBatch, None, None]:
    """The rows of a partition that is made of rejects. No filter is applied: it had kept them.

    :returns: batches with the source's columns, the number each row has in the input file it came from, and its reason.
    :raises CorruptInput: when a file of rejects is damaged.
    """
    schema = pa.ipc.read_schema(pa.py_buffer(recipe.schema))
    fragments = tuple(
        replace(fragment, path=f"{recipe.directory}/{fragment.path}", keys=()) for fragment in partition.fragments
    )
    batches = read_batches(
        fragments,
        columns=(*schema.names, *(field.name for field in _ADDED)),
        schema=pa.schema([*schema, *_ADDED]),
        batch_rows=recipe.batch_rows,
    )
    for batch in batches:
        row = np.asarray(batch.table.column(REJECT_ROW).to_numpy(), dtype=np.int64)
        reasons = tuple(batch.table.column(REJECT_REASON).to_pylist())
        yield replace(batch, table=batch.table.select(schema.names), row=row, reasons=reasons)


class RowCounter:
    """What became of the rows of each fragment, counted as they pass."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.paths = tuple(fragment.origin or fragment.path for fragment in partition.fragments)
        self.reasons: Counter[str] = Counter()
        self.before: Counter[str] = Counter()
        """Reasons for which the rows had been rejected before."""
        # Rows: out, rejected, filtered. Columns: fragments.
        self._counts = np.zeros((3, len(self.paths)), dtype=np.int64)

    def add(self, scored: ScoredBatch, before: Iterable[str] = ()) -> None:
        """Count the rows of a batch.

        :param before: why each of its rows had been rejected before.
        """
        self.before.update(before)
        out = np.bincount(scored.fragment, minlength=len(self.paths))
        self._counts += np.stack([out, scored.rejected, scored.filtered])
        if scored.rejects is not None:
            self.reasons.update(scored.rejects.column(REJECT_REASON).to_pylist())

    @property
    def rows_done(self) -> int:
        """Input rows that are accounted for: a batch tells of what was filtered before its last row, too."""
        return int(self._counts.sum())

    def files(self, *, is_whole: bool = True) -> tuple[FragmentCounts, ...]:
        """The counts per fragment.

        :param is_whole: all rows were read; else the first `rows_done` of them.
        :raises ReconciliationFailed: when rows are missing, or there are too many.
        """
        fragments = self.partition.fragments
        left = [fragment.rows for fragment in fragments] if is_whole else _first_rows(fragments, self.rows_done)
        files = tuple(
            FragmentCounts(part.path, part.row_start, part.row_start + rows, RowCounts(rows, *map(int, counts)))
            for part, rows, counts in zip(fragments, left, self._counts.T, strict=True)
            if rows or is_whole
        )
        for file in files:
            if not file.rows.is_reconciled:
                raise ReconciliationFailed(
                    "rows of a partition are unaccounted for",
                    where=f"partition {self.partition.id}, {file.path} rows {file.row_start} to {file.row_stop}",
                    found=f"{file.rows.out} out, {file.rows.rejected} rejected, {file.rows.filtered} filtered",
                    expected=f"{file.rows.rows_in} in all",
                    next_step="nothing of this attempt was kept; resume, and report it when it happens again",
                )
        return files


def _first_rows(fragments: Sequence[Fragment], rows: int) -> list[int]:
    """How many of the first ``rows`` rows each fragment has."""
    ends = np.cumsum([fragment.rows for fragment in fragments])
    return [int(take) for take in np.diff(np.minimum(ends, rows), prepend=0)]
