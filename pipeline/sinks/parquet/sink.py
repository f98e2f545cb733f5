"""Publish to a folder of Parquet files.

On a POSIX file system ``error`` and ``overwrite`` swap the whole folder in one step (`pipeline.sinks.parquet.swap`):
every reader sees either the old output or the new output. With ``append``, on object stores and on file systems
without that step, the folder is changed in place. A reader of ``_manifest.json`` then sees one consistent state at any
time. A missing ``_SUCCESS`` shows that files are being changed. The steps are:

1. remove ``_SUCCESS``;
2. add files under unique names;
3. write ``_manifest.json``: the commit;
4. remove replaced files;
5. write ``_SUCCESS``.

Each step can be repeated, so publishing again after a crash completes the publication.

Publishers of one sink take turns. On a POSIX file system a lock is held from the first look at the sink to the last
step (`pipeline.sinks.lock`). On an object store the commit fails if the manifest has changed since the look; the
publisher then looks again. `pipeline.sinks.parquet.cleanup` says which files may be removed.

A crash while swapping leaves a folder beside the sink: part of the new output, or the old output that was replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.units import parse_bytes
from pipeline.errors import OutputConflict, RefusedForSafety
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.manifest import Manifest
from pipeline.plan.incremental import unknown_publication
from pipeline.sinks import PublishHistory, SinkContents, SinkLeftover, SinkLeftoverKind, SinkRequest
from pipeline.sinks.guards import check_place, real_place
from pipeline.sinks.lock import sink_lock
from pipeline.sinks.parquet import checks, layout, pack, strays, swap
from pipeline.sinks.parquet.cleanup import complete
from pipeline.sinks.parquet.incremental import clear_abandoned, has_nothing_new
from pipeline.sinks.parquet.publication import Overtaken, Publisher, Snapshot
from pipeline.sources.parquet.opening import open_source, parquet_errors
from pipeline.spec.sink import Sink
from pipeline.storage.local import LocalStore
from pipeline.storage.store import Store, open_store

_MAX_ATTEMPTS = 20
"""Number of times to start over because another publisher was faster."""


class LockSink(Protocol):
    """See `pipeline.sinks.lock.sink_lock`."""

    def __call__(self, folder: Path, /, *, job: str, check_lease: Callable[[], object]) -> AbstractContextManager[bool]:
        """Hold the lock of a sink."""


class ParquetSink:
    """See `pipeline.sinks.SinkAdapter`."""

    def __init__(self, open_place: Callable[[str], Store] = open_store, *, lock: LockSink = sink_lock) -> None:
        self._open = open_place
        self._lock_folder = lock

    def check_storage(self, sink: Sink) -> None:
        """Check conditional writes; see `pipeline.sinks.check_conditional_writes`."""
        store = self._open(sink.path)
        store.check_conditional_writes()
        store.check_conditional_replace()

    def check(self, sink: Sink, request: SinkRequest) -> None:
        """Refuse a sink that `publish` would refuse; see `pipeline.sinks.check`."""
        path = request.path or sink.path
        check_place(path, sources=request.sources, state=request.state)
        if sink.target_file_size is not None:
            parse_bytes(sink.target_file_size, where="sink.target_file_size")
        store = self._open(real_place(path))
        checks.check_folder(store)
        state = layout.read_state(store)
        if state and (own := state.of_job(request.job)):
            checks.check_is_same(own, plan=request.plan, path=path)
            return
        schema = pa.ipc.read_schema(pa.py_buffer(request.schema)) if request.schema else None
        checks.check_content(store, state, mode=sink.mode, job=request.job, schema=schema)

    def read_published_inputs(self, sink: Sink, *, name: str) -> PublishHistory:
        """Return the publications of incremental jobs; see `pipeline.sinks.read_published_inputs`."""
        store = self._open(real_place(sink.path))
        state = layout.read_state(store)
        unknown = (
            [publication.job for publication in state.publications if not publication.name]
            if state
            # Part files without a manifest were left by a job that died before its commit.
            else [name for name in layout.data_names(store) if not layout.tag_of(name)]
        )
        if unknown:
            raise unknown_publication(sink.path)
        files = frozenset(file.name for file in state.files) if state else frozenset()
        return PublishHistory(layout.read_published_inputs(state, name), files)

    def read_published(self, manifest: Manifest, directory: JobDirectory) -> SinkContents | None:
        """Return the published files of this manifest; see `pipeline.sinks.read_published`."""
        path = directory.resolve(directory.plan.spec.sink.path)
        if has_nothing_new(directory.plan):
            return SinkContents(path, (), 0, 0, is_new=False)
        return _find(layout.read_state(self._open(real_place(path))), manifest, path=path)

    def read_file(self, path: str) -> pa.Table:
        """Return the rows of one published file."""
        with parquet_errors(path), open_source(path) as source:
            return pq.read_table(source)

    def find_strays(self, manifest: Manifest, directory: JobDirectory) -> tuple[str, ...]:
        """Return what a reader of the folder would count wrongly; see `pipeline.sinks.find_strays`."""
        path = directory.resolve(directory.plan.spec.sink.path)
        if has_nothing_new(directory.plan):
            return ()
        return strays.find_strays(self._open(real_place(path)), manifest, mode=directory.plan.spec.sink.mode)

    def leftovers(self, directory: JobDirectory) -> tuple[SinkLeftover, ...]:
        """List staging folders beside the sink and unlisted files in it; see `pipeline.sinks.leftovers`."""
        store = self._open(real_place(directory.resolve(directory.plan.spec.sink.path)))
        names = strays.unlisted_files(store, directory.id)
        files = tuple(SinkLeftover(SinkLeftoverKind.UNLISTED, store.url(name)) for name in names)
        if not store.is_local:
            return files
        numbers = directory.manifests.numbers()
        staging = (path for number in numbers for path in _staging(Path(store.root), directory.id, number))
        folders = (path for path in staging if _is_output(path, job=directory.id))
        return (*(SinkLeftover(SinkLeftoverKind.STAGING, str(path)) for path in folders), *files)

    def remove_leftover(self, directory: JobDirectory, path: str) -> None:
        """Remove a staging folder, or an unlisted file of the sink."""
        store = self._open(real_place(directory.resolve(directory.plan.spec.sink.path)))
        folder, _, name = path.rpartition("/")
        with self._locked(store, job=directory.id):
            if folder != store.root:
                swap.remove_staging(Path(path))
            elif name in strays.unlisted_files(store, directory.id):
                store.remove(name)

    def _locked(
        self, store: Store, *, job: str, check_lease: Callable[[], object] = lambda: None
    ) -> AbstractContextManager[bool]:
        if not store.is_local:
            return nullcontext(False)
        return self._lock_folder(Path(store.root), job=job, check_lease=check_lease)

    def publish(
        self, manifest: Manifest, directory: JobDirectory, *, check_lease: Callable[[], object] = lambda: None
    ) -> SinkContents:
        """Publish once; see `pipeline.sinks.publish`."""
        path = directory.resolve(directory.plan.spec.sink.path)
        if has_nothing_new(directory.plan):
            return SinkContents(path, (), 0, 0, is_new=False)
        store = self._open(real_place(path))
        checks.check_folder(store)
        store.check_conditional_writes()
        store.check_conditional_replace()
        with self._locked(store, job=directory.id, check_lease=check_lease) as is_locked:
            for _ in range(_MAX_ATTEMPTS):
                try:
                    return self._publish(manifest, directory, store=store, is_locked=is_locked, check_lease=check_lease)
                except Overtaken:
                    continue
        raise OutputConflict(
            "other jobs publish to the same sink all the time",
            where=f"sink.path: {path}",
            found=f"a change of the sink in each of {_MAX_ATTEMPTS} attempts",
            next_step=f"when the others are done: python -m pipeline resume {directory.id}",
        )

    def _publish(
        self,
        manifest: Manifest,
        directory: JobDirectory,
        *,
        store: Store,
        is_locked: bool,
        check_lease: Callable[[], object],
    ) -> SinkContents:
        """Publish to the sink as it is now, or complete a publication that a crash interrupted.

        :raises Overtaken: when another publisher was faster.
        """
        path = directory.resolve(directory.plan.spec.sink.path)
        before = Snapshot.read(store)
        published = _find(before.state, manifest, path=path)
        if published is None:
            publisher = Publisher(
                manifest=manifest,
                directory=directory,
                sink=directory.plan.spec.sink,
                store=store,
                before=before,
                schema=pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(manifest.schema))),
                is_locked=is_locked,
                check_lease=check_lease,
                open_place=self._open,
            )
            publisher.check()
            pack.check_sources(manifest, store=directory.store)
            publisher.publish()
        else:
            complete(store, manifest, is_locked=is_locked, check_lease=check_lease)
        clear_abandoned(store, directory, is_locked=is_locked, check_lease=check_lease)
        if published is not None:
            return published
        return cast(SinkContents, _find(layout.read_state(store), manifest, path=path, is_new=True))


def _find(
    state: layout.SinkState | None, manifest: Manifest, *, path: str, is_new: bool = False
) -> SinkContents | None:
    if state is None:
        return None
    if state.is_gone(manifest.job):
        return SinkContents(path, (), 0, 0, is_new=False, is_replaced=True)
    own = state.of_job(manifest.job)
    if own is None:
        return None
    checks.check_is_same(own, plan=manifest.plan, path=path)
    if own.manifest < manifest.number:
        return None
    rows, size = sum(file.rows for file in own.files), sum(file.bytes for file in own.files)
    return SinkContents(path, own.files, rows, size, is_new=is_new, is_replaced=own.files_replaced > 0)


def _staging(folder: Path, job: str, number: int) -> list[Path]:
    return [
        path for path in swap.find_staging(folder, job=job, number=number) if path.is_dir() and not path.is_symlink()
    ]


def _is_output(staging: Path, *, job: str) -> bool:
    """True if ``staging`` contains only output: of ``job``, complete or not, or complete output of other jobs."""
    store = LocalStore(staging)
    try:
        if layout.data_names(store, job=job):
            layout.check_replaceable(store)
    except RefusedForSafety:
        return False
    return True
