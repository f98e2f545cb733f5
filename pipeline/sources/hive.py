"""Hive keys of a source: columns whose values stand in the names of folders."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa

from pipeline.errors import SchemaDrift
from pipeline.sources.locate import HIVE_NULL, SourceFile

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def key_schema(files: Sequence[SourceFile]) -> pa.Schema:
    """Return the hive keys of ``files``: int64 if all values of a key are integers, else string.

    :raises SchemaDrift: if the folders of the files have different keys.
    """
    names = tuple(name for name, _ in files[0].hive_keys)
    values: dict[str, list[str]] = {name: [] for name in names}
    if len(values) < len(names):
        raise _key_drift(files[0], "a key twice", "each key once")
    for file in files:
        if tuple(name for name, _ in file.hive_keys) != names:
            found = "/".join(name for name, _ in file.hive_keys) or "no partition folder"
            raise _key_drift(file, found, "/".join(names) or "no partition folder", other=files[0])
        for name, value in file.hive_keys:
            values[name].append(value)
    return pa.schema([pa.field(name, _key_type(texts)) for name, texts in values.items()])


def _key_type(texts: list[str]) -> pa.DataType:
    known = {text for text in texts if text != HIVE_NULL}
    return pa.int64() if known and all(_INTEGER.fullmatch(text) for text in known) else pa.string()


def _key_drift(file: SourceFile, found: str, expected: str, *, other: SourceFile | None = None) -> SchemaDrift:
    return SchemaDrift(
        "the hive partition folders of the files differ",
        where=file.path,
        found=found,
        expected=expected + (f", as {other.path} has" if other else ""),
        next_step="move the file, or name one kind of folder in source.path",
    )


def with_keys(fields: list[pa.Field], keys: pa.Schema) -> pa.Schema:
    """Return ``fields``, then the keys of other names."""
    names = {field.name for field in fields}
    return pa.schema([*fields, *(key for key in keys if key.name not in names)])
