# ruff: noqa: D102 - the verbs are described once, in pipeline.storage.store.Store
"""A store in memory with simulated power cuts, which may remove or truncate all that is not durable.

`MemoryDisk` models a POSIX file system at its worst. The synced part of a file's content survives; a name survives
if its folder was synced. The test decides which names that were not synced survive. Each verb takes the steps of
`pipeline.storage.local.LocalStore`, and the power may fail between any two of them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from pipeline.storage.urls import Names, check_name, is_unfinished, unique_name
from pipeline.testing.stores import Crash


class _File:
    def __init__(self, content: bytes = b"") -> None:
        self.content = content
        self.synced = b""


class MemoryDisk:
    """The file system of one or more machines; give each process its own `MemoryStore` on it."""

    def __init__(self) -> None:
        self.files: dict[str, _File] = {}
        """Names as processes see them."""
        self.durable: dict[str, _File] = {}
        """Names that survive."""
        self.steps_left: int | None = None
        """Steps until the power fails; None: never."""
        self.is_dark = False

    def step(self) -> None:
        """Count one step of a process.

        :raises Crash: if there is no power.
        """
        if self.steps_left is not None:
            self.steps_left -= 1
            self.is_dark = self.is_dark or self.steps_left < 0
        if self.is_dark:
            raise Crash

    def sync_file(self, file: _File) -> None:
        """Make a file's content durable."""
        self.step()
        file.synced = file.content

    def sync_folder(self, folder: str) -> None:
        """Make the current names in a folder, and removals from it, durable."""
        self.step()
        inside = {name for name in (*self.files, *self.durable) if name.rpartition("/")[0] == folder}
        for name in inside:
            self._settle(name)

    def restart(self, *, survives: Callable[[str], bool] = lambda name: False) -> None:
        """Simulate a power cut and a restart.

        :param survives: True for a name whose change reached the disk although it was not synced.
        """
        for name in sorted({*self.files, *self.durable}):
            if self.files.get(name) is not self.durable.get(name) and survives(name):
                self._settle(name)
        for file in self.durable.values():
            file.content = file.synced
        self.files = dict(self.durable)
        self.steps_left, self.is_dark = None, False

    def _settle(self, name: str) -> None:
        if name in self.files:
            self.durable[name] = self.files[name]
        else:
            self.durable.pop(name, None)


class MemoryStore:
    """A `pipeline.storage.store.Store` on a `MemoryDisk`."""

    is_local = False

    def __init__(self, disk: MemoryDisk, root: str, *, fsync: bool = True) -> None:
        self.disk = disk
        self.root = root
        self.fsync = fsync
        """True if verbs are durable when they return. If False, a power cut may undo them."""

    def _key(self, name: str) -> str:
        return f"{self.root}/{check_name(name)}" if name else self.root

    def url(self, name: str) -> str:
        return self._key(name)

    def _write(self, key: str, data: bytes) -> tuple[str, _File]:
        """Write a durable file under a temporary name."""
        folder, _, base = key.rpartition("/")
        unfinished = f"{folder}/.{base}.{unique_name()}.tmp"
        self.disk.step()
        file = self.disk.files[unfinished] = _File(data)
        self._sync_file(file)
        return unfinished, file

    def _sync_file(self, file: _File) -> None:
        if self.fsync:
            self.disk.sync_file(file)

    def _sync_folder(self, key: str) -> None:
        if self.fsync:
            self.disk.sync_folder(key.rpartition("/")[0])

    def put_if_absent(self, name: str, data: bytes) -> bool:
        key = self._key(name)
        unfinished, file = self._write(key, data)
        self.disk.step()
        is_made = self.disk.files.setdefault(key, file) is file
        self.disk.step()
        del self.disk.files[unfinished]
        self._sync_folder(key)
        return is_made

    def check_conditional_writes(self) -> None:
        """Do nothing: writes are conditional."""

    def check_conditional_replace(self) -> None:
        """Do nothing: replacements are conditional."""

    def version(self, name: str) -> str:
        self.disk.step()
        file = self.disk.files.get(self._key(name))
        return "" if file is None else hashlib.sha256(file.content).hexdigest()

    def replace_if_unchanged(self, name: str, data: bytes, *, version: str) -> bool:
        if not version:
            return self.put_if_absent(name, data)
        if self.version(name) != version:
            return False
        self.replace(name, data)
        return True

    def modified(self, name: str) -> float:
        """Return 0: this disk has no clock."""
        self.read(name)
        return 0.0

    def replace(self, name: str, data: bytes) -> None:
        key = self._key(name)
        unfinished, file = self._write(key, data)
        self.disk.step()
        self.disk.files[key] = file
        del self.disk.files[unfinished]
        self._sync_folder(key)

    def append(self, name: str, line: str) -> None:
        key = self._key(name)
        self.disk.step()
        is_new = key not in self.disk.files
        file = self.disk.files.setdefault(key, _File())
        is_torn = bool(file.content) and not file.content.endswith(b"\n")
        file.content += (("\n" if is_torn else "") + line.rstrip("\n") + "\n").encode()
        self._sync_file(file)
        if is_new:
            self._sync_folder(key)

    def read(self, name: str) -> bytes:
        self.disk.step()
        try:
            return self.disk.files[self._key(name)].content
        except KeyError:
            raise FileNotFoundError(name) from None

    def exists(self, name: str) -> bool:
        return self._key(name) in self.disk.files

    def _below(self, folder: str) -> list[list[str]]:
        prefix = f"{self._key(folder)}/"
        return [name[len(prefix) :].split("/") for name in self.disk.files if name.startswith(prefix)]

    def list(self, folder: str = "") -> Names:
        self.disk.step()
        return sorted(parts[0] for parts in self._below(folder) if len(parts) == 1 and not is_unfinished(parts[0]))

    def list_folders(self, folder: str = "") -> Names:
        return sorted({parts[0] for parts in self._below(folder) if len(parts) > 1})

    @contextmanager
    def open_output(self, name: str) -> Iterator[IO[bytes]]:
        key = self._key(name)
        self.disk.step()
        if key in self.disk.files:
            raise FileExistsError(name)
        file = self.disk.files[key] = _File()
        output = io.BytesIO()
        try:
            yield output
            self.disk.step()
            file.content = output.getvalue()
            self._sync_file(file)
        except Exception:
            self.remove(name)
            raise
        self._sync_folder(key)

    def open_input(self, name: str) -> IO[bytes]:
        return io.BytesIO(self.read(name))

    def link_or_copy(self, name: str, source: Any, source_name: str) -> None:
        self.replace(name, source.read(source_name))

    def sync(self, folder: str = "") -> None:
        self._sync_folder(f"{self._key(folder)}/")

    def size(self, name: str) -> int:
        return len(self.read(name))

    def remove(self, name: str) -> None:
        self.disk.step()
        self.disk.files.pop(self._key(name), None)

    def remove_folder(self, folder: str) -> None:
        for parts in self._below(folder):
            self.remove("/".join([folder, *parts] if folder else parts))
