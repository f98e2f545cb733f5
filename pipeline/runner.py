"""The one way through a job. `run`, `resume`, the command line and a notebook cell all go it."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

from pipeline.alias_follower import AliasFollower, pinned_version
from pipeline.cancel import watched
from pipeline.checkpoint import JobDirectory, new_job_id
from pipeline.clusters import open_cluster
from pipeline.clusters.handshake import shake_hands
from pipeline.dispatch import Dispatcher, Ended, Policy
from pipeline.errors import Fenced, InputError, JobLocked, PipelineError, StorageError
from pipeline.events import Callback, JobEnded, notify
from pipeline.family import FamilyDriver, Within, is_ready
from pipeline.hooks import hooked, hooks_of
from pipeline.job_log import recorded
from pipeline.job_record import utc_now
from pipeline.jobs import find_job, parent_of
from pipeline.lease import Lease, held
from pipeline.ledger import Ledger
from pipeline.lifecycle import Status, status_after
from pipeline.neighbours import Neighbours
from pipeline.plan import Partition, Plan, dispatch_order
from pipeline.prepare import cluster_of, first_sink, importable, prepare, settings_of
from pipeline.receipt import Receipt
from pipeline.redaction import masked_logs, redact_error
from pipeline.rejects import first_examples, summarise
from pipeline.relief import Helped, Relief
from pipeline.report import Report, decide_status, make_report
from pipeline.retry import Wanted, open_retry
from pipeline.set_aside import open_without
from pipeline.settings import Settings, load_settings
from pipeline.sinks import prove, publish
from pipeline.spec import JobSpec
from pipeline.stage import Stage, load_graph
from pipeline.stop import Stop, Why, checked, on_signals
from pipeline.tasks import read_receipt
from pipeline.telling import tell_end, tell_start

logger = logging.getLogger(__name__)
Ending = TypeVar("Ending")


def run(
    spec: JobSpec,
    *,
    settings: Settings | None = None,
    job_id: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Plan ``spec``, score every row, and publish.

    :param job_id: id for the job; one that exists with the same plan is gone on with. Default: a new one.
    :raises PipelineError: when the job failed or was interrupted; its directory says why and can be resumed.
    """
    settings = settings or load_settings()
    pinned = pinned_version(spec, job=job_id, settings=settings) if spec.fan_out is None else None
    prepared = prepare(spec, settings=settings, job=job_id or "", version=pinned)
    prove(first_sink(prepared.plan))
    job = JobDirectory.open_or_create(
        settings.directory,
        prepared.plan,
        job=job_id or new_job_id(spec.name, now=utc_now(), entropy=secrets.token_hex(2)),
        import_paths=settings.import_paths,
        fsync=settings.fsync,
    )
    return execute(job, settings=settings, callbacks=callbacks)


def resume(job: str, *, settings: Settings | None = None, callbacks: Sequence[Callback] = ()) -> Report:
    """Go on with an unfinished job; what is done is not done again. A finished job gives its report.

    :param job: id, unique prefix of one, ``@last``, or the path of a job directory.
    """
    settings = settings or load_settings()
    directory = find_job(settings.directory, job)
    directory.fsync = settings.fsync
    return execute(directory, settings=settings, callbacks=callbacks)


def retry(
    job: str,
    *,
    model: str | None = None,
    overrides: Sequence[str] = (),
    settings: Settings | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Score again what a job left out: rejected rows, undone partitions, mended files; heal its output in one commit.

    :param job: id, unique prefix of one, ``@last``, or the path of a job directory.
    :param model: a model reference or file to score them with. Default: what was used last.
    :param overrides: such as ``steps.0.map=features:mended``; steps, contract and errors may be changed.
    :raises PipelineError: when it failed; ``retry`` or `resume` goes on with it.
    """
    settings = settings or load_settings()
    directory = find_job(settings.directory, job)
    directory.fsync = settings.fsync
    begin = partial(open_retry, wanted=Wanted(model, tuple(overrides)), settings=settings)
    return execute(directory, settings=settings, callbacks=callbacks, begin=begin)


def execute(
    job: JobDirectory,
    *,
    settings: Settings,
    callbacks: Sequence[Callback] = (),
    unless: Callable[[JobDirectory], bool] = lambda job: job.is_ended,
    begin: Callable[..., object] | None = None,
    within: Within | None = None,
) -> Report:
    """Take ``job`` from where it is to its end, as its only driver.

    :param unless: whether there is nothing to do for this driver; its report is given then as it is.
    :param begin: what its driver does first, given its ``epoch``, such as to open a round; it may refuse to.
    :param within: of the fan-out whose driver drives it as a child.
    :raises JobLocked: when another driver is at work on it.
    :raises Fenced: when another one took it over meanwhile; this one then leaves everything as it is.
    """
    if begin is None and unless(job):
        return make_report(job)
    settings = settings_of(job.plan.spec, settings=settings)
    hooks = hooks_of(job.plan.spec, settings) if within is None else ()
    with (
        hooked(job, hooks, grace=settings.hook_grace) as told,
        held(job.store, lease_seconds=settings.lease_seconds) as lease,
    ):
        if begin is not None:
            begin(job, epoch=lease.epoch)
        # Another driver may have ended the job while this one waited for it.
        if unless(job):
            return make_report(job)
        with recorded(job.store, epoch=lease.epoch) as log:
            driver = _driver(job, lease, settings, (*callbacks, log, *told), within)
            report = _drive(driver, driver.drive)
    return _add_up(job, report, settings) if job.record.parent and within is None else report


def _driver(
    job: JobDirectory, lease: Lease, settings: Settings, callbacks: tuple[Callback, ...], within: Within | None
) -> _Driver | FamilyDriver:
    def drive_child(child: JobDirectory, within: Within, callbacks: Sequence[Callback]) -> Report:
        return execute(child, settings=settings, callbacks=callbacks, within=within)

    if job.record.children:
        return FamilyDriver(job, lease, settings, callbacks, drive_child)
    return _Driver(job, lease, settings, callbacks, within or Within(Stop(), None, job.record.publishes))


def _add_up(child: JobDirectory, report: Report, settings: Settings) -> Report:
    """The report of a child that was driven alone, once its fan-out has taken note. If it was the last that the others
    waited for, all are published now."""
    parent = parent_of(child)
    try:
        if all(is_ready(one) for one in parent.children()):
            execute(parent, settings=settings)
            return make_report(child)
        with held(parent.store, lease_seconds=settings.lease_seconds):
            parent.write_report(make_report(parent).to_dict())
    except JobLocked:
        logger.info("the driver of %s takes note of what became of its children", parent.job)
    return report


def probe(
    job: JobDirectory, partitions: Sequence[Partition], *, settings: Settings, callbacks: Sequence[Callback] = ()
) -> None:
    """Score ``partitions`` of ``job`` and no more. They stay done; the job is PLANNED afterwards, and `resume` goes on.

    :raises JobLocked: when another driver is at work on it.
    """
    with held(job.store, lease_seconds=settings.lease_seconds) as lease:
        driver = _Driver(job, lease, settings, tuple(callbacks), Within(Stop(), None, False))
        _drive(driver, lambda: driver.probe(partitions))


def _drive(driver: _Driver | FamilyDriver, go: Callable[[], Ending]) -> Ending:
    job, lease = driver.job, driver.lease
    job.append_event("driver", epoch=lease.epoch, taken=str(lease.taken), host=lease.holder.host, pid=lease.holder.pid)
    try:
        with (
            masked_logs(),
            on_signals(driver.stop),
            watched(job.store, lease.epoch, driver.stop),
            importable(job.record.import_paths),
        ):
            return go()
    except BaseException as error:
        masked = redact_error(error)
        if (fenced := driver.fenced()) is not None:
            raise fenced from masked
        driver.give_up(masked)
        if masked is not error:
            raise masked from None
        raise


@dataclass
class _Driver:
    """One process's way through one job."""

    job: JobDirectory
    lease: Lease
    settings: Settings
    callbacks: tuple[Callback, ...]
    within: Within
    receipts: dict[tuple[int, str], Receipt] = field(default_factory=dict)
    """By round and partition."""
    started: float = field(default_factory=time.monotonic)
    stage: Stage = field(init=False)
    """The partitions of the last round."""

    @cached_property
    def model(self) -> AliasFollower:
        """What is done about a model whose alias moves."""
        return AliasFollower(self.job, self.lease, self.settings, self.stop)

    @property
    def stop(self) -> Stop:
        """Who asks it to stop."""
        return self.within.stop

    @property
    def ledger(self) -> Ledger:
        """What counts so far, over all rounds."""
        return self.job.ledger(self.receipts.values())

    def drive(self) -> Report:
        """Score what is left, decide, commit, publish."""
        self._read_receipts()
        self.model.follow(self.ledger)
        while todo := self._todo():
            self._score(todo)
            self.model.follow(self.ledger)
        status = self._decide()
        if self.stop.is_cancel:
            raise self.stop.error(self.job.job, left=0)
        if not self.within.publishes:
            return self._finish(Status.SCORED)
        self._go(Status.PUBLISHING, reason="every partition is done")
        manifest = self.job.next_manifest(self.receipts.values())
        self.lease.check()
        committed = self.job.commit_manifest(manifest)
        self.lease.check()
        publish(committed.manifest, self.job)
        self.job.append_event("published", manifest=manifest.number, rows=manifest.rows.out)
        return self._finish(status)

    def _finish(self, status: Status) -> Report:
        report = self.report(status)
        self.lease.check()
        self.job.write_report(report.to_dict())
        self._go(status, reason=f"published; {report.rows.rejected:,} rows were rejected")
        self._end(report)
        return report

    def probe(self, partitions: Sequence[Partition]) -> None:
        """Score those of ``partitions`` that are left."""
        self.model.is_paused = True
        self._read_receipts()
        wanted = {partition.id for partition in partitions}
        todo = tuple(partition for partition in self._todo() if partition.id in wanted)
        if todo:
            self._score(todo)
        self._go(Status.PLANNED, reason="probed")

    def report(self, status: Status, *, error: PipelineError | None = None) -> Report:
        """The report of a job that ended like that."""
        return make_report(
            self.job,
            receipts=tuple(self.receipts.values()),
            status=status,
            seconds=time.monotonic() - self.started,
            error=error,
        )

    def give_up(self, error: BaseException) -> None:
        """Record why the run ended. It must not hide ``error``, so what goes wrong here is only logged."""
        known = error if isinstance(error, PipelineError) else PipelineError(f"{type(error).__name__}: {error}")
        status = status_after(error)
        try:
            report = self.report(status, error=known)
            self.job.write_report(report.to_dict())
            self._go(status, reason=known.message)
            self._end(report, reason=known.message)
        except Exception:
            logger.exception("the end of job %s could not be recorded", self.job.job)

    def fenced(self) -> Fenced | None:
        """What to raise when another driver has taken over: nothing of this one's end may be recorded then."""
        try:
            return self.lease.fenced()
        except (StorageError, OSError):
            logger.exception("whether another driver has taken job %s over cannot be told", self.job.job)
            return None

    def _read_receipts(self) -> None:
        self.receipts = {(receipt.stage, receipt.partition): receipt for receipt in self.job.receipts()}

    def _todo(self) -> tuple[Partition, ...]:
        return dispatch_order(self.ledger.todo)

    def _score(self, todo: Sequence[Partition]) -> None:
        self._go(Status.PROVISIONING, reason=f"driver {self.lease.epoch} on {self.lease.holder.host} starts")
        # Nothing runs yet, so that there is nothing to wait for when the job is to stop.
        with checked(self._check_stop), self._client(self.ledger.last.plan) as client:
            self._check_stop()
            self._go(Status.RUNNING, reason=f"workers are there; {len(todo):,} partitions are left")
            while todo and not self.stop.is_requested:
                todo = self._dispatch(client, todo)
        self._check_stop()

    def _check_stop(self) -> None:
        """What was asked for ends the run, when there is anything left to do."""
        # A model that has moved is for its follower to deal with.
        if self.stop.is_requested and self.stop.why is not Why.DRIFT and (todo := self._todo()):
            raise self.stop.error(self.job.job, left=len(todo))

    def _dispatch(self, client: Any, todo: Sequence[Partition]) -> Sequence[Partition]:
        """Do ``todo``; what is left when an input file turned out bad, and the job goes on without it."""
        self.stage = Stage(self.job, self.ledger.last, self.settings.partition_timeout)
        tell_start(self.job, self.ledger, todo, callbacks=self.callbacks)
        try:
            with self.stage.batches_on(client):
                for receipt in self._dispatcher(client).run(todo):
                    self.receipts[receipt.stage, receipt.partition] = receipt
                    if self.lease.is_lost:
                        self.lease.check()
        except InputError as error:
            self.lease.check()
            if self.model.is_paused or open_without(self.job, self.ledger, error, epoch=self.lease.epoch) is None:
                raise
            return self._todo()
        return ()

    @contextmanager
    def _client(self, plan: Plan) -> Iterator[Any]:
        """A client of the cluster: of the one of its fan-out, or of one for this job."""
        if self.within.cluster is not None:
            with self.within.cluster.client(plan.model.flavor) as client:
                yield client
            return
        cluster = cluster_of(plan.spec, settings=self.settings)
        load_graph()
        with open_cluster(cluster, directory=self.job.root) as client:
            shake_hands(client, flavor=plan.model.flavor, timeout=self.settings.scheduler_timeout)
            yield client

    def _dispatcher(self, client: Any) -> Dispatcher:
        settings, stage = self.settings, self.stage
        return Dispatcher(
            client,
            submit=stage.submit,
            read=read_receipt,
            isolate=stage.isolate,
            split=stage.split,
            relief=self._relief(client),
            policy=Policy(
                attempts=settings.attempts,
                no_workers_timeout=settings.no_workers_timeout,
                scheduler_timeout=settings.scheduler_timeout,
                grace=settings.grace,
                partition_timeout=settings.partition_timeout,
            ),
            stop=self.stop,
            on_ended=self._partition_ended,
            on_look=partial(self.model.poll, stage.round),
            neighbours=self.within.cluster.neighbours if self.within.cluster else Neighbours(),
        )

    def _relief(self, client: Any) -> Relief | None:
        # Which workers are idle cannot be told where other children have some of them.
        if not self.settings.stragglers or self.within.cluster is not None:
            return None
        return self.stage.relief(client, on_helped=self._helped)

    def _decide(self) -> Status:
        """How the job ends by its rejects.

        :raises PipelineError: when there are too many.
        """
        ledger = self.ledger
        examples = first_examples(summarise(self.job)) if ledger.rows.rejected else None
        return decide_status(ledger, job=self.job.job, examples=examples)

    def _go(self, after: Status, *, reason: str = "") -> None:
        self.lease.check()
        notify(self.callbacks, self.job.set_status(after, reason=reason))

    def _partition_ended(self, ended: Ended) -> None:
        self.stage.learn(ended)
        tell_end(self.job, ended, stage=self.stage.round.number, callbacks=self.callbacks)

    def _helped(self, helped: Helped) -> None:
        self.job.append_event("straggler", **asdict(helped))

    def _end(self, report: Report, *, reason: str = "") -> None:
        notify(
            self.callbacks,
            JobEnded(report.job, report.status, report.rows, report.output, report.directory, reason, report.to_dict()),
        )
