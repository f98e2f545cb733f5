"""What a worker does with a partition: read, run the steps, score, write, and put the receipt, all as a stream.

Memory is bounded by the batch and the row group being written, whatever the size of the partition: the next batch is
read while this one is scored, and no more than that is held. (Writing has no thread of its own: the cores are busy
with the tasks beside this one, so that it would only cost memory.)
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from time import perf_counter

import pyarrow as pa

from pipeline.common.rows import RowCounts
from pipeline.errors import PlanMismatch
from pipeline.jobs.receipts import Receipt, Seconds
from pipeline.jobs.splits import even_cuts, split_receipt
from pipeline.models.engines import EngineUse, get_evaluator
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import StageRecipe
from pipeline.scoring.batching import resized
from pipeline.scoring.checkpoint import PartFile
from pipeline.scoring.isolation import IsolatedScorer, Isolation
from pipeline.scoring.outputs import reject_schema
from pipeline.scoring.pace import Pace
from pipeline.scoring.progress import SMALLEST_REST, Progress, tracked
from pipeline.scoring.reread import Versions, read_partition
from pipeline.scoring.row_ledger import RowLedger
from pipeline.scoring.scorer import Scorer
from pipeline.sources import SourceBatch, read_ahead
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
    store = open_store(stage_folder(recipe), private=True, fsync=recipe.fsync)
    committed = _committed(store, partition.id, recipe)
    if committed is not None:
        return committed
    with tracked(stage_folder(recipe), partition.id, rows=partition.rows) as progress:
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


def stage_folder(recipe: StageRecipe) -> str:
    """Path or URL of the folder in which the attempts of ``recipe`` write."""
    return f"{recipe.directory}/stages/{recipe.stage}"


class _Attempt:
    """One try at a partition: two files that become part of the output when the receipt lands, and not before."""

    def __init__(self, recipe: StageRecipe, partition: Partition, store: Store, progress: Progress) -> None:
        self.recipe = recipe
        self.partition = partition
        self.progress = progress
        self.cut: Receipt | None = None
        """The receipt that divides the partition, once this attempt has stopped before its end."""
        self.pace = Pace.begin(recipe.batch_rows, is_known=not recipe.maps)
        self.name = unique_name()
        file = f"{partition.id}-{self.name}.parquet"
        metadata = _file_metadata(recipe)
        output = pa.ipc.read_schema(pa.py_buffer(recipe.output_schema))
        rejects = reject_schema(pa.ipc.read_schema(pa.py_buffer(recipe.schema)))
        self.data = PartFile(
            store,
            f"data/{file}",
            schema=output,
            metadata=metadata,
            compression=recipe.compression,
            row_group_rows=recipe.row_group_rows,
        )
        self.rejects = PartFile(store, f"rejects/{file}", schema=rejects, metadata=metadata)

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
        ledger = RowLedger(self.partition)
        reading = [0.0]
        steps = score = 0.0
        rows = read_partition(self.recipe, self.partition, versions=versions)
        with closing(read_ahead(_timed(rows, reading))) as read:
            # A process of its own looks after time and size by itself.
            is_isolated = isinstance(scorer, IsolatedScorer)
            for batch in read if is_isolated else resized(read, self.partition.fragments, lambda: self.pace.rows):
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
            seconds=Seconds(reading[0], steps, score, write, model_load, perf_counter() - start),
            worker=worker,
            batch_rows=scorer.batch_rows,
            peak_memory=peak_memory(),
            reasons=dict(ledger.reasons),
            engine=finish(),
            stage=self.recipe.stage,
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
            stage=self.recipe.stage,
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
    if store.put_if_absent(_place(receipt.partition), receipt.to_json()):
        return receipt
    return _committed(store, receipt.partition, recipe) or receipt


def _place(partition: str) -> str:
    return f"receipts/{partition}.json"


def _committed(store: Store, partition: str, recipe: StageRecipe) -> Receipt | None:
    """The receipt of ``partition``, if there is one.

    :raises PlanMismatch: when it belongs to another plan.
    """
    place = _place(partition)
    try:
        data = store.read(place)
    except FileNotFoundError:
        return None
    receipt = Receipt.from_json(data, where=store.url(place))
    if receipt.plan != recipe.plan:
        raise PlanMismatch(
            "a receipt belongs to another plan",
            where=store.url(place),
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
