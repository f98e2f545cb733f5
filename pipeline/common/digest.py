"""Stable content digests: equal content has an equal digest in every process, on every machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import IO, Any

CHUNK_BYTES = 1 << 20


def digest_bytes(data: bytes) -> str:
    """Return the SHA-256 of ``data``, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON text of ``value``, as 64 hexadecimal digits.

    Keys are sorted. Fields that are None or empty containers are dropped, so that a new field with such a default
    leaves existing digests unchanged. Dataclasses count as mappings.

    :raises TypeError: for a value that JSON cannot hold.
    :raises ValueError: for a float that is not finite.
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
    """A binary file that digests the written bytes, so that the file is not read again for its digest."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.is_abandoned = False
        """True: further bytes are dropped. The Parquet library writes a footer even after an error."""
        self.closed = False

    def write(self, data: bytes) -> int:
        """Write and digest ``data``. Return the number of bytes."""
        if not self.is_abandoned:
            self._file.write(data)
            self.sha256.update(data)
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
        """Return False: a digest needs the bytes in order."""
        return False

    def close(self) -> None:
        """Mark as closed. The store closes the underlying file."""
        self.closed = True
