"""`TransactionalSink`: base of sinks that store rows and the number of their manifest in one transaction.

Readers of such a target see the rows of a manifest or those before it, and never something between. The number, which
is stored in the same transaction, tells after a crash which of the two. Publishing goes through these steps:

1. read the job's own record of what is published, then the number in the target: if it is there, nothing is left to do;
2. stage the rows that are missing, where readers do not see them;
3. commit: move the rows into the target and store the number, in one transaction that looks at the number first;
4. read the number back, remove what was staged, and record in the job directory that the manifest is published.

Each step can be repeated. Of two drivers that publish one manifest, one commits, and the other finds the number.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar, Generic, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.digest import digest_json
from pipeline.common.units import iso_time, utc_now
from pipeline.errors import OutputConflict, PipelineError, StateCorrupt
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.manifest import Manifest, ManifestFile
from pipeline.sinks import PublishedFile, SinkContents, SinkLeftover, SinkLeftoverKind, SinkRequest
from pipeline.sinks.parquet.pack import check_sources, read_row_groups
from pipeline.sources.parquet.opening import open_source, parquet_errors
from pipeline.spec.sink import Sink
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import with_storage_options

logger = logging.getLogger(__name__)
_MAX_ATTEMPTS = 3
"""Number of times to stage again because staged rows were lost."""
_THREADS = 4
"""Files that are staged at a time."""


class Target(Protocol):
    """An open connection to the target of a sink."""

    def close(self) -> None:
        """Close the connection. A transaction that is open is rolled back."""


T = TypeVar("T", bound=Target)


@dataclass(frozen=True)
class SinkJob:
    """A job that publishes to one sink."""

    id: str
    plan: str
    """Digest of the job's plan."""
    sink: Sink
    """The sink as in the job spec; local paths are absolute."""
    root: str
    """Path or URL of the job directory."""
    schema: pa.Schema
    """Columns of the output."""

    @staticmethod
    def of(manifest: Manifest, directory: JobDirectory) -> SinkJob:
        """Return the job that ``directory`` holds."""
        spec = directory.plan.spec
        sink = spec.sink
        if sink.path:
            sink = sink.model_copy(update={"path": directory.resolve(sink.path)})
        schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(manifest.schema))).remove_metadata()
        return SinkJob(directory.id, manifest.plan, sink, directory.root, schema)

    @property
    def tag(self) -> str:
        """Digest of job and place, 16 digits: a name for what the job stages, or for its files in the target."""
        return digest_json([self.id, self.sink.format, self.sink.place])[:16]

    @property
    def place_digest(self) -> str:
        """Digest of the sink's place, 16 digits: names the records of its publications in the job directory."""
        return digest_json([self.sink.format, self.sink.place])[:16]

    @cached_property
    def store(self) -> Store:
        """Storage of the job directory."""
        return open_store(self.root, private=True)

    def read(self, file: ManifestFile) -> Iterator[pa.Table]:
        """Yield the rows of a file of the job, one table per row group, with the columns of ``schema``.

        :raises StateCorrupt: if the file is missing or damaged.
        """
        for table in read_row_groups(file, store=self.store):
            yield table.select(self.schema.names).replace_schema_metadata(None)

    def read_all(self, files: Iterable[ManifestFile]) -> Iterator[pa.Table]:
        """Yield the rows of several files, in order."""
        for file in files:
            yield from self.read(file)


@dataclass(frozen=True)
class Change:
    """A manifest to commit to a target, and its difference to the manifest of the same job that is there."""

    job: SinkJob
    number: int
    """Number of the manifest."""
    previous: int
    """Number of the manifest that readers of the target see now; 0: none."""
    files: tuple[ManifestFile, ...]
    """All files of the manifest."""
    added: tuple[ManifestFile, ...]
    """Files that the previous manifest does not name."""
    removed: tuple[ManifestFile, ...]
    """Files that only the previous manifest names. Their rows must not be in the target any more."""

    @staticmethod
    def of(job: SinkJob, manifest: Manifest, directory: JobDirectory, *, previous: int) -> Change:
        """Compare ``manifest`` with the manifest ``previous`` of the same job.

        :raises StateCorrupt: when the job directory has no manifest ``previous``.
        """
        before: tuple[ManifestFile, ...] = ()
        if previous:
            found = directory.manifests.find(previous)
            if found is None:
                raise StateCorrupt(
                    "the target has rows of a manifest that the job directory does not have",
                    where=job.sink.place,
                    found=f"manifest {previous} of job {job.id}",
                    expected=f"one of {', '.join(map(str, directory.manifests.numbers()))}",
                    next_step="restore the job directory, or run the job spec again as a new job",
                )
            before = found.files
        names, names_before = ({file.name for file in files} for files in (manifest.files, before))
        return Change(
            job,
            manifest.number,
            previous,
            manifest.files,
            tuple(file for file in manifest.files if file.name not in names_before),
            tuple(file for file in before if file.name not in names),
        )

    @property
    def rows(self) -> int:
        """Number of rows of the manifest."""
        return sum(file.rows for file in self.files)

    @property
    def mode(self) -> str:
        """``sink.mode``."""
        return self.job.sink.mode


class StagingLost(Exception):
    """Rows that were staged are gone, such as those of a database that crashed: they are staged again."""


class TransactionalSink(ABC, Generic[T]):
    """Base of sinks that commit rows and the number of their manifest in one transaction.

    A subclass describes the target; this class publishes, repairs, reads and verifies. `reached` is called between all
    operations: the contract suite of `pipeline.testing.sink_contract` lets the process die there.
    """

    stages: ClassVar[bool] = True
    """False if `commit` reads the rows from the job directory, and nothing is staged before."""

    @abstractmethod
    def check(self, sink: Sink, request: SinkRequest) -> None:
        """Refuse a sink that `commit` would refuse, before anything runs; see `pipeline.sinks.check`. Change nothing.

        Types of ``request.schema`` that the target cannot hold are refused here, by the name of the column.
        """

    @abstractmethod
    def connect(self, job: SinkJob) -> T:
        """Open the target. Threads that stage open their own.

        :raises SpecError: if a reference to a secret cannot be resolved.
        :raises StorageError: if the target cannot be reached.
        """

    @abstractmethod
    def committed(self, target: T, job: SinkJob) -> int:
        """Return the number of the manifest of ``job`` that readers see; 0 if they see none.

        :raises OutputConflict: if another job with the same id has published there.
        """

    @abstractmethod
    def commit(self, target: T, change: Change) -> None:
        """Store the rows of ``change`` and its number in one transaction, unless the number is there already.

        The number is read again inside the transaction: another driver may have committed since.

        :raises OutputExists: if the target has rows, and the mode is ``error``.
        :raises OutputConflict: if the rows cannot be stored there.
        :raises StagingLost: if staged rows are missing; nothing was changed.
        """

    def parts(self, target: T, change: Change) -> Sequence[ManifestFile]:
        """Return the files whose rows `commit` needs staged. Default: those that the previous manifest does not name.

        :raises OutputConflict: if the difference cannot be published, such as rows that cannot be found any more.
        """
        return change.added

    def staged(self, target: T, change: Change) -> Mapping[str, int]:
        """Return the number of rows of each file that is staged, by its name; make the target ready for staging."""
        return {}

    def stage(self, target: T, job: SinkJob, file: ManifestFile) -> None:
        """Copy the rows of a file beside the target, where readers do not see them. A second call changes nothing."""

    def unstage(self, target: T, job: SinkJob) -> None:
        """Remove everything that is staged for ``job``. Can be repeated."""

    def has_staged(self, target: T, job: SinkJob) -> bool:
        """True if something is staged for ``job``. Changes nothing."""
        return False

    def verify_target(self, target: T, change: Change) -> str:
        """Check rows in the target beside the number. Return a sentence about it.

        :param change: the published manifest, as if nothing had been published before.
        :raises OutputConflict: if rows are missing or have other values.
        """
        return f"the target has manifest {change.number}"

    def reached(self, step: str) -> None:
        """Do nothing. Called after each operation, with its name."""

    # The rest is the same for all targets.

    def check_storage(self, sink: Sink) -> None:
        """Do nothing: the transaction of the target is the commit."""

    def publish(
        self,
        manifest: Manifest,
        directory: JobDirectory,
        *,
        check_lease: Callable[[], object] = lambda: None,
    ) -> SinkContents:
        """Publish once; see `pipeline.sinks.publish`."""
        job = SinkJob.of(manifest, directory)
        if published_number(directory, job) >= manifest.number:
            return contents(manifest, directory, job, is_new=False)
        check_sources(manifest, store=directory.store)
        with closing(self.connect(job)) as target:
            self.reached("connected")
            is_new = self._publish(target, job, manifest, directory, check_lease=check_lease)
            self.unstage(target, job)
            self.reached("unstaged")
        record_publication(directory, job, manifest)
        self.reached("recorded")
        return contents(manifest, directory, job, is_new=is_new)

    def _publish(
        self,
        target: T,
        job: SinkJob,
        manifest: Manifest,
        directory: JobDirectory,
        *,
        check_lease: Callable[[], object],
    ) -> bool:
        """Stage and commit. Return False if the manifest is in the target already."""
        for _ in range(_MAX_ATTEMPTS):
            previous = self.committed(target, job)
            self.reached("looked")
            if previous >= manifest.number:
                return False
            change = Change.of(job, manifest, directory, previous=previous)
            try:
                self._stage(target, change)
                check_lease()
                self.commit(target, change)
            except StagingLost as error:
                logger.warning("rows of job %s are staged again in %s: %s", job.id, job.sink.place, error)
                continue
            except PipelineError:
                # The driver that was faster has removed what this one staged or looked at.
                if self.committed(target, job) >= manifest.number:
                    return False
                raise
            self.reached("committed")
            if (number := self.committed(target, job)) < manifest.number:
                raise OutputConflict(
                    "the target does not have what was committed to it",
                    where=job.sink.place,
                    found=f"manifest {number}",
                    expected=f"manifest {manifest.number} of job {job.id}",
                    next_step=f"python -m pipeline resume {job.id}",
                )
            return True
        raise OutputConflict(
            "staged rows are lost again and again",
            where=job.sink.place,
            found=f"{_MAX_ATTEMPTS} attempts",
            next_step=f"look at the log of the database, then: python -m pipeline resume {job.id}",
        )

    def _stage(self, target: T, change: Change) -> None:
        parts = self.parts(target, change)
        if not self.stages:
            return
        staged = self.staged(target, change)
        self.reached("staging is ready")
        missing = [file for file in parts if staged.get(file.name) != file.rows]
        if len(missing) <= 1:
            for file in missing:
                self.stage(target, change.job, file)
                self.reached("staged a file")
            return
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="stage") as pool:
            for _ in pool.map(with_storage_options(partial(self.stage_file, change.job)), missing):
                self.reached("staged a file")

    def stage_file(self, job: SinkJob, file: ManifestFile) -> None:
        """Stage a file through a connection of its own."""
        with closing(self.connect(job)) as target:
            self.stage(target, job, file)

    def read_published(self, manifest: Manifest, directory: JobDirectory) -> SinkContents | None:
        """Return the files whose rows are published; see `pipeline.sinks.read_published`.

        The job's own record is trusted. Without it, the target is asked.
        """
        job = SinkJob.of(manifest, directory)
        if published_number(directory, job) < manifest.number:
            with closing(self.connect(job)) as target:
                if self.committed(target, job) < manifest.number:
                    return None
        return contents(manifest, directory, job, is_new=False)

    def verify(self, manifest: Manifest, directory: JobDirectory) -> str:
        """Look into the target; see `pipeline.sinks.VerifiableSink`."""
        job = SinkJob.of(manifest, directory)
        with closing(self.connect(job)) as target:
            number = self.committed(target, job)
            if number != manifest.number:
                raise OutputConflict(
                    "the target does not have the last manifest of the job",
                    where=job.sink.place,
                    found=f"manifest {number}" if number else "no rows of the job",
                    expected=f"manifest {manifest.number}",
                    next_step=f"python -m pipeline resume {job.id}",
                )
            change = replace(Change.of(job, manifest, directory, previous=0), previous=number)
            return self.verify_target(target, change)

    def read_file(self, path: str) -> pa.Table:
        """Return the rows of a published file, from the job directory."""
        with parquet_errors(path), open_source(path) as source:
            return pq.read_table(source)

    def find_strays(self, manifest: Manifest, directory: JobDirectory) -> tuple[str, ...]:
        """Return nothing: other rows of the target are not this job's to judge."""
        return ()

    def leftovers(self, directory: JobDirectory) -> tuple[SinkLeftover, ...]:
        """List what is staged for a manifest that is not published; see `pipeline.sinks.leftovers`."""
        manifest = directory.manifests.last() if self.stages else None
        if manifest is None:
            return ()
        job = SinkJob.of(manifest, directory)
        if published_number(directory, job) >= manifest.number:
            return ()
        try:
            with closing(self.connect(job)) as target:
                if not self.has_staged(target, job):
                    return ()
        except PipelineError as error:
            logger.warning("what job %s has staged in %s is not known: %s", job.id, job.sink.place, error.message)
            return ()
        return (SinkLeftover(SinkLeftoverKind.STAGED, job.sink.place),)

    def remove_leftover(self, directory: JobDirectory, path: str) -> None:
        """Remove what is staged."""
        manifest = directory.manifests.last()
        if manifest is None:
            return
        job = SinkJob.of(manifest, directory)
        with closing(self.connect(job)) as target:
            self.unstage(target, job)


def published_number(directory: JobDirectory, job: SinkJob) -> int:
    """Return the highest number of a manifest that the job directory records as published to the sink; 0: none."""
    return max(layout.numbers_of(directory.store.list(layout.publications_folder(job.place_digest))), default=0)


def record_publication(directory: JobDirectory, job: SinkJob, manifest: Manifest) -> None:
    """Record in the job directory that ``manifest`` is published to the sink of ``job``."""
    record = {
        "schema_version": 1,
        "sink": job.sink.place,
        "manifest": manifest.number,
        "rows": sum(file.rows for file in manifest.files),
        "time": iso_time(utc_now()),
    }
    path = layout.publication_path(job.place_digest, manifest.number)
    directory.store.put_if_absent(path, json.dumps(record, indent=1).encode() + b"\n")


def contents(manifest: Manifest, directory: JobDirectory, job: SinkJob, *, is_new: bool) -> SinkContents:
    """Return the published rows as the files of the job directory that hold the same rows."""
    files = tuple(PublishedFile(file.name, file.rows, file.bytes, file.checksum) for file in manifest.files)
    rows, size = sum(file.rows for file in files), sum(file.bytes for file in files)
    return SinkContents(job.sink.place, files, rows, size, is_new=is_new, root=directory.root)
