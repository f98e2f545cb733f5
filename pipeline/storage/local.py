# ruff: noqa: D102 - the verbs are described once, in Store
"""`LocalStore`: a store on a POSIX file system, NFS or Lustre.

A `Store` is one root folder or bucket prefix. Names inside are relative, with forward slashes, and never lead out.

Every commit needs the exclusive create. On a file system: write a unique name, fsync, ``link(2)`` it to the exclusive
name, unlink, fsync the folder. If the link call fails, the link count of the unique name shows if it was made.
For object stores see `pipeline.storage.object_store`.

The kernel writes out large files while more bytes are written, so that the final fsync has little left to do.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from pipeline.errors import UnsafeStore
from pipeline.storage.urls import Names, check_name, is_unfinished, storage_errors, unique_name

PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600
SHARED_FILE = 0o666
"""Mode before the user's umask is applied."""
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}


class LocalStore:
    """A `Store` on a POSIX file system."""

    is_local = True

    def __init__(self, root: Path, *, private: bool = False, fsync: bool = True) -> None:
        self.root = str(root)
        self.private = private
        self.fsync = fsync

    @property
    def _mode(self) -> int:
        return PRIVATE_FILE if self.private else SHARED_FILE

    def path(self, name: str) -> Path:
        """Return the local path of ``name``."""
        return Path(self.root, check_name(name)) if name else Path(self.root)

    def url(self, name: str) -> str:
        # No Path, for speed: a resume asks for the receipts of all partitions.
        return os.path.join(self.root, check_name(name)) if name else self.root

    def put_if_absent(self, name: str, data: bytes) -> bool:
        target = self.path(name)
        with storage_errors(str(target)):
            unfinished = self._write_unfinished(target, data)
            try:
                made = _link(unfinished, target)
            finally:
                # A leftover file is never listed, and must not turn a successful commit into an error.
                with suppress(OSError):
                    unfinished.unlink()
            # Sync also if another writer's file was there first: it may not have been synced yet.
            self._sync_folder(target.parent)
            return made

    def check_conditional_writes(self) -> None:
        """Do nothing: without hard links, every `put_if_absent` raises `UnsafeStore`."""

    def check_conditional_replace(self) -> None:
        """Do nothing: see `Store.replace_if_unchanged`."""

    def version(self, name: str) -> str:
        try:
            return hashlib.sha256(self.read(name)).hexdigest()
        except FileNotFoundError:
            return ""

    def replace_if_unchanged(self, name: str, data: bytes, *, version: str) -> bool:
        if not version:
            return self.put_if_absent(name, data)
        if self.version(name) != version:
            return False
        self.replace(name, data)
        return True

    def modified(self, name: str) -> float:
        with storage_errors(self.url(name)):
            return self.path(name).stat().st_mtime

    def replace(self, name: str, data: bytes) -> None:
        target = self.path(name)
        with storage_errors(str(target)):
            unfinished = self._write_unfinished(target, data)
            try:
                os.replace(unfinished, target)
            except OSError:
                with suppress(OSError):
                    unfinished.unlink()
                raise
            self._sync_folder(target.parent)

    def append(self, name: str, line: str) -> None:
        target = self.path(name)
        with storage_errors(str(target)):
            self.make_folder(target.parent)
            descriptor = os.open(target, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, self._mode)
            try:
                size = os.fstat(descriptor).st_size
                is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                _write_all(descriptor, (("\n" if is_torn else "") + line.rstrip("\n") + "\n").encode())
                if self.fsync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if size == 0:
                self._sync_folder(target.parent)

    def read(self, name: str) -> bytes:
        path = self.url(name)
        with storage_errors(path), open(path, "rb") as file:
            return file.read()

    def exists(self, name: str) -> bool:
        with storage_errors(self.url(name)):
            return self.path(name).is_file()

    def list(self, folder: str = "") -> Names:
        return sorted(
            entry.name for entry in self._entries(folder) if entry.is_file() and not is_unfinished(entry.name)
        )

    def list_folders(self, folder: str = "") -> Names:
        return sorted(entry.name for entry in self._entries(folder) if entry.is_dir())

    def _entries(self, folder: str) -> Iterable[os.DirEntry[str]]:
        try:
            with storage_errors(self.url(folder)), os.scandir(self.path(folder)) as entries:
                return tuple(entries)
        except FileNotFoundError:
            return ()

    @contextmanager
    def open_output(self, name: str) -> Iterator[IO[bytes]]:
        target = self.path(name)
        with storage_errors(str(target)):
            self.make_folder(target.parent)
            descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, self._mode)
            try:
                with self._open_new(descriptor) as file:
                    yield file
                    file.flush()
                    if self.fsync:
                        os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):
                    target.unlink()
                raise
            self._sync_folder(target.parent)

    def _open_new(self, descriptor: int) -> IO[bytes]:
        """Open a file for writing from start to end. If it must be durable, write-out begins early."""
        return io.BufferedWriter(EarlyFile(descriptor) if self.fsync else io.FileIO(descriptor, "w"))

    def open_input(self, name: str) -> IO[bytes]:
        with storage_errors(self.url(name)):
            return self.path(name).open("rb")

    def link_or_copy(self, name: str, source: Any, source_name: str) -> None:
        target = self.path(name)
        with storage_errors(str(target)):
            self.make_folder(target.parent)
            unfinished = _unfinished_beside(target)
            try:
                if not (source.is_local and _try_link(source.url(source_name), unfinished)):
                    self._copy(source, source_name, unfinished)
                elif not self.private:
                    os.chmod(unfinished, SHARED_FILE & ~current_umask())
                os.replace(unfinished, target)
            finally:
                # The name is left after an error. If both are names of one file, rename(2) removes neither.
                with suppress(OSError):
                    unfinished.unlink()

    def _copy(self, source: Any, source_name: str, target: Path) -> None:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self._mode)
        with self._open_new(descriptor) as copy, source.open_input(source_name) as original:
            shutil.copyfileobj(original, copy, 1 << 20)
            copy.flush()
            if self.fsync:
                os.fsync(copy.fileno())

    def sync(self, folder: str = "") -> None:
        with storage_errors(self.url(folder)):
            self._sync_folder(self.path(folder))

    def size(self, name: str) -> int:
        with storage_errors(self.url(name)):
            return self.path(name).stat().st_size

    def remove(self, name: str) -> None:
        with storage_errors(self.url(name)), suppress(FileNotFoundError):
            self.path(name).unlink()

    def remove_folder(self, folder: str) -> None:
        with storage_errors(self.url(folder)), suppress(FileNotFoundError):
            shutil.rmtree(self.path(folder))

    def make_folder(self, folder: Path) -> None:
        """Create ``folder`` and missing parents, durably; private if the store is private."""
        if folder.is_dir():
            return
        with storage_errors(str(folder)):
            self.make_folder(folder.parent)
            with suppress(FileExistsError):
                os.mkdir(folder, PRIVATE_FOLDER if self.private else 0o777)
            self._sync_folder(folder.parent)

    def _write_unfinished(self, target: Path, data: bytes) -> Path:
        self.make_folder(target.parent)
        unfinished = _unfinished_beside(target)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self._mode)
        try:
            _write_all(descriptor, data)
            if self.fsync:
                os.fsync(descriptor)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise
        finally:
            os.close(descriptor)
        return unfinished

    def _sync_folder(self, folder: Path) -> None:
        if not self.fsync:
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def current_umask() -> int:
    """Return the umask of this process. Setting the umask to read it affects other threads: it is the last resort."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _link(unfinished: Path, target: Path) -> bool:
    """Link ``unfinished`` to ``target``. Return False if ``target`` is the name of another file."""
    try:
        os.link(unfinished, target)
    except FileExistsError:
        return _is_same_file(unfinished, target)
    except OSError as error:
        # NFS may lose the reply of a successful link call: the link count decides (open(2), O_EXCL).
        if unfinished.stat().st_nlink == 2:
            return True
        if error.errno in _NO_LINKS:
            raise UnsafeStore(
                "the file system has no hard links, which an exclusive commit needs",
                where=str(target),
                found=str(error),
                expected="a POSIX file system, NFS or Lustre, or an object store",
                next_step="put the job directory somewhere else with --directory or pipeline.directory",
            ) from error
        raise
    return True


def _try_link(original: str, target: Path) -> bool:
    """Hard link ``original`` to ``target``. Return False if the file system does not support it."""
    try:
        os.link(original, target)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    return True


def _unfinished_beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{unique_name()}.tmp")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _is_same_file(first: Path, other: Path) -> bool:
    try:
        return os.path.samefile(first, other)
    except FileNotFoundError:
        return False


STRIDE = 8 << 20
"""Bytes after which the kernel is told to start writing them out."""
_WRITE = 2
"""SYNC_FILE_RANGE_WRITE of sync_file_range(2): start writing out dirty pages, without waiting."""


@cache
def starter() -> Callable[[int, int, int], int] | None:
    """Return a function that starts writing out a range (offset, bytes) of an open file; None if unsupported."""
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def start(descriptor: int, offset: int, count: int) -> int:
        # Only a hint: if the call fails, fsync still writes the range.
        result: int = call(descriptor, offset, count, _WRITE)
        return result

    return start


class EarlyFile(io.FileIO):
    """A file that is written from start to end, without seeking."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w")
        self._end = self._started = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        """Write, and start writing out each `STRIDE` bytes."""
        count = super().write(data)
        self._end += count
        start = starter()
        if start is not None and self._end - self._started >= STRIDE:
            start(self.fileno(), self._started, self._end - self._started)
            self._started = self._end
        return count
