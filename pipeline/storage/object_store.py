# ruff: noqa: D102 - the verbs are described once, in Store
"""`ObjectStore`: a store on any fsspec file system that is not local: S3, GCS, memory.

The exclusive create is fsspec's ``pipe_file(mode="create")``, that is ``If-None-Match: *``. A reply may be lost. If the
client library then retries, the second reply says "exists already" about our own object. After any reply except
success, the object is therefore read back and compared.
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from pipeline.errors import StorageError, UnsafeStore
from pipeline.storage.urls import (
    Names,
    as_storage_error,
    check_name,
    file_system,
    is_unfinished,
    storage_errors,
    unique_name,
)

_REFUSALS = (NotImplementedError, TypeError, ValueError)
_proven: set[str] = set()
_proven_lock = threading.Lock()


class ObjectStore:
    """A store on an fsspec file system with a conditional create. See `pipeline.storage.store.Store`."""

    is_local = False

    def __init__(self, root: str, **options: Any) -> None:
        self.fs, self._base = file_system(root.rstrip("/"), **options)
        self.root = root.rstrip("/")

    def _key(self, name: str) -> str:
        return f"{self._base}/{check_name(name)}" if name else str(self._base)

    def url(self, name: str) -> str:
        return f"{self.root}/{check_name(name)}" if name else self.root

    def put_if_absent(self, name: str, data: bytes) -> bool:
        key = self._key(name)
        try:
            self.fs.pipe_file(key, data, mode="create")
        except Exception as error:
            return self._settle(name, data, error)
        return True

    def _settle(self, name: str, data: bytes, error: Exception) -> bool:
        """Return True if the object of a failed create exists with ``data``; raise if the object does not exist."""
        self.fs.invalidate_cache()
        try:
            return self.read(name) == data
        except FileNotFoundError:
            raise as_storage_error(error, place=self.url(name)) from error

    def check_conditional_writes(self) -> None:
        """Create one key twice; see `Store.check_conditional_writes`. Checked once per process and root."""
        with _proven_lock:
            if self.root in _proven:
                return
        name = f".{unique_name()}.tmp"
        first, second = unique_name().encode(), unique_name().encode()
        try:
            is_made = self.put_if_absent(name, first)
            is_made_twice = self.put_if_absent(name, second)
            if not is_made or is_made_twice or self.read(name) != first:
                raise self._unsafe("a key that existed was created again: the condition is ignored")
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, _REFUSALS) or (isinstance(cause, OSError) and cause.errno == errno.ENOSYS):
                raise self._unsafe(f"{type(cause).__name__}: {cause}") from error
            raise
        finally:
            with suppress(Exception):
                self.remove(name)
        with _proven_lock:
            _proven.add(self.root)

    def _unsafe(self, found: str) -> UnsafeStore:
        return UnsafeStore(
            "the storage cannot create a key only if it is absent, which an exclusive commit needs",
            where=self.root,
            found=found,
            expected="an object store that honours If-None-Match: * (S3, GCS and most others do), or a file system",
            next_step="use another store, or update this one",
        )

    def replace(self, name: str, data: bytes) -> None:
        with storage_errors(self.url(name)):
            self.fs.pipe_file(self._key(name), data)

    def append(self, name: str, line: str) -> None:
        """Add one line by writing a new version of the object: object stores cannot append. One writer at a time."""
        try:
            before = self.read(name)
        except FileNotFoundError:
            before = b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        self.replace(name, before + line.rstrip("\n").encode() + b"\n")

    def read(self, name: str) -> bytes:
        with storage_errors(self.url(name)):
            return cast(bytes, self.fs.cat_file(self._key(name)))

    def exists(self, name: str) -> bool:
        with storage_errors(self.url(name)):
            self.fs.invalidate_cache()
            return bool(self.fs.isfile(self._key(name)))

    def list(self, folder: str = "") -> Names:
        names = (name for name, kind in self._entries(folder) if kind == "file")
        return sorted(name for name in names if not is_unfinished(name))

    def list_folders(self, folder: str = "") -> Names:
        return sorted(name for name, kind in self._entries(folder) if kind == "directory")

    def _entries(self, folder: str) -> Iterable[tuple[str, str]]:
        key = self._key(folder)
        try:
            with storage_errors(self.url(folder)):
                self.fs.invalidate_cache()
                found = self.fs.ls(key, detail=True)
        except FileNotFoundError:
            return ()
        # Some stores return the key itself, or a marker object for the folder: neither is inside the folder.
        inside = (item for item in found if str(item["name"]).rstrip("/").rpartition("/")[0].endswith(key.strip("/")))
        return tuple((str(item["name"]).rstrip("/").rpartition("/")[2], str(item["type"])) for item in inside)

    @contextmanager
    def open_output(self, name: str) -> Iterator[IO[bytes]]:
        """Upload one object as ``name``.

        If the block raises, the upload is discarded explicitly, because fsspec would publish the bytes written so far.
        """
        with storage_errors(self.url(name)):
            file = self.fs.open(self._key(name), "wb")
            try:
                yield file
                size = file.tell()
            except BaseException:
                self._discard(file, name)
                raise
        try:
            file.close()
        except BaseException as error:
            if isinstance(error, Exception) and self._has_landed(name, size):
                return
            self._discard(file, name)
            if isinstance(error, Exception):
                raise as_storage_error(error, place=self.url(name)) from error
            raise

    def _has_landed(self, name: str, size: int) -> bool:
        """True if an upload whose last call failed exists nevertheless. No other writer uses its name."""
        try:
            return self.size(name) == size
        except (FileNotFoundError, StorageError):
            return False

    def _discard(self, file: Any, name: str) -> None:
        with suppress(Exception):
            file.discard()
        with suppress(AttributeError):
            file.closed = True
        with suppress(Exception):
            self.remove(name)

    def open_input(self, name: str) -> IO[bytes]:
        with storage_errors(self.url(name)):
            self.fs.invalidate_cache()
            return cast(IO[bytes], self.fs.open(self._key(name), "rb"))

    def link_or_copy(self, name: str, source: Any, source_name: str) -> None:
        if isinstance(source, ObjectStore) and source.fs is self.fs:
            with storage_errors(self.url(name)):
                self.fs.invalidate_cache()
                self.fs.cp_file(source._key(source_name), self._key(name))
            return
        with source.open_input(source_name) as original, self.open_output(name) as copy:
            shutil.copyfileobj(original, copy, 1 << 20)

    def sync(self, folder: str = "") -> None:
        """Do nothing: an object is durable once its creation has returned."""

    def size(self, name: str) -> int:
        with storage_errors(self.url(name)):
            self.fs.invalidate_cache()
            return int(self.fs.size(self._key(name)))

    def remove(self, name: str) -> None:
        with storage_errors(self.url(name)), suppress(FileNotFoundError):
            self.fs.rm_file(self._key(name))

    def remove_folder(self, folder: str) -> None:
        with storage_errors(self.url(folder)), suppress(FileNotFoundError):
            self.fs.rm(self._key(folder), recursive=True)
