"""Keep remote model files in a folder of this machine: its processes download each file once.

A file is named by its digest, appears whole or not at all, and is verified whenever it is read. Whoever downloads holds
a lock, for which the others wait; the system releases the lock of a process that dies.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.common.digest import digest_bytes
from pipeline.models.flavors import MAX_BYTES, read_model
from pipeline.models.model import ModelVersion
from pipeline.models.process import process_facts
from pipeline.storage.urls import is_local_path, unique_name

FILES = 8
"""Files that are kept; those read longest ago are removed first."""


def read_version(version: ModelVersion) -> bytes:
    """Return the bytes of a model file, of a remote one from this machine if one of its workers has read it before.

    :raises ModelError: when the file cannot be read.
    """

    def download() -> bytes:
        return read_model(version.uri, limit=max(MAX_BYTES, version.nbytes))

    folder = process_facts().folder
    if not folder or is_local_path(version.uri):
        return download()
    return read_cached(Path(folder), version.digest, download)


def read_cached(folder: Path, digest: str, download: Callable[[], bytes]) -> bytes:
    """Return the bytes with ``digest`` from ``folder``; else download and keep them.

    A folder that cannot be used costs a download, nothing else. Bytes of another digest are returned, but not kept.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(folder / f"{digest}.lock"):
            data = _read(folder / digest, digest)
            if data is None:
                data = download()
                if digest_bytes(data) == digest:
                    with suppress(OSError):
                        _write(folder / digest, data)
            return data
    except OSError:
        return download()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file inside the block."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path, digest: str) -> bytes | None:
    """Return the bytes of a kept file, if it is there and not damaged."""
    try:
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    return data if digest_bytes(data) == digest else None


def _write(path: Path, data: bytes) -> None:
    """Write a file under its name at once, and remove the oldest files beyond `FILES`."""
    temporary = path.with_name(f"{unique_name()}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    kept = [found for found in path.parent.iterdir() if not found.suffix]
    for old in sorted(kept, key=lambda found: found.stat().st_mtime)[:-FILES]:
        old.unlink(missing_ok=True)
