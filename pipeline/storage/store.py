"""The storage verbs, and which backend serves a root."""

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
    """True where names are files of a POSIX file system, which hard links, modes and renames need."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create ``name`` with ``data`` in one step; False when it exists already, which leaves that one untouched.

        Where a reply may be lost, True also says that what exists is equal to ``data``: write one's own id into it.

        :raises StorageError: when it cannot be told whether it was made; look again before anything is deleted.
        """

    def check_conditional_writes(self) -> None:
        """Find out whether `put_if_absent` is exclusive here, where that depends on a service. Nothing is left behind.

        :raises UnsafeStore: when it is not.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Set ``name`` to ``data``; a reader sees the old bytes or the new ones."""

    def append(self, name: str, line: str) -> None:
        """Add one line of text to ``name``, after the end of a line that a crash cut short."""

    def read(self, name: str) -> bytes:
        """All bytes of ``name``.

        :raises FileNotFoundError: when it does not exist.
        """

    def exists(self, name: str) -> bool:
        """Whether ``name`` is a file."""

    def list(self, folder: str = "") -> Names:
        """Names (without folder) of the files directly in ``folder``, sorted, unfinished ones left out; [] if none."""

    def list_folders(self, folder: str = "") -> Names:
        """Names (without folder) of the folders directly in ``folder``, sorted; [] if none."""

    def open_output(self, name: str) -> Any:
        """Context manager over a binary file for a new ``name``; durable on leaving, removed when the block raises."""

    def open_input(self, name: str) -> IO[bytes]:
        """Seekable binary file."""

    def link_or_copy(self, name: str, source: Any, source_name: str) -> None:
        """Set ``name`` to what ``source_name`` is in the store ``source``, in one step: by hard link or server-side
        where possible, else by copying. `sync` makes it durable."""

    def sync(self, folder: str = "") -> None:
        """Make the names in ``folder`` durable."""

    def size(self, name: str) -> int:
        """Bytes of ``name``."""

    def remove(self, name: str) -> None:
        """Remove the file ``name``; nothing happens when it does not exist."""

    def remove_folder(self, folder: str) -> None:
        """Remove ``folder`` with all it holds; nothing happens when it does not exist."""

    def url(self, name: str) -> str:
        """Path or URL of ``name`` for a person or another library."""


def open_store(root: str | os.PathLike[str], *, private: bool = False, fsync: bool = True) -> Store:
    """The store for ``root``: a local path, ``file://`` URL or any other fsspec URL.

    :param private: create folders 0700 and files 0600 whatever the umask says (the state of a job).
    :param fsync: make every write durable before it counts; turn off only where losing the job at a power cut is fine.
    """
    text = os.fspath(root)
    if is_local_path(text):
        return LocalStore(local_path(text), private=private, fsync=fsync)
    return ObjectStore(text)
