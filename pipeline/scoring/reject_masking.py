"""Mask rejected rows before they are stored: leave out columns, hash columns with a key, hide messages."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.common.secrets import resolve_reference
from pipeline.errors import SpecError
from pipeline.plan.recipe import REJECT_MESSAGE
from pipeline.scoring.value_text import value_text
from pipeline.spec.parts import Errors

MASKED = "pipeline.masked"
"""Key in the metadata of a masked file of rejects: JSON with the columns ``left_out`` and ``hashed``."""
HIDDEN_MESSAGE = "message not stored: errors.keep_columns"
"""Text in place of a message, which may quote values."""
SHORTEST_KEY = 16
"""Fewest bytes of a key: with a shorter one, the hashes of all keys could be tried."""


@dataclass(frozen=True)
class RejectMask:
    """The columns of a stored reject, with the resolved key for those that are hashed."""

    left_out: tuple[str, ...] = ()
    """Input columns that are not stored."""
    hashed: tuple[str, ...] = ()
    """Input columns of which the HMAC-SHA-256 is stored."""
    hides_messages: bool = False
    key: bytes = field(default=b"", repr=False)

    @staticmethod
    def of(errors: Errors, source: pa.Schema) -> RejectMask:
        """Return the mask of a job's policy for rows with the columns of ``source``.

        :raises SpecError: if the key cannot be found in this process, or is too short.
        """
        if not errors.masks_rejects:
            return RejectMask()
        hashed = tuple(name for name in source.names if name in errors.hash_columns)
        kept = source.names if errors.keep_columns is None else (*errors.keep_columns, *hashed)
        left_out = tuple(name for name in source.names if name not in kept)
        return RejectMask(left_out, hashed, hides_messages=True, key=_key(errors) if hashed else b"")

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of a file of masked rejects; empty if nothing is masked."""
        if not (self.left_out or self.hashed):
            return {}
        return {MASKED: json.dumps({"left_out": self.left_out, "hashed": self.hashed})}

    def schema(self, rejects: pa.Schema) -> pa.Schema:
        """Return the columns of the stored rows, of the columns of unmasked ones."""
        fields = [
            pa.field(column.name, pa.string()) if column.name in self.hashed else column
            for column in rejects
            if column.name not in self.left_out
        ]
        return pa.schema(fields, metadata=rejects.metadata)

    def apply(self, rows: pa.Table) -> pa.Table:
        """Return rejected rows as they are stored."""
        if not self.hides_messages:
            return rows
        columns = []
        schema = self.schema(rows.schema)
        for name in schema.names:
            column = rows.column(name)
            if name == REJECT_MESSAGE:
                column = pa.array([HIDDEN_MESSAGE] * rows.num_rows, pa.string())
            elif name in self.hashed:
                column = self._hash(column)
            columns.append(column)
        return pa.Table.from_arrays(columns, schema=schema)

    def _hash(self, column: pa.ChunkedArray) -> pa.Array:
        valid = column.is_valid().to_pylist()
        texts = (value_hash(_text(column, row), self.key) if ok else None for row, ok in enumerate(valid))
        return pa.array(list(texts), pa.string())


def value_hash(text: str, key: bytes) -> str:
    """Return the HMAC-SHA-256 of a value's text, UTF-8, as 64 hexadecimal digits."""
    return hmac.new(key, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def masked_columns(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """Return the columns that a file of rejects does not have as they were read, from its metadata."""
    text = (metadata or {}).get(MASKED.encode())
    if text is None:
        return ()
    record = json.loads(text)
    return (*record["left_out"], *record["hashed"])


def _text(column: pa.ChunkedArray, row: int) -> str:
    value = column[row]
    if pa.types.is_string(value.type) or pa.types.is_large_string(value.type):
        try:
            return str(value.as_py())
        except UnicodeDecodeError:
            return value_text(column, row, limit=None)
    try:
        return str(value.cast(pa.string()).as_py())
    except (pa.ArrowException, NotImplementedError):
        return value_text(column, row, limit=None)


def _key(errors: Errors) -> bytes:
    assert errors.hash_key is not None
    key = resolve_reference(errors.hash_key, where="errors.hash_key").encode()
    if len(key) < SHORTEST_KEY:
        raise SpecError(
            "the key is too short to hash values with",
            where="errors.hash_key",
            found=f"{len(key)} bytes",
            expected=f"at least {SHORTEST_KEY} bytes",
            next_step="make one: python -c 'import secrets; print(secrets.token_hex(32))'",
        )
    return key
