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

A crash while swapping leaves a folder beside the sink: part of the new output, or the old output that was replaced.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.units import parse_bytes
from pipeline.errors import OutputConflict, OutputExists, RefusedForSafety, StorageError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.layout import merged_folder
from pipeline.jobs.manifest import Manifest
from pipeline.plan.incremental import unknown_publication
from pipeline.sinks import PublishedFile, PublishHistory, SinkContents
from pipeline.sinks.guards import check_place, real_place
from pipeline.sinks.parquet import checks, layout, pack, swap
from pipeline.sinks.parquet.checks import check_content
from pipeline.sinks.parquet.incremental import check_baseline, clear_abandoned, has_nothing_new, with_inputs
from pipeline.sources.parquet.opening import open_source, parquet_errors
from pipeline.spec.parts import Sink
from pipeline.storage.local import LocalStore
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import is_local_path, unique_name

logger = logging.getLogger(__name__)
_MERGED = merged_folder(0)
"""Folder of the job directory for merged files when the sink is changed in place."""
_OWN = {layout.MANIFEST, layout.SUCCESS}


class ParquetSink:
    """See `pipeline.sinks.SinkAdapter`."""

    def __init__(self, open_place: Callable[[str], Store] = open_store) -> None:
        self._open = open_place

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
        """Refuse a sink that `publish` would refuse; see `pipeline.sinks.check`."""
        path = path or sink.path
        check_place(path, sources=sources, state=state)
        _target_size(sink)
        store = self._open(real_place(path))
        checks.check_folder(store)
        there = layout.read_state(store)
        if there and (own := there.of_job(job)):
            checks.check_is_same(own, plan=plan, place=path)
            return
        arrow = pa.ipc.read_schema(pa.py_buffer(schema)) if schema else None
        check_content(store, there, mode=sink.mode, job=job, schema=arrow)

    def read_published_inputs(self, sink: Sink, *, name: str) -> PublishHistory:
        """Return the publications of incremental jobs; see `pipeline.sinks.read_published_inputs`."""
        store = self._open(real_place(sink.path))
        state = layout.read_state(store)
        unknown = (
            [one.job for one in state.publications if not one.name]
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

    def leftovers(self, directory: JobDirectory) -> tuple[str, ...]:
        """List the staging folders beside the sink; see `pipeline.sinks.leftovers`."""
        path = directory.resolve(directory.plan.spec.sink.path)
        if not is_local_path(path):
            return ()
        folder = Path(real_place(path))
        asides = (aside for number in directory.manifests.numbers() for aside in _asides(folder, directory.id, number))
        return tuple(str(aside) for aside in asides if _is_output(aside, job=directory.id))

    def remove_leftover(self, path: str) -> None:
        """Remove a staging folder."""
        swap.remove_aside(Path(path))

    def publish(self, manifest: Manifest, directory: JobDirectory) -> SinkContents:
        """Publish once; see `pipeline.sinks.publish`."""
        sink = directory.plan.spec.sink
        path = directory.resolve(sink.path)
        if has_nothing_new(directory.plan):
            return SinkContents(path, (), 0, 0, is_new=False)
        store = self._open(real_place(path))
        checks.check_folder(store)
        store.check_conditional_writes()
        state = layout.read_state(store)
        if there := _find(state, manifest, path=path):
            with _locked(store):
                _complete(store, manifest)
            clear_abandoned(store, directory)
            return there
        check_baseline(state, directory, place=path)
        schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(manifest.schema)))
        earlier = state.of_job(manifest.job) if state else None
        if earlier is None:
            check_content(store, state, mode=sink.mode, job=manifest.job, schema=schema)
        pack.check_sources(manifest, store=directory.store)
        work = _Publication(manifest, directory=directory, sink=sink, store=store, before=state, schema=schema)
        if store.is_local and work.fills_folder():
            try:
                self._swap(work)
            except swap.CannotSwap as reason:
                logger.info("the output is changed in place: %s", reason)
                work.change_in_place()
        else:
            work.change_in_place()
        clear_abandoned(store, directory)
        return cast(SinkContents, _find(layout.read_state(store), manifest, path=path, is_new=True))

    def _swap(self, work: _Publication) -> None:
        """Build the new folder beside the sink, then swap the two.

        :raises swap.CannotSwap: when the sink cannot be swapped; nothing changed.
        """
        path = Path(work.store.root)
        aside = swap.aside_path(path, job=work.manifest.job, number=work.manifest.number)
        swap.start_aside(path, aside)
        try:
            names = work.build(self._open(str(aside)))
            if work.is_there_meanwhile() or not _is_whole(aside, names):
                raise swap.CannotSwap("another driver publishes the same manifest")
            if layout.data_names(work.store):
                swap.exchange(aside, path)
            else:
                swap.place(aside, path)
        except Exception:
            with suppress(StorageError):
                swap.remove_aside(aside)
            raise
        swap.sync(path.parent)
        with _locked(work.store):
            _complete(work.store, work.manifest)


class _Publication:
    """One publication: the files to keep, the files to add, and the steps to publish them."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        directory: JobDirectory,
        sink: Sink,
        store: Store,
        before: layout.SinkState | None,
        schema: pa.Schema,
    ) -> None:
        self.manifest = manifest
        self.directory = directory
        self.checkpoint = directory.store
        self.sink = sink
        self.store = store
        self.before = before
        self.schema = schema
        self.target = _target_size(sink)
        self.earlier = before.of_job(manifest.job) if before else None
        """Publication of an earlier manifest of the job, which this one repairs."""
        there = directory.manifests.find(self.earlier.manifest) if self.earlier else None
        names = {file.name for file in there.files} if there else set()
        is_kept = bool(names) and names <= {file.name for file in manifest.files}
        self.kept = self.earlier.files if self.earlier and is_kept else ()
        """Files of ``earlier`` that do not change."""
        self.added = replace(
            manifest, files=tuple(file for file in manifest.files if not (is_kept and file.name in names))
        )

    def fills_folder(self) -> bool:
        """True if the folder will contain files of this job only: the whole folder can then be swapped."""
        if self.earlier is None:
            return self.sink.mode == "overwrite" or not layout.data_names(self.store)
        is_alone = self.before is not None and len(self.before.publications) == 1
        return is_alone and set(layout.data_names(self.store, job=self.manifest.job)) <= _OWN

    def pieces(self, *, attempt: str = "") -> tuple[pack.Piece, ...]:
        """Return the files to add."""
        if self.kept and not self.added.files:
            return ()
        if not self.manifest.files and self.directory.plan.progress.baseline and self.before is not None:
            # All new rows were filtered or rejected. The existing output has the schema, so add no empty file.
            return ()
        return pack.make_pieces(self.added, target=self.target, attempt=attempt)

    def after(
        self, files: tuple[PublishedFile, ...], before: layout.SinkState | None, pieces: Sequence[pack.Piece]
    ) -> layout.SinkState:
        """Return the state after ``files`` are added; ``pieces`` names their sources."""
        made = layout.Publication(
            self.manifest.job,
            self.manifest.number,
            self.sink.mode,
            (*self.kept, *files),
            files_replaced=self.earlier.files_replaced if self.earlier else 0,
            plan=self.manifest.plan,
        )
        made = with_inputs(made, self.directory, pieces)
        is_over = self.sink.mode == "overwrite"
        return layout.next_state(before, made, schema=self.manifest.schema, overwrite=is_over)

    def is_there_meanwhile(self) -> bool:
        """True if another driver has published this manifest since ``before`` was read.

        :raises OutputConflict: when another job has published since.
        """
        now = layout.read_state(self.store)
        if _find(now, self.manifest, path="") is not None:
            return True
        if now != self.before:
            raise OutputConflict(
                "another job published to the same sink meanwhile",
                where=f"sink.path: {self.store.root}",
                found=now.publications[-1].job if now and now.publications else "no manifest any more",
                expected="the output as it was when publishing began",
                next_step=f"look at it, then: python -m pipeline resume {self.manifest.job}",
            )
        return False

    def build(self, store: Store) -> set[str]:
        """Write the whole output into an empty folder without readers; return the file names."""
        for file in self.kept:
            store.link_or_copy(file.name, self.store, file.name)
        pieces = self.pieces()
        state = self.after(tuple(self._add(piece, store) for piece in pieces), self.before, pieces)
        store.replace(layout.MANIFEST, state.to_json_bytes())
        store.replace(layout.SUCCESS, layout.success_text(state))
        store.sync()
        return {layout.MANIFEST, layout.SUCCESS, *(file.name for file in state.publications[-1].files)}

    def _add(self, piece: pack.Piece, store: Store) -> PublishedFile:
        if len(piece.sources) == 1:
            store.link_or_copy(piece.name, self.checkpoint, piece.sources[0].name)
            return pack.linked_files(piece)
        with store.open_output(piece.name) as output:
            return self._merge(piece, output)

    def _merge(self, piece: pack.Piece, output: object) -> PublishedFile:
        return pack.write_merged(
            piece,
            source=self.checkpoint,
            schema=self.schema,
            compression=self.sink.compression,
            output=output,  # type: ignore[arg-type]
        )

    def _add_in_place(self, piece: pack.Piece) -> PublishedFile:
        """Add a file to a folder that has readers. On a local file system, no unfinished file has the final name."""
        if len(piece.sources) == 1 or not self.store.is_local:
            return self._add(piece, self.store)
        staged = f"{_MERGED}/{piece.name}"
        with self.checkpoint.open_output(staged) as output:
            file = self._merge(piece, output)
        self.store.link_or_copy(piece.name, self.checkpoint, staged)
        return file

    def change_in_place(self) -> None:
        """Run steps 1 to 5. A failure before the commit is undone. After a crash, publishing again completes them."""
        before = self.before
        if before is None and self.sink.mode == "append" and not self.directory.plan.progress.baseline:
            before = checks.adopted(self.store, job=self.manifest.job)
        success = _read(self.store, layout.SUCCESS)
        pieces = self.pieces(attempt=unique_name()[:8])
        try:
            self.store.remove(layout.SUCCESS)
            files = tuple(self._add_in_place(piece) for piece in pieces)
            self.store.sync()
            state = self.after(files, before, pieces)
        except Exception:
            self._undo(pieces, success)
            raise
        with _locked(self.store):
            try:
                self._commit(state)
            except (OutputConflict, OutputExists):
                self._undo(pieces, success)
                raise
            _complete(self.store, self.manifest)
        self.checkpoint.remove_folder(_MERGED)

    def _commit(self, state: layout.SinkState) -> None:
        if self.is_there_meanwhile():
            return
        if self.before is not None:
            self.store.replace(layout.MANIFEST, state.to_json_bytes())
        elif not self.store.put_if_absent(layout.MANIFEST, state.to_json_bytes()) and not self.is_there_meanwhile():
            raise checks.output_exists(self.store, [layout.MANIFEST])

    def _undo(self, pieces: tuple[pack.Piece, ...], success: bytes | None) -> None:
        """Remove the added files and restore ``_SUCCESS``. If the storage fails, the files stay, but count nowhere."""
        with suppress(StorageError):
            for piece in pieces:
                self.store.remove(piece.name)
            if success is not None:
                self.store.replace(layout.SUCCESS, success)


@contextmanager
def _locked(store: Store) -> Iterator[None]:
    """Lock the sink against commits of other drivers. Without file locks, a race of milliseconds remains."""
    if not store.is_local or not os.path.isdir(store.root):
        yield
        return
    descriptor = os.open(store.root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _complete(store: Store, manifest: Manifest) -> None:
    """Complete a publication after its commit: run steps 4 and 5, and remove folders left beside the sink."""
    if store.is_local:
        for number in range(1, manifest.number + 1):
            for aside in swap.find_asides(Path(store.root), job=manifest.job, number=number):
                _remove_replaced(aside)
    state = layout.read_state(store)
    own = state.find(manifest.job, manifest.number) if state else None
    if state is None or own is None:
        return
    last = state.publications[-1]
    if last is not own and _read(store, layout.SUCCESS) is not None:
        # A later job has published, so its files must stay. Go on only if a repair of this job removed `_SUCCESS`.
        return
    counted = {file.name for file in state.files}
    for name in store.list():
        is_gone = last is own and own.mode == "overwrite" and name.endswith(layout.SUFFIX)
        is_gone = is_gone or name in own.replaces
        if (is_gone or layout.is_file_of(name, manifest.job)) and name not in counted:
            store.remove(name)
    success = layout.success_text(state)
    if _read(store, layout.SUCCESS) != success:
        store.replace(layout.SUCCESS, success)


def _remove_replaced(aside: Path) -> None:
    """Remove the replaced folder, unless it contains anything except output (added after the check)."""
    try:
        layout.check_replaceable(LocalStore(aside))
    except RefusedForSafety as reason:
        logger.warning("kept the replaced output in %s: it holds %s", aside, reason.found)
        return
    swap.remove_aside(aside)


def _is_whole(aside: Path, names: set[str]) -> bool:
    return set(os.listdir(aside)) == names


def _find(
    state: layout.SinkState | None, manifest: Manifest, *, path: str, is_new: bool = False
) -> SinkContents | None:
    if state is None:
        return None
    if state.is_gone(manifest.job):
        return SinkContents(path, (), 0, 0, is_new=False, is_replaced=True)
    there = state.of_job(manifest.job)
    if there is None:
        return None
    checks.check_is_same(there, plan=manifest.plan, place=path)
    if there.manifest < manifest.number:
        return None
    rows, size = sum(file.rows for file in there.files), sum(file.bytes for file in there.files)
    return SinkContents(path, there.files, rows, size, is_new=is_new, is_replaced=there.files_replaced > 0)


def _target_size(sink: Sink) -> int | None:
    return None if sink.target_file_size is None else parse_bytes(sink.target_file_size, where="sink.target_file_size")


def _read(store: Store, name: str) -> bytes | None:
    try:
        return store.read(name)
    except FileNotFoundError:
        return None


def _asides(place: Path, job: str, number: int) -> list[Path]:
    return [path for path in swap.find_asides(place, job=job, number=number) if path.is_dir() and not path.is_symlink()]


def _is_output(aside: Path, *, job: str) -> bool:
    """True if ``aside`` contains only output: of ``job``, complete or not, or complete output of other jobs."""
    store = LocalStore(aside)
    try:
        if layout.data_names(store, job=job):
            layout.check_replaceable(store)
    except RefusedForSafety:
        return False
    return True
