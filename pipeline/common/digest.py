"""Stable content digests: the same content gives the same digest in every process, on every machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import IO, Any

CHUNK_BYTES = 1 << 20


def digest_bytes(data: bytes) -> str:
    """SHA-256 of ``data``, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON text of ``value``, as 64 hexadecimal digits.

    Keys are sorted, and fields that are None or empty containers are dropped, so that a field added later with
    such a default leaves the digests of what is there already as they were. Frozen dataclasses count as mappings.

    :raises TypeError: for a value JSON cannot hold, or a float that is not finite.
    """
    text = json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return digest_bytes(text.encode())


def _canonical(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        pairs = ((str(key), _canonical(item)) for key, item in value.items())
        return {key: item for key, item in pairs if not _is_unset(item)}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return value


def _is_unset(value: Any) -> bool:
    return value is None or (isinstance(value, (dict, list, tuple)) and len(value) == 0)


class DigestingFile:
    """A binary file that digests what is written to it, so that nobody has to read it again for that."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.is_abandoned = False
        """What is still written is dropped: the library writes a footer whatever went wrong before."""
        self.closed = False

    def write(self, data: bytes) -> int:
        """Write and digest; returns the number of bytes."""
        if not self.is_abandoned:
            self._file.write(data)
            self.sha256.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Flushing is up to the store, once, at the end."""

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def writable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is not."""
        return False

    def seekable(self) -> bool:
        """It is not: a digest needs the bytes in order."""
        return False

    def close(self) -> None:
        """Closing the file under it is up to the store."""
        self.closed = True
