"""Drive a stage with a ``dask`` step: compute the partitions that have no receipt, and start over when they do not fit.

Everything that starts over is a round that does all the work again: other versions of Dask, partitions that differ when
they are computed again, or input partitions too large for a worker's memory.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pipeline.common.code_search import is_pinned
from pipeline.common.content import Content
from pipeline.common.step_code import unique_files
from pipeline.common.step_modules import StepModules, modules_of
from pipeline.common.units import format_bytes, iso_time, plural, utc_now
from pipeline.driver.driver import notify_attempt_finished, notify_round_started
from pipeline.driver.job_run import JobRun, ParentContext
from pipeline.errors import InsufficientMemory, PipelineError, ReconciliationFailed
from pipeline.events import AttemptOutcome
from pipeline.execution.by_value import pickled_by_value
from pipeline.execution.clusters import cluster_of, open_cluster
from pipeline.execution.counted_shuffles import count_on_workers
from pipeline.execution.dask_commit import Keeper, keep_rows, rows_content
from pipeline.execution.dask_config import override_config
from pipeline.execution.dask_step import build_frame, fingerprint, frame_schema, key_columns, step_config, step_failed
from pipeline.execution.frame_run import DiffersError, FrameRun, Kept, TooLittleMemoryError
from pipeline.execution.health import DispatchPolicy
from pipeline.execution.protocols import AttemptResult
from pipeline.jobs.cancellation import Stop, partitions_left, stop_checks
from pipeline.jobs.code_archive import read_archived, read_packed
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.receipts import Receipt, SpooledReceipts
from pipeline.jobs.rounds import Round, RoundReason, make_record
from pipeline.jobs.status import Status
from pipeline.plan.dask_recipe import DaskTable, DaskWork
from pipeline.plan.plan import Partition, Plan
from pipeline.report.report import Report
from pipeline.sources import read_batches

logger = logging.getLogger(__name__)
MAX_WHOLE_RUNS = 3
"""Runs in one piece until it is given up."""
STALL_FACTOR = 4
"""Scheduler timeouts without progress until everything is submitted again."""
NAMED_KEYS = 3
"""Most frequent values that an error about memory names."""
_COUNTED_ROWS = 20_000_000
"""Rows of a table in which they are counted."""


@dataclass
class DaskStageDriver(JobRun):
    """Driver of a stage with a ``dask`` step."""

    parent: ParentContext
    receipts: SpooledReceipts = field(default_factory=SpooledReceipts)
    """Receipts of all rounds."""

    @property
    def stop(self) -> Stop:
        """The request to stop this run."""
        return self.parent.stop

    @property
    def ledger(self) -> Ledger:
        """Ledger of all rounds, from the receipts read so far."""
        return self.job.ledger(self.receipts)

    def make_report(
        self, status: Status, *, ledger: Ledger | None = None, error: PipelineError | None = None
    ) -> Report:
        """Return the report of a run that ends with ``status``; by default with the receipts read so far."""
        return super().make_report(status, ledger=self.ledger if ledger is None else ledger, error=error)

    def drive(self) -> Report:
        """Compute the pending partitions, commit the manifest."""
        ledger = self.compute_pending()
        if self.stop.is_cancel:
            raise self.stop.error(self.job.id, left=0)
        manifest = self.job.manifests.prepare(ledger)
        self.lease.check()
        self.job.manifests.commit(manifest)
        made = plural(ledger.rows.output, "row")
        return self.finish(self.make_report(Status.SCORED, ledger=ledger), reason=f"{made} made")

    def compute_pending(self) -> Ledger:
        """Compute all partitions that have no receipt; return the ledger.

        :raises PipelineError: if the step fails, shuffles lose rows, or the cluster is gone.
        """
        self.receipts = SpooledReceipts(self.job.receipts.each())
        if self.ledger.todo:
            self.set_status(Status.PROVISIONING, reason=f"driver {self.lease.epoch} on {self.lease.holder.host} starts")
            with stop_checks(self._check_stop), self._client() as client:
                self._check_stop()
                self.set_status(Status.RUNNING, reason=f"workers are there; {partitions_left(len(self.ledger.todo))}")
                while self.ledger.todo and not self.stop.is_requested:
                    self._compute(client)
            self._check_stop()
        return self.ledger

    def _check_stop(self) -> None:
        if self.stop.is_requested and (pending := self.ledger.todo):
            raise self.stop.error(self.job.id, left=len(pending))

    @contextmanager
    def _client(self) -> Iterator[Any]:
        shared = self.parent.cluster
        if shared is not None:
            with shared.client() as client:
                shared.shake_hands("", has_steps=True)
                yield client
            return
        with open_cluster(cluster_of(self.job.plan.spec, settings=self.settings), directory=self.job.root) as client:
            yield client

    def _compute(self, client: Any) -> None:
        """Compute the pending partitions of the last round, or open a round that does everything anew."""
        round_ = self.ledger.last
        work = work_of(round_.plan)
        is_whole = round_.reason is RoundReason.NOT_DETERMINISTIC
        done = {receipt.partition: receipt for receipt in self.ledger.done}
        if is_whole and done:
            self._restart_whole(round_, "a run in one piece was interrupted")
            return
        modules = self._modules(round_.plan)
        with self._steps(modules), override_config(step_config(work.recipe.shuffle)):
            frame = build_frame(work, modules.function(work.recipe.entrypoint), storage=round_.plan.spec.storage)
            found, partitions = fingerprint(
                frame, frame_schema(frame._meta, where=work.recipe.name), shuffle=work.recipe.shuffle
            )
            if found != work.fingerprint:
                changed = replace(work, fingerprint=found, partitions=partitions)
                self._open_round(round_, changed, RoundReason.VERSIONS, "the step gives other partitions here")
                return
            self._run(client, round_, work, frame, is_whole=is_whole, modules=modules)

    def _run(
        self, client: Any, round_: Round, work: DaskWork, frame: Any, *, is_whole: bool, modules: StepModules
    ) -> None:
        count_on_workers(client)
        keeper = self._keeper(round_, work)
        by_number = dict(enumerate(work.partition_ids))
        pending = {partition.id: partition for partition in self.ledger.todo}
        finished = {
            int(receipt.partition): content_in(receipt)
            for receipt in self.ledger.done
            if receipt.round == round_.number
        }
        notify_round_started(self.job, self.ledger, list(pending.values()), callbacks=self.callbacks)
        run = FrameRun(
            client,
            frame,
            keep=partial(keep_rows, keeper=keeper),
            recall=partial(rows_content, keeper=keeper),
            policy=self._policy(),
            stall_timeout=STALL_FACTOR * self.settings.scheduler_timeout,
            attempts=self.settings.attempts,
            is_stopping=lambda: self.stop.is_requested,
            sending=lambda: pickled_by_value(_own_modules(round_.plan, modules)),
            find=partial(self._find_kept, round_, work),
            poll=self._poll,
        )
        missing = [number for number, name in by_number.items() if name in pending]
        try:
            for kept in run.run(missing, finished):
                self.receipts.add(kept.receipt)
                result = AttemptResult(pending[kept.receipt.partition], 1, AttemptOutcome.DONE, kept.receipt)
                notify_attempt_finished(self.job, result, round=round_.number, callbacks=self.callbacks)
                if is_whole and run.lost_workers:
                    break
        except DiffersError as error:
            self.job.events.append("differs", partition=by_number[error.partition], found=error.difference)
            self._restart_whole(round_, str(error))
            return
        except PipelineError:
            raise
        except TooLittleMemoryError as error:
            self._restart_smaller(round_, work, error, frame)
            return
        except Exception as error:
            raise step_failed(error, work.recipe.name) from error
        if is_whole and run.lost_workers:
            self._restart_whole(round_, f"{plural(run.lost_workers, 'worker')} died in a run in one piece")
            return
        self.job.events.append(
            "computed",
            round=round_.number,
            partitions=len(missing),
            compared=run.checked,
            lost_workers=run.lost_workers,
            submissions=run.submissions,
        )

    def _find_kept(self, round_: Round, work: DaskWork, numbers: Sequence[int]) -> list[Kept]:
        ids = work.partition_ids
        found = ((number, self.job.receipts.find(round_.number, ids[number])) for number in numbers)
        return [Kept(number, content_in(receipt), receipt) for number, receipt in found if receipt is not None]

    def _poll(self) -> None:
        if self.lease.is_lost:
            self.lease.check()

    def _keeper(self, round_: Round, work: DaskWork) -> Keeper:
        plan = round_.plan
        return Keeper(
            job=self.job.id,
            plan=round_.digest,
            directory=self.job.root,
            round=round_.number,
            schema=plan.output_schema,
            entrypoint=work.recipe.name,
            compression=plan.spec.sink.compression,
            fsync=self.job.fsync,
            width=len(work.partition_ids[0]),
            storage=plan.spec.storage,
        )

    def _policy(self) -> DispatchPolicy:
        settings = self.settings
        return DispatchPolicy(
            attempts=settings.attempts,
            no_workers_timeout=settings.no_workers_timeout,
            scheduler_timeout=settings.scheduler_timeout,
            grace=settings.drain_timeout,
        )

    def _modules(self, plan: Plan) -> StepModules:
        paths = self.job.record.import_paths or self.settings.import_paths
        archived = partial(read_archived, self.job.root, plan.code) if plan.spec.step_change == "pin" else None
        stored = partial(read_packed, self.job.root)
        return modules_of(plan.code, import_paths=paths, scope=self.job.root, archived=archived, stored=stored)

    @contextmanager
    def _steps(self, modules: StepModules) -> Iterator[None]:
        """Keep the modules of the step in use. What it prints must not mix with the result of a command."""
        with modules.in_use(), redirect_stdout(sys.stderr):
            yield

    # Rounds that start over

    def _restart_whole(self, round_: Round, reason: str) -> None:
        """Open a round that has to be computed in one run without a lost worker.

        :raises ReconciliationFailed: after several such rounds.
        """
        whole = [one for one in self.job.rounds.all() if one.reason is RoundReason.NOT_DETERMINISTIC]
        if len(whole) >= MAX_WHOLE_RUNS:
            raise ReconciliationFailed(
                "a step that is not deterministic cannot be put together from several runs",
                where=work_of(round_.plan).recipe.name,
                found=f"{reason}; {MAX_WHOLE_RUNS} runs in one piece were tried",
                expected="partitions with the same rows whenever they are computed, or no lost worker",
                next_step="give sample a random_state, and sort before head, cumsum or shift; then run a new job",
            )
        self._open_round(round_, work_of(round_.plan), RoundReason.NOT_DETERMINISTIC, reason)

    def _restart_smaller(self, round_: Round, work: DaskWork, error: TooLittleMemoryError, frame: Any) -> None:
        """Open a round over input partitions of half the size, once.

        :raises InsufficientMemory: the second time.
        """
        if any(one.reason is RoundReason.MEMORY for one in self.job.rounds.all()):
            raise self._too_large(work, error, frame) from error
        halved = self._refingerprinted(round_, work.halved())
        self._open_round(
            round_,
            halved,
            RoundReason.MEMORY,
            f"{error}; input partitions of at most {format_bytes(halved.recipe.partition_bytes or 0)}",
        )

    def _refingerprinted(self, round_: Round, work: DaskWork) -> DaskWork:
        function = self._modules(round_.plan).function(work.recipe.entrypoint)
        frame = build_frame(work, function, storage=round_.plan.spec.storage)
        schema = frame_schema(frame._meta, where=work.recipe.name)
        digest, partitions = fingerprint(frame, schema, shuffle=work.recipe.shuffle)
        return replace(work, fingerprint=digest, partitions=partitions)

    def _too_large(self, work: DaskWork, error: TooLittleMemoryError, frame: Any) -> InsufficientMemory:
        named = ", ".join(f"{number:05d}" for number in error.partitions)
        keys = key_columns(frame, work.main.arrow.names)
        frequent = frequent_values(work.main, keys[0]) if keys else ""
        return InsufficientMemory(
            "workers do not have the memory for a dask step",
            where=f"{work.recipe.name}, " + (f"partition {named}" if named else "while rows were shuffled"),
            found=f"workers were killed for their memory, with input partitions of {format_bytes(work.largest_bytes)}"
            + (f"; most frequent values of {keys[0]}: {frequent}" if frequent else ""),
            expected="partitions of the result, each with all rows of its keys, of which a worker can hold three",
            next_step="give each worker more memory, or make rows of frequent keys fewer before the step; "
            "or set a smaller partition_bytes",
        )

    def _open_round(self, round_: Round, work: DaskWork, reason: RoundReason, change: str) -> None:
        logger.warning("%s: all partitions of %s are computed anew: %s", self.job.id, work.recipe.name, change)
        number = self.job.rounds.next_number()
        plan = with_work(round_.plan, replace(work, attempt=number))
        record = make_record(
            plan,
            number=number,
            reason=reason,
            epoch=self.lease.epoch,
            created=iso_time(utc_now()),
            supersedes={},
            changes=(change,),
            rescore_all=True,
        )
        self.lease.check()
        self.job.rounds.open(record, plan)


def work_of(plan: Plan) -> DaskWork:
    """Return the work of the plan of a stage with a ``dask`` step."""
    if plan.dask is None:
        raise ValueError("the plan has no dask step")
    return plan.dask


def with_work(plan: Plan, work: DaskWork) -> Plan:
    """Return the plan of a stage over another work: its partitions are numbered anew."""
    return replace(plan, dask=work, partitions=tuple(Partition(name, ()) for name in work.partition_ids))


def content_in(receipt: Receipt) -> Content | None:
    """Return the content of the rows of a receipt; None if it has none."""
    return Content.from_dict(receipt.content) if receipt.content else None


def _own_modules(plan: Plan, modules: StepModules) -> list[str]:
    """Return the modules of the job's folders, which workers may not have; installed packages are imported there."""
    files = unique_files(plan.code).values()
    return [file.module for file in files if is_pinned(file.path, modules.import_paths)]


def frequent_values(table: DaskTable, column: str) -> str:
    """Return the most frequent values of a column with their rows, as text; empty if it cannot be read."""
    counts: Counter[Any] = Counter()
    schema, rows = table.arrow, 0
    if column in table.keys:
        return ""
    try:
        for ranges in table.packed(threads=1, target_bytes=None):
            batches = read_batches(
                ranges,
                columns=(column,),
                schema=schema.empty_table().select([column]).schema,
                batch_rows=1 << 18,
                versions=table.versions,
                format=table.format,
            )
            for batch in batches if ranges else ():
                for pair in batch.table.column(0).value_counts().to_pylist():
                    counts[pair["values"]] += pair["counts"]
                rows += batch.table.num_rows
            if rows > _COUNTED_ROWS:
                break
    except (PipelineError, OSError, TypeError):
        logger.warning("the values of %s cannot be counted", column, exc_info=True)
        return ""
    return ", ".join(f"{value!r} in {plural(count, 'row')}" for value, count in counts.most_common(NAMED_KEYS))
