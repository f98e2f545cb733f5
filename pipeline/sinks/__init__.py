"""Final destinations. `check` says before anything runs whether a sink may be written; `publish` writes it, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from pipeline.common.plugins import find_adapter
from pipeline.errors import SpecError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.manifest import Manifest
from pipeline.plan.incremental import PublishedInputs
from pipeline.spec.parts import Sink
from pipeline.storage.store import open_store

if TYPE_CHECKING:
    import pyarrow as pa

BUILT_IN = {"parquet": "pipeline.sinks.parquet.sink:ParquetSink"}


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """One file in a sink."""

    name: str
    """Relative to the sink's path."""
    rows: int
    bytes: int
    sha256: str
    """Empty for a file that was there before the first job published to the sink."""


@dataclass(frozen=True)
class SinkContents:
    """What a job has in a sink."""

    path: str
    """Absolute path or URL."""
    files: tuple[PublishedFile, ...]
    """Those of this job."""
    rows: int
    bytes: int
    is_new: bool = True
    """False when it had been published before, and nothing was changed."""
    is_replaced: bool = False
    """True when another job has overwritten it since; it is left as it is."""


class SinkAdapter(Protocol):
    """One format of sinks."""

    def check(
        self,
        sink: Sink,
        *,
        sources: Sequence[str] = (),
        path: str = "",
        job: str = "",
        schema: bytes | None = None,
        state: Sequence[str] = (),
        plan: str = "",
    ) -> None:
        """See `check`."""

    def publish(self, manifest: Manifest, directory: JobDirectory) -> SinkContents:
        """See `publish`."""

    def read_published(self, manifest: Manifest, directory: JobDirectory) -> SinkContents | None:
        """See `read_published`."""

    def read_file(self, path: str) -> pa.Table:
        """Return the rows of one published file.

        :raises CorruptInput: if it is damaged.
        :raises FileNotFoundError: if it is gone.
        """

    def leftovers(self, directory: JobDirectory) -> tuple[str, ...]:
        """See `leftovers`."""

    def remove_leftover(self, path: str) -> None:
        """Remove one of `leftovers`."""


@runtime_checkable
class IncrementalSink(Protocol):
    """One that says what its rows were made of, in the same commit as the rows."""

    def read_published_inputs(self, sink: Sink, *, name: str) -> PublishHistory:
        """See `read_published_inputs`."""


@dataclass(frozen=True)
class PublishHistory:
    """What a sink holds of incremental jobs of one name."""

    work: tuple[PublishedInputs, ...]
    """Oldest first."""
    files: frozenset[str]
    """Names of all files that count."""


def find_sink(format_name: str) -> SinkAdapter:
    """The adapter for ``sink.format``.

    :raises SpecError: when there is none.
    """
    return cast(SinkAdapter, find_adapter(format_name, kind="sink", built_in=BUILT_IN)())


def check(
    sink: Sink,
    *,
    sources: Sequence[str],
    path: str = "",
    job: str = "",
    schema: bytes | None = None,
    state: Sequence[str] = (),
    plan: str = "",
) -> None:
    """Refuse a sink that cannot or must not be written, before anything runs. Changes nothing.

    :param sources: paths of the job's source: directories, files, globs.
    :param path: the sink's path made absolute; default ``sink.path``.
    :param job: id of the job, when it may have begun to publish already.
    :param schema: Arrow schema (IPC) of the output, when it is known: what is appended must fit.
    :param state: folders of job directories, which a sink must not lie in nor hold.
    :param plan: digest of the job's plan, when it may have begun to publish already.
    :raises OutputExists: there is data and the mode is ``error``.
    :raises OutputConflict: what is there has another schema, or another layout, than what is to be appended; or another
        job with the same id has published there.
    :raises RefusedForSafety: the sink and the source overlap, the path is a folder that must not be replaced, or
        overwriting would remove files that are no output of a job.
    """
    find_sink(sink.format).check(sink, sources=sources, path=path, job=job, schema=schema, state=state, plan=plan)


def read_published_inputs(sink: Sink, *, name: str) -> PublishHistory:
    """What incremental jobs of that name have published to ``sink``, and of what.

    :raises SpecError: for a format of sinks that does not keep this.
    :raises OutputConflict: when the sink holds rows of which nobody knows what they were made of.
    """
    adapter = find_sink(sink.format)
    if not isinstance(adapter, IncrementalSink):
        raise SpecError(
            "that format of sinks does not say what its rows were made of, which an incremental job needs",
            where="sink.format",
            found=sink.format,
            expected="parquet",
        )
    return adapter.read_published_inputs(sink, name=name)


def check_conditional_writes(sink: Sink) -> None:
    """Find out whether the storage of ``sink`` can take a commit, where that depends on a service (an object store):
    a small object is written there and removed.

    :raises UnsafeStore: when it cannot.
    :raises StorageError: when nothing can be written there.
    """
    open_store(sink.path).check_conditional_writes()


def publish(manifest: Manifest, directory: JobDirectory) -> SinkContents:
    """Put the output of a committed manifest where the job's sink says, once: again for the same job and manifest
    number changes nothing, and after a crash anywhere in it, calling it again completes it.

    :raises OutputExists: see `check`.
    :raises OutputConflict: see `check`; also when another job published to the sink meanwhile.
    :raises RefusedForSafety: see `check`.
    :raises StateCorrupt: a checkpoint file is missing or has another size.
    :raises StorageError: the storage failed; resume tries again.
    """
    return find_sink(directory.plan.spec.sink.format).publish(manifest, directory)


def read_published(manifest: Manifest, directory: JobDirectory) -> SinkContents | None:
    """What the job's sink holds of a manifest; None when it was not published."""
    return find_sink(directory.plan.spec.sink.format).read_published(manifest, directory)


def leftovers(directory: JobDirectory) -> tuple[str, ...]:
    """List the folders outside the job directory that interrupted publishing of the job left behind.

    :returns: local paths or URLs of folders that hold nothing but output. No reader counts them.
    """
    return find_sink(directory.plan.spec.sink.format).leftovers(directory)


def remove_leftover(directory: JobDirectory, path: str) -> None:
    """Remove one of the `leftovers` of a job."""
    find_sink(directory.plan.spec.sink.format).remove_leftover(path)
