# ruff: noqa: D102 - the verbs are described once, in Store
"""`ObjectStore`: a store on any fsspec file system that is not local: S3, GCS, memory.

The exclusive create is fsspec's ``pipe_file(mode="create")``, that is ``If-None-Match: *``. A reply may be lost. If the
client library then retries, the second reply says "exists already" about our own object. After any reply except
success, the object is therefore read back and compared. The conditional replacement (``If-Match`` with the ETag) is
settled in the same way; fsspec has it for S3 only.

Both go as one request of up to 5 GiB: a condition on a multipart upload is a feature of its own, which no check proves.
"""

from __future__ import annotations

import errno
import hashlib
import logging
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

logger = logging.getLogger(__name__)
_REFUSALS = (NotImplementedError, TypeError, ValueError)
_ONE_REQUEST = 50 << 20
"""Bytes above which s3fs and gcsfs would begin a multipart or resumable upload."""
_IF_MATCH = ("s3", "s3a")
"""Protocols whose ``pipe_file`` passes ``IfMatch`` on."""
_proven: set[tuple[str, str]] = set()
_proven_lock = threading.Lock()
_compare_lock = threading.Lock()
"""Makes comparing and replacing one step within this process, for file systems without a condition."""


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
            self.fs.pipe_file(key, data, mode="create", **self._one_request(data))
        except Exception as error:
            return self._settle(name, data, error)
        return True

    def _settle(self, name: str, data: bytes, error: Exception) -> bool:
        """Return True if the object of a failed create exists with ``data``; raise if the object does not exist."""
        self.fs.invalidate_cache()
        try:
            return self.read(name) == data
        except FileNotFoundError:
            raise as_storage_error(error, where=self.url(name)) from error

    def _one_request(self, data: bytes) -> dict[str, Any]:
        """Return the options with which a client library uploads ``data`` in one request."""
        has_chunks = self._has_if_match or "gs" in self._protocols
        return {"chunksize": len(data) + 1} if has_chunks and len(data) >= _ONE_REQUEST else {}

    @property
    def _protocols(self) -> tuple[str, ...]:
        protocol = self.fs.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    @property
    def _has_if_match(self) -> bool:
        return any(protocol in _IF_MATCH for protocol in self._protocols)

    def version(self, name: str) -> str:
        try:
            if self._has_if_match:
                with storage_errors(self.url(name)):
                    self.fs.invalidate_cache()
                    return str(self.fs.info(self._key(name))["ETag"])
            return hashlib.sha256(self.read(name)).hexdigest()
        except FileNotFoundError:
            return ""

    def replace_if_unchanged(self, name: str, data: bytes, *, version: str) -> bool:
        if not version:
            return self.put_if_absent(name, data)
        if not self._has_if_match:
            with _compare_lock:
                if self.version(name) != version:
                    return False
                self.replace(name, data)
                return True
        try:
            self.fs.pipe_file(self._key(name), data, IfMatch=version, **self._one_request(data))
        except Exception as error:
            return self._settle_replace(name, data, version, error)
        return True

    def _settle_replace(self, name: str, data: bytes, version: str, error: Exception) -> bool:
        """Return True if a failed replacement has landed, False if another writer was faster; else raise."""
        self.fs.invalidate_cache()
        try:
            if self.read(name) == data:
                return True
        except FileNotFoundError:
            return False
        if self.version(name) != version:
            return False
        raise as_storage_error(error, where=self.url(name)) from error

    def modified(self, name: str) -> float:
        with storage_errors(self.url(name)):
            self.fs.invalidate_cache()
            return float(self.fs.modified(self._key(name)).timestamp())

    def check_conditional_replace(self) -> None:
        """Replace one key with an outdated version; see `Store.check_conditional_replace`.

        Checked once per process and root. File systems without a condition compare and write: a warning says so.
        """
        if not self._has_if_match:
            if "memory" not in self._protocols and self._is_first("replace"):
                logger.warning(
                    "%s has no conditional replacement through fsspec: let no two jobs publish there at once", self.root
                )
            return
        if self._is_proven("replace"):
            return
        name = f".{unique_name()}.tmp"
        first, second, third = (unique_name().encode() for _ in range(3))
        try:
            self.replace(name, first)
            outdated = self.version(name)
            is_replaced = self.replace_if_unchanged(name, second, version=outdated)
            is_replaced_again = self.replace_if_unchanged(name, third, version=outdated)
            if not is_replaced or is_replaced_again or self.read(name) != second:
                raise self._unsafe_replace("a key that had changed was replaced: the condition is ignored")
        except StorageError as error:
            if _is_refusal(error.__cause__):
                raise self._unsafe_replace(f"{type(error.__cause__).__name__}: {error.__cause__}") from error
            raise
        finally:
            with suppress(Exception):
                self.remove(name)
        self._is_first("replace")

    def _is_proven(self, what: str) -> bool:
        with _proven_lock:
            return (self.root, what) in _proven

    def _is_first(self, what: str) -> bool:
        """Note that ``what`` is proven. Return True if it was not noted before."""
        with _proven_lock:
            is_first = (self.root, what) not in _proven
            _proven.add((self.root, what))
            return is_first

    def check_conditional_writes(self) -> None:
        """Create one key twice; see `Store.check_conditional_writes`. Checked once per process and root."""
        if self._is_proven("create"):
            return
        name = f".{unique_name()}.tmp"
        first, second = unique_name().encode(), unique_name().encode()
        try:
            is_made = self.put_if_absent(name, first)
            is_made_twice = self.put_if_absent(name, second)
            if not is_made or is_made_twice or self.read(name) != first:
                raise self._unsafe("a key that existed was created again: the condition is ignored")
        except StorageError as error:
            if _is_refusal(error.__cause__):
                raise self._unsafe(f"{type(error.__cause__).__name__}: {error.__cause__}") from error
            raise
        finally:
            with suppress(Exception):
                self.remove(name)
        self._is_first("create")

    def _unsafe_replace(self, found: str) -> UnsafeStore:
        return UnsafeStore(
            "the storage cannot replace a key only if it is unchanged, which publishing to a shared sink needs",
            where=self.root,
            found=found,
            expected="an object store that honours If-Match on PUT (S3 and most others do), or a file system",
            next_step="use another store for the sink, or update this one",
        )

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
                entries = self.fs.ls(key, detail=True)
        except FileNotFoundError:
            return ()
        # Some stores return the key itself, or a marker object for the folder: neither is inside the folder.
        inside = (item for item in entries if str(item["name"]).rstrip("/").rpartition("/")[0].endswith(key.strip("/")))
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
                raise as_storage_error(error, where=self.url(name)) from error
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


def _is_refusal(error: BaseException | None) -> bool:
    """True if a file system does not know the condition."""
    return isinstance(error, _REFUSALS) or (isinstance(error, OSError) and error.errno == errno.ENOSYS)
