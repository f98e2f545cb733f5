"""One publication of a job: the files to keep and to add, and the steps that make them visible."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from pipeline.common.units import parse_bytes
from pipeline.errors import ConflictError, Fenced, OutputExists, StorageError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.layout import merged_folder
from pipeline.jobs.manifest import Manifest
from pipeline.sinks import PublishedFile
from pipeline.sinks.parquet import checks, layout, pack, swap
from pipeline.sinks.parquet.cleanup import complete, settle_success
from pipeline.sinks.parquet.incremental import check_baseline, with_inputs
from pipeline.spec.sink import Sink
from pipeline.storage.store import Store
from pipeline.storage.urls import unique_name

logger = logging.getLogger(__name__)
_MERGED = merged_folder(0)
"""Folder of the job directory for merged files when the sink is changed in place."""


class Overtaken(Exception):
    """Raised when another publisher has changed the sink since it was read: read it again, and start over."""


@dataclass(frozen=True)
class Snapshot:
    """The content of ``_manifest.json``, read once."""

    version: str
    """Version in the store; empty if there is no manifest."""
    state: layout.SinkState | None

    @staticmethod
    def read(store: Store) -> Snapshot:
        """Read the version first: a change in between then makes the commit fail."""
        version = store.version(layout.MANIFEST)
        return Snapshot(version, layout.read_state(store) if version else None)


@dataclass
class Publisher:
    """One attempt to publish a manifest to a sink of a known state."""

    manifest: Manifest
    directory: JobDirectory
    sink: Sink
    store: Store
    before: Snapshot
    schema: pa.Schema
    is_locked: bool
    """True if no other publisher can be active."""
    check_lease: Callable[[], object]
    """Raises `Fenced` if another driver has taken the job over; called before each step that readers see."""
    open_place: Callable[[str], Store]

    @cached_property
    def checkpoint(self) -> Store:
        """Store of the job directory."""
        return self.directory.store

    @property
    def state(self) -> layout.SinkState | None:
        """State of the sink before the publication."""
        return self.before.state

    @property
    def earlier(self) -> layout.Publication | None:
        """Publication of an earlier manifest of the job, which this one repairs."""
        return self.state.of_job(self.manifest.job) if self.state else None

    @cached_property
    def _is_kept(self) -> bool:
        """True if the files of ``earlier`` do not change."""
        names = self._earlier_names
        return bool(names) and names <= {file.name for file in self.manifest.files}

    @cached_property
    def _earlier_names(self) -> frozenset[str]:
        committed = self.directory.manifests.find(self.earlier.manifest) if self.earlier else None
        return frozenset(file.name for file in committed.files) if committed else frozenset()

    @property
    def retained(self) -> tuple[PublishedFile, ...]:
        """Files of ``earlier`` that do not change."""
        return self.earlier.files if self.earlier and self._is_kept else ()

    def check(self) -> None:
        """Refuse to publish if the sink does not allow it.

        :raises ConflictError: see `pipeline.sinks.publish`.
        :raises Overtaken: when the refusal is about something that was published since the sink was read.
        """
        try:
            check_baseline(self.state, self.directory, path=self.store.root)
            if self.earlier is None:
                checks.check_content(
                    self.store, self.state, mode=self.sink.mode, job=self.manifest.job, schema=self.schema
                )
        except ConflictError as error:
            if self.store.version(layout.MANIFEST) != self.before.version:
                raise Overtaken from error
            raise

    def publish(self) -> None:
        """Publish by a swap of the folder if possible, else in place.

        :raises Overtaken: when another publisher was faster; nothing of this attempt remains.
        """
        if self.store.is_local and self._fills_folder():
            try:
                self._swap()
                return
            except swap.CannotSwap as reason:
                logger.info("the output is changed in place: %s", reason)
        self._change_in_place()

    def _fills_folder(self) -> bool:
        """True if the folder will contain files of this job only: the whole folder can then be swapped."""
        if self.earlier is None:
            return self.sink.mode == "overwrite" or not layout.data_names(self.store)
        return self._is_alone and set(layout.data_names(self.store, job=self.manifest.job)) <= layout.OWN

    @property
    def _is_alone(self) -> bool:
        return self.state is not None and len(self.state.publications) == 1

    def pieces(self, *, attempt: str = "") -> tuple[pack.Piece, ...]:
        """Return the files to add."""
        names = self._earlier_names if self._is_kept else frozenset()
        added = replace(self.manifest, files=tuple(file for file in self.manifest.files if file.name not in names))
        if self.retained and not added.files:
            return ()
        if not self.manifest.files and self.directory.plan.progress.baseline and self.state is not None:
            # All new rows were filtered or rejected. The existing output has the schema, so add no empty file.
            return ()
        target = self.sink.target_file_size
        size = None if target is None else parse_bytes(target, where="sink.target_file_size")
        return pack.make_pieces(added, target=size, attempt=attempt)

    def after(self, files: tuple[PublishedFile, ...], pieces: Sequence[pack.Piece]) -> layout.SinkState:
        """Return the state after ``files`` are added; ``pieces`` names their sources."""
        before = self.state
        if before is None and self.sink.mode == "append" and not self.directory.plan.progress.baseline:
            before = checks.adopted(self.store, job=self.manifest.job)
        publication = layout.Publication(
            self.manifest.job,
            self.manifest.number,
            self.sink.mode,
            (*self.retained, *files),
            files_replaced=self.earlier.files_replaced if self.earlier else 0,
            plan=self.manifest.plan,
        )
        publication = with_inputs(publication, self.directory, pieces)
        is_over = self.sink.mode == "overwrite"
        return layout.next_state(before, publication, schema=self.manifest.schema, overwrite=is_over)

    def _swap(self) -> None:
        """Build the new folder beside the sink, then swap the two.

        :raises swap.CannotSwap: when the sink cannot be swapped; nothing changed.
        """
        path = Path(self.store.root)
        staging = swap.staging_path(path, job=self.manifest.job, number=self.manifest.number)
        swap.start_staging(path, staging)
        try:
            names = self.build(self.open_place(str(staging)))
            # Both hold under the lock; file systems without locks rely on them.
            if set(os.listdir(staging)) != names or self.store.version(layout.MANIFEST) != self.before.version:
                raise Overtaken
            self.check_lease()
            self._take_path(staging, path)
        except Exception:
            with suppress(StorageError):
                swap.remove_staging(staging)
            raise
        swap.sync(path.parent)
        self._complete()

    def _take_path(self, staging: Path, path: Path) -> None:
        """Put the new folder in place. Files that were not there when the sink was read are never replaced."""
        may_replace = self.earlier is not None or self.sink.mode == "overwrite"
        if may_replace and layout.data_names(self.store):
            swap.exchange(staging, path)
            return
        try:
            swap.place(staging, path)
        except OutputExists as error:
            if self.earlier is None and self.sink.mode == "error":
                raise
            raise Overtaken from error

    def build(self, store: Store) -> set[str]:
        """Write the whole output into an empty folder without readers; return the file names."""
        for file in self.retained:
            store.link_or_copy(file.name, self.store, file.name)
        pieces = self.pieces()
        state = self.after(tuple(self._add(piece, store) for piece in pieces), pieces)
        store.replace(layout.MANIFEST, state.to_json_bytes())
        store.replace(layout.SUCCESS, layout.success_text(state))
        store.sync()
        return {*layout.OWN, *(file.name for file in state.publications[-1].files)}

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

    def _change_in_place(self) -> None:
        """Run steps 1 to 5. A failure before the commit is undone. After a crash, publishing again completes them."""
        pieces = self.pieces(attempt=unique_name()[:8])
        self.check_lease()
        with self._undone_on_error(pieces):
            self.store.remove(layout.SUCCESS)
            files = tuple(self._add_in_place(piece) for piece in pieces)
            self.store.sync()
        while True:
            with self._undone_on_error(pieces):
                data = self.after(files, pieces).to_json_bytes()
                self.check_lease()
            # If this raises, the commit may have happened: nothing is undone.
            if self.store.replace_if_unchanged(layout.MANIFEST, data, version=self.before.version):
                break
            with self._undone_on_error(pieces):
                self._look_again()
        self._complete()
        self.checkpoint.remove_folder(_MERGED)

    @contextmanager
    def _undone_on_error(self, pieces: tuple[pack.Piece, ...]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._undo(pieces, is_fenced=isinstance(error, Fenced))
            raise

    def _look_again(self) -> None:
        """Read the sink again after a lost commit. The files that were added stay valid on top of the new state.

        :raises Overtaken: when the files were made for another state of this job's own publication.
        :raises ConflictError: when the new state does not allow the publication.
        """
        earlier, had_manifest = self.earlier, self.state is not None
        now = Snapshot.read(self.store)
        is_gone = now.state is None or now.state.is_gone(self.manifest.job)
        self.before = now
        if is_gone or self.earlier != earlier or (not had_manifest and not self.manifest.files):
            raise Overtaken
        self.check()
        self.store.remove(layout.SUCCESS)

    def _undo(self, pieces: tuple[pack.Piece, ...], *, is_fenced: bool) -> None:
        """Remove the added files, and restore ``_SUCCESS``. If the storage fails, the files stay, but count nowhere.

        The files are of this attempt only. After a takeover, ``_SUCCESS`` is left to the driver that took over.
        """
        with suppress(StorageError):
            for piece in pieces:
                self.store.remove(piece.name)
            if not is_fenced or not self.is_locked:
                settle_success(self.store)

    def _complete(self) -> None:
        complete(self.store, self.manifest, is_locked=self.is_locked, check_lease=self.check_lease)
