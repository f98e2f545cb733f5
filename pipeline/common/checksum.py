"""Checksums of the data files that jobs write: XXH3, which finds damage ten times as fast as SHA-256.

A checksum is a text with the name of its algorithm, ``xxh3-128:<32 hexadecimal digits>``. Older job directories have
``sha256:<64 digits>``, and their files are checked with it. A checksum does not stop those who may write to the job
directory: they could replace it, too. What is identified by its content, such as models and code, has a SHA-256
(`pipeline.common.digest`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import IO, Any, Protocol

import xxhash


class Hasher(Protocol):
    """A running checksum."""

    def update(self, data: Any, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """Return the hexadecimal digits."""


CURRENT = "xxh3-128"
"""Algorithm of new files."""
_SHA256 = "sha256"
_ALGORITHMS: dict[str, Callable[[], Hasher]] = {CURRENT: xxhash.xxh3_128, _SHA256: hashlib.sha256}
_CHUNK_BYTES = 1 << 20


def checksum_bytes(data: bytes) -> str:
    """Return the checksum of ``data`` by the algorithm of new files."""
    return f"{CURRENT}:{xxhash.xxh3_128_hexdigest(data)}"


def checksum_file(file: IO[bytes], *, like: str) -> str:
    """Return the checksum of the rest of an open file, by the algorithm of the checksum ``like``.

    :raises ValueError: for an unknown algorithm.
    """
    name = algorithm(like)
    running = _ALGORITHMS[name]()
    while data := file.read(_CHUNK_BYTES):
        running.update(data)
    return f"{name}:{running.hexdigest()}"


def algorithm(checksum: str) -> str:
    """Return the algorithm of a checksum.

    :raises ValueError: for an unknown algorithm.
    """
    name = checksum.partition(":")[0]
    if name not in _ALGORITHMS:
        raise ValueError(f"unknown checksum {checksum[:20]!r}, expected one of {', '.join(_ALGORITHMS)}")
    return name


def short(checksum: str) -> str:
    """Return algorithm and first 12 digits, for messages."""
    name, _, digits = checksum.partition(":")
    return f"{name}:{digits[:12]}…"


def from_stored(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object of a file with its ``checksum``; older objects have ``sha256`` instead.

    :raises ValueError: for an unknown algorithm.
    """
    if _SHA256 in record:
        fields = {name: value for name, value in record.items() if name != _SHA256}
        return {**fields, "checksum": f"{_SHA256}:{record[_SHA256]}" if record[_SHA256] else ""}
    if record["checksum"]:
        algorithm(record["checksum"])
    return dict(record)


def to_older(record: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `from_stored` for an object with ``sha256``; any other is returned as it is."""
    name, _, digits = record["checksum"].partition(":")
    if name not in ("", _SHA256):
        return dict(record)
    return {**{key: value for key, value in record.items() if key != "checksum"}, _SHA256: digits}


class ChecksumFile:
    """A binary file that adds the written bytes to a checksum, so that the file is not read again for it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._running = _ALGORITHMS[CURRENT]()
        self.size = 0
        self.is_abandoned = False
        """True: further bytes are dropped. The Parquet library writes a footer even after an error."""
        self.closed = False

    @property
    def checksum(self) -> str:
        """Checksum of the bytes written so far."""
        return f"{CURRENT}:{self._running.hexdigest()}"

    def write(self, data: bytes) -> int:
        """Write ``data`` and add it to the checksum. Return the number of bytes."""
        if not self.is_abandoned:
            self._file.write(data)
            self._running.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: the store flushes once, at the end."""

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self.size

    def writable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return False."""
        return False

    def seekable(self) -> bool:
        """Return False: a checksum needs the bytes in order."""
        return False

    def close(self) -> None:
        """Mark as closed. The store closes the underlying file."""
        self.closed = True
