"""Stable content digests: equal content has an equal digest in every process, on every machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

_PLAIN = frozenset({str, int, float, bool, type(None)})


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
    if type(value) in _PLAIN:
        return value
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
