"""`Store`: the protocol of all storage, and the choice of a backend for a root."""

from __future__ import annotations

import os
from typing import IO, Any, Protocol

from pipeline.storage.local import LocalStore
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.urls import Names, is_local_path, local_path


class Store(Protocol):
    """Storage under one root. Every name is relative to it."""

    root: str
    """Absolute path or URL, without a slash at the end."""

    is_local: bool
    """True if names are files of a POSIX file system, with hard links, modes and renames."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create ``name`` with ``data`` in one step. Return False, and change nothing, if ``name`` exists.

        If a reply may be lost, True can also mean that an existing object equals ``data``: include a unique id in
        ``data``.

        :raises StorageError: if the outcome is unknown; check again before deleting anything.
        """

    def check_conditional_writes(self) -> None:
        """Check that `put_if_absent` is exclusive, if this depends on a service. Nothing is left behind.

        :raises UnsafeStore: if `put_if_absent` is not exclusive.
        """

    def check_conditional_replace(self) -> None:
        """Check that `replace_if_unchanged` is conditional, if this depends on a service. Nothing is left behind.

        :raises UnsafeStore: if `replace_if_unchanged` replaces what another writer has changed.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Set ``name`` to ``data``. A reader sees either the old or the new bytes."""

    def version(self, name: str) -> str:
        """Return a text that differs after every change of ``name``; empty if ``name`` does not exist.

        Read the version before the content: a change in between then makes `replace_if_unchanged` return False.
        """

    def replace_if_unchanged(self, name: str, data: bytes, *, version: str) -> bool:
        """Set ``name`` to ``data`` if its `version` is still ``version``; with an empty version, create it.

        Return False, and change nothing, if another writer was faster. On a POSIX file system the caller must hold a
        lock that all writers hold: comparing and renaming are two steps there.

        :raises StorageError: if the outcome is unknown; read ``name`` to find out.
        """

    def modified(self, name: str) -> float:
        """Return the time of the last change in seconds, by the clock of the storage: compare it within one store."""

    def append(self, name: str, line: str) -> None:
        """Add one line of text to ``name``. A line that a crash cut short is ended first."""

    def read(self, name: str) -> bytes:
        """Return all bytes of ``name``.

        :raises FileNotFoundError: if ``name`` does not exist.
        """

    def exists(self, name: str) -> bool:
        """True if ``name`` is a file."""

    def list(self, folder: str = "") -> Names:
        """Return the sorted names (without folder) of the finished files directly in ``folder``; [] if none."""

    def list_folders(self, folder: str = "") -> Names:
        """Return the sorted names (without folder) of the folders directly in ``folder``; [] if none."""

    def open_output(self, name: str) -> Any:
        """Return a context manager for a new binary file ``name``: durable on exit, removed if the block raises."""

    def open_input(self, name: str) -> IO[bytes]:
        """Open ``name`` as a seekable binary file."""

    def link_or_copy(self, name: str, source: Any, source_name: str) -> None:
        """Set ``name`` to the content of ``source_name`` in the store ``source``, in one step.

        Uses a hard link or a server-side copy if possible, else copies the bytes. `sync` makes the name durable.
        """

    def sync(self, folder: str = "") -> None:
        """Make the names in ``folder`` durable."""

    def size(self, name: str) -> int:
        """Return the number of bytes of ``name``."""

    def remove(self, name: str) -> None:
        """Remove the file ``name``, if it exists."""

    def remove_folder(self, folder: str) -> None:
        """Remove ``folder`` with its contents, if it exists."""

    def url(self, name: str) -> str:
        """Return the path or URL of ``name``, for people and other libraries."""


def open_store(root: str | os.PathLike[str], *, private: bool = False, fsync: bool = True) -> Store:
    """Return the store for ``root``: a local path, a ``file://`` URL or any other fsspec URL.

    :param private: create folders 0700 and files 0600 whatever the umask (for the state of a job).
    :param fsync: make every write durable before it counts. False only if losing the job at a power cut is acceptable.
    """
    text = os.fspath(root)
    if is_local_path(text):
        return LocalStore(local_path(text), private=private, fsync=fsync)
    return ObjectStore(text)
