"""Parse JSON Lines with pyarrow; lines that are no JSON, or hold values of other types, are found one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.json as pjson

from pipeline.common.reasons import ReasonKind
from pipeline.sources.text.files import BOM, damaged
from pipeline.sources.text.parser import Parsed, Unreadable, given_types, shown, with_gaps
from pipeline.sources.text.scan import LINES, row_stops
from pipeline.sources.types import empty_table


class JsonLinesParser:
    """See `pipeline.sources.text.parser.Parser`."""

    dialect = LINES
    has_header = False

    def __init__(self, types: Mapping[str, str]) -> None:
        self.types = given_types(types)

    def body(self, head: bytes) -> int:
        """Return the offset of the first row."""
        return len(BOM) if head.startswith(BOM) else 0

    def names(self, head: bytes) -> None:
        """Return None: each object names its own members."""

    def infer(self, head: bytes, *, path: str) -> pa.Schema:
        """Return the members of the first objects, with the types that hold all their values."""
        lines = _objects(head[self.body(head) :])
        readable = [line for line in lines if isinstance(_loaded(line), dict)]
        if not readable:
            found = shown(lines[0].decode(errors="backslashreplace")) if lines else "no line"
            raise damaged(path, found, next_step="remove the file, or fix source.format")
        if self.types:
            given = _line_by_line(readable, pa.schema(list(self.types.items())))
            bad = {one.row for one in given.unreadable}
            readable = [line for number, line in enumerate(readable) if number not in bad] or readable
        try:
            schema = _read(b"\n".join(readable), None, self.types).schema
        except pa.ArrowInvalid as error:
            raise damaged(
                path, str(error), next_step="write values of one type in each member, or say it in source.types"
            ) from error
        fields = [field.with_type(_typed(field.type)) for field in schema]
        fields = [field.with_type(self.types.get(field.name, field.type)) for field in fields]
        unknown = [pa.field(name, kind) for name, kind in self.types.items() if name not in schema.names]
        return pa.schema([*fields, *unknown])

    def parse(self, data: bytes, schema: pa.Schema, names: Sequence[str] | None) -> Parsed:
        """Parse whole lines: at once if all can be read, else in halves down to the lines that cannot."""
        stops = row_stops(data, self.dialect)
        rows = len(stops)
        if not rows:
            return Parsed(empty_table(schema))
        try:
            table = _read(data, schema, {})
            if table.num_rows == rows:
                return Parsed(_select(table, schema))
        except pa.ArrowInvalid:
            pass
        return _line_by_line(_objects(data), schema)


def _line_by_line(lines: list[bytes], schema: pa.Schema) -> Parsed:
    unreadable: list[Unreadable] = []
    objects = []
    for number, line in enumerate(lines):
        if isinstance(_loaded(line), dict):
            objects.append(number)
        else:
            text = shown(line.decode(errors="backslashreplace").strip())
            unreadable.append(Unreadable(number, ReasonKind.LINE, "", "json", f"{text} is no JSON object"))
    tables, waiting = [empty_table(schema)], [objects]
    while waiting:
        chosen = waiting.pop()
        if not chosen:
            continue
        try:
            tables.append(_select(_read(b"\n".join(lines[number] for number in chosen), schema, {}), schema))
        except pa.ArrowInvalid as error:
            if len(chosen) > 1:
                middle = len(chosen) // 2
                waiting += [chosen[middle:], chosen[:middle]]
            else:
                unreadable.append(_bad_member(lines[chosen[0]], chosen[0], schema, error))
    gaps = sorted(one.row for one in unreadable)
    table = with_gaps(pa.concat_tables(tables).combine_chunks(), gaps, len(lines))
    return Parsed(table, tuple(sorted(unreadable, key=lambda one: one.row)))


def _bad_member(line: bytes, row: int, schema: pa.Schema, error: Exception) -> Unreadable:
    """Return the member of an object that does not convert."""
    for field in schema:
        try:
            _read(line, pa.schema([field]), {})
        except pa.ArrowInvalid:
            text = shown(json.dumps(json.loads(line).get(field.name), ensure_ascii=False))
            return Unreadable(row, ReasonKind.CELL, field.name, str(field.type), f"{text} is no {field.type}")
    return Unreadable(row, ReasonKind.LINE, "", "json", str(error))


def _objects(data: bytes) -> list[bytes]:
    starts = row_stops(data, LINES)
    return [data[a:b].strip() for a, b in zip(np.append(0, starts[:-1]).tolist(), starts.tolist(), strict=True)]


def _loaded(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _read(data: bytes, schema: pa.Schema | None, types: Mapping[str, pa.DataType]) -> pa.Table:
    if schema is None and types:
        schema = pa.schema(list(types.items()))
        unexpected = "infer"
    else:
        unexpected = "infer" if schema is None else "ignore"
    return pjson.read_json(
        pa.py_buffer(data),
        read_options=pjson.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=pjson.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected),
    )


def _select(table: pa.Table, schema: pa.Schema) -> pa.Table:
    return table.select(schema.names).cast(schema) if schema.names else pa.table({"": pa.nulls(table.num_rows)})


def _typed(kind: pa.DataType) -> pa.DataType:
    """Return ``kind`` with text in place of the type of members that have only been null so far."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_typed(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_typed(field.type)) for field in kind])
    return kind
