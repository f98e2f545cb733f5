"""Final destinations of rows. `check` refuses an unsafe sink before anything runs. `publish` writes the sink, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from pipeline.common.plugins import find_adapter
from pipeline.errors import SpecError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.manifest import Manifest
from pipeline.plan.incremental import PublishedInputs
from pipeline.spec.sink import Sink

if TYPE_CHECKING:
    import pyarrow as pa

BUILT_IN = {
    "parquet": "pipeline.sinks.parquet.sink:ParquetSink",
    "sql": "pipeline.sinks.sql.sink:SqlSink",
}


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """One file in a sink."""

    name: str
    """Path relative to the sink's path."""
    rows: int
    bytes: int
    checksum: str
    """See `pipeline.common.checksum`. Empty for a file that existed before the first job published to the sink."""


@dataclass(frozen=True)
class SinkContents:
    """The published files of one job in a sink."""

    path: str
    """Absolute path or URL."""
    files: tuple[PublishedFile, ...]
    """Files of this job."""
    rows: int
    bytes: int
    is_new: bool = True
    """False if the manifest was published before and this call changed nothing."""
    is_replaced: bool = False
    """True if another job has replaced files of this job since. The sink is not changed."""
    root: str = ""
    """Folder that ``files`` are relative to, if it is not ``path``: the job directory, where the sink is a table."""

    @property
    def folder(self) -> str:
        """Folder that ``files`` are relative to."""
        return (self.root or self.path).rstrip("/")


class SinkLeftoverKind(StrEnum):
    """Kind of what interrupted publishing leaves behind."""

    STAGING = "staging"
    """A folder beside the sink: a part of new output, or output that was replaced."""
    UNLISTED = "unlisted"
    """A file in the sink that no publication lists."""
    STAGED = "staged"
    """Rows beside a table that are not part of it yet."""


@dataclass(frozen=True)
class SinkLeftover:
    """Files or folders that interrupted publishing of a job left outside the job directory."""

    kind: SinkLeftoverKind
    path: str
    """Local path or URL."""


@dataclass(frozen=True)
class SinkRequest:
    """Facts about a job for the check of its sink."""

    sources: Sequence[str] = ()
    """Paths of the job's source: directories, files, globs."""
    path: str = ""
    """The sink's path made absolute; default ``sink.path``."""
    job: str = ""
    """Id of the job, when the job may have begun to publish already."""
    schema: bytes | None = None
    """Arrow schema (IPC) of the output, when known: with ``append``, the existing output must have this schema."""
    state: Sequence[str] = ()
    """Folders of job directories; a sink must not overlap with these."""
    plan: str = ""
    """Digest of the job's plan, when the job may have begun to publish already."""


class SinkAdapter(Protocol):
    """Operations of one sink format."""

    def check_storage(self, sink: Sink) -> None:
        """See `check_conditional_writes`."""

    def check(self, sink: Sink, request: SinkRequest) -> None:
        """See `check`."""

    def publish(
        self, manifest: Manifest, directory: JobDirectory, *, check_lease: Callable[[], object] = lambda: None
    ) -> SinkContents:
        """See `publish`."""

    def read_published(self, manifest: Manifest, directory: JobDirectory) -> SinkContents | None:
        """See `read_published`."""

    def read_file(self, path: str) -> pa.Table:
        """Return the rows of one published file.

        :raises CorruptInput: if the file is damaged.
        :raises FileNotFoundError: if the file is gone.
        """

    def find_strays(self, manifest: Manifest, directory: JobDirectory) -> tuple[str, ...]:
        """See `find_strays`."""

    def leftovers(self, directory: JobDirectory) -> tuple[SinkLeftover, ...]:
        """See `leftovers`."""

    def remove_leftover(self, directory: JobDirectory, path: str) -> None:
        """Remove one of `leftovers`."""


@runtime_checkable
class VerifiableSink(Protocol):
    """A sink whose rows are not files of the job, and that looks into its target to verify them."""

    def verify(self, manifest: Manifest, directory: JobDirectory) -> str:
        """Check that readers of the target see exactly the rows of ``manifest``. Return a sentence on what was checked.

        :raises OutputConflict: if they do not.
        """


@runtime_checkable
class IncrementalSink(Protocol):
    """A sink that records the input of its rows in the same commit as the rows."""

    def read_published_inputs(self, sink: Sink, *, name: str) -> PublishHistory:
        """See `read_published_inputs`."""


@dataclass(frozen=True)
class PublishHistory:
    """The publications of all incremental jobs of one name in a sink."""

    work: tuple[PublishedInputs, ...]
    """Inputs of each publication, oldest first."""
    files: frozenset[str]
    """Names of all files that the sink's manifest lists."""


def find_sink(format_name: str) -> SinkAdapter:
    """Return the adapter for ``sink.format``.

    :raises SpecError: when the format is unknown.
    """
    return cast(SinkAdapter, find_adapter(format_name, kind="sink", built_in=BUILT_IN)())


def check(sink: Sink, request: SinkRequest) -> None:
    """Refuse a sink that cannot or must not be written, before anything runs. Change nothing.

    :raises OutputExists: the sink contains data and the mode is ``error``.
    :raises OutputConflict: with ``append``, the existing output has another schema or layout; or another job with the
        same id has published to the sink.
    :raises RefusedForSafety: the sink and the source overlap, the path is a folder that must not be replaced, or
        overwriting would remove files that are not output of a job.
    """
    find_sink(sink.format).check(sink, request)


def read_published_inputs(sink: Sink, *, name: str) -> PublishHistory:
    """Return the publications of incremental jobs named ``name`` in ``sink``, with their inputs.

    :raises SpecError: for a sink format that does not record inputs.
    :raises OutputConflict: when the sink contains rows whose input is unknown.
    """
    adapter = find_sink(sink.format)
    if not isinstance(adapter, IncrementalSink):
        raise SpecError(
            "sinks of this format do not record the input of their rows, which an incremental job needs",
            where="sink.format",
            found=sink.format,
            expected="parquet",
        )
    return adapter.read_published_inputs(sink, name=name)


def check_conditional_writes(sink: Sink) -> None:
    """Check that the storage of ``sink`` supports conditional writes, which a commit needs.

    On an object store, small objects are written and removed.

    :raises UnsafeStore: when the storage does not support conditional writes.
    :raises StorageError: when the storage cannot be written.
    """
    find_sink(sink.format).check_storage(sink)


def publish(
    manifest: Manifest, directory: JobDirectory, *, check_lease: Callable[[], object] = lambda: None
) -> SinkContents:
    """Publish the output of a committed manifest to the job's sink, once.

    A second call for the same job and manifest number changes nothing. After a crash, it completes the publication.
    Publishers of one sink take turns: this call waits for the others.

    :param check_lease: raises `Fenced` if another driver has taken the job over; called right before each step that
        readers can see.
    :raises OutputExists: see `check`.
    :raises OutputConflict: see `check`; also when another process publishes to the sink for too long.
    :raises RefusedForSafety: see `check`.
    :raises StateCorrupt: a checkpoint file is missing or has another size.
    :raises StorageError: the storage failed; resuming the job retries.
    """
    return find_sink(directory.plan.spec.sink.format).publish(manifest, directory, check_lease=check_lease)


def read_published(manifest: Manifest, directory: JobDirectory) -> SinkContents | None:
    """Return the published files of a manifest in the job's sink; None if the manifest was not published."""
    return find_sink(directory.plan.spec.sink.format).read_published(manifest, directory)


def find_strays(manifest: Manifest, directory: JobDirectory) -> tuple[str, ...]:
    """Return what a reader of the sink would count wrongly beside the publication of ``manifest``, one text each.

    Examples are files that no publication lists, and a mark of success that is missing or of another state.
    """
    return find_sink(directory.plan.spec.sink.format).find_strays(manifest, directory)


def leftovers(directory: JobDirectory) -> tuple[SinkLeftover, ...]:
    """List what interrupted publishing of the job left behind outside the job directory.

    Folders beside the sink are listed only if they contain nothing except output.
    """
    return find_sink(directory.plan.spec.sink.format).leftovers(directory)


def remove_leftover(directory: JobDirectory, path: str) -> None:
    """Remove one of the `leftovers` of a job. The caller holds the job's lease: no driver publishes meanwhile."""
    find_sink(directory.plan.spec.sink.format).remove_leftover(directory, path)
