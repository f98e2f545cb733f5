"""Parse CSV with pyarrow; rows with too many or too few cells, and cells that do not convert, are found one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from pipeline.common.reasons import ReasonKind
from pipeline.errors import SchemaDrift, SpecError
from pipeline.sources.text.files import BOM, damaged
from pipeline.sources.text.parser import Parsed, Unreadable, given_types, shown, with_gaps
from pipeline.sources.text.scan import Dialect, row_stops
from pipeline.sources.types import empty_table
from pipeline.spec.parts import CsvOptions

_INTEGER, _FLOAT = r"^[ \t]*[+-]?(0[xX][0-9a-fA-F]+|[0-9]+)[ \t]*$", r"^[ \t0-9a-zA-Z.+-]+$"
_BOOLEANS = ("1", "0", "true", "false", "True", "False", "TRUE", "FALSE")


class CsvParser:
    """See `pipeline.sources.text.parser.Parser`."""

    def __init__(self, options: CsvOptions, types: Mapping[str, str]) -> None:
        self.options = options
        self.types = given_types(types)
        quote, escape = options.quote, options.escape
        self.dialect = Dialect(
            None if quote is None else ord(quote), None if escape is None else ord(escape), ord(options.delimiter)
        )
        self.has_header = options.header is True

    def body(self, head: bytes) -> int:
        """Return the offset of the first row."""
        start = len(BOM) if head.startswith(BOM) else 0
        if not self.has_header:
            return start
        stops = row_stops(head[start:], self.dialect)
        return start + (int(stops[0]) if len(stops) else len(head) - start)

    def names(self, head: bytes) -> tuple[str, ...]:
        """Return the columns of a file."""
        if isinstance(self.options.header, tuple):
            return self.options.header
        start = len(BOM) if head.startswith(BOM) else 0
        stops = row_stops(head[start:], self.dialect)
        first = head[start : start + int(stops[0])] if len(stops) else b""
        if not first.strip():
            return ()
        cells = self._read(first, column_types={}, autogenerate=True, as_text=True)
        if self.has_header:
            return tuple(str(column[0].as_py()) for column in cells.columns)
        return tuple(cells.column_names)

    def infer(self, head: bytes, *, path: str) -> pa.Schema:
        """Return the columns of a file, with the types that hold all values of its first rows."""
        names = self.names(head)
        self._check_names(names, path)
        data = head[self.body(head) :]
        if not data.strip():
            kinds = {name: pa.string() for name in names}
        else:
            try:
                table = self._read(data, names=names, column_types=self.types, skip_bad=True)
            except pa.ArrowInvalid:
                table = self._read(data, names=names, column_types={}, skip_bad=True)
            # A column without any value yet may hold anything.
            kinds = {field.name: pa.string() if pa.types.is_null(field.type) else field.type for field in table.schema}
        kinds |= {name: kind for name, kind in self.types.items() if name in kinds}
        return pa.schema([pa.field(name, kinds[name]) for name in names])

    def _check_names(self, names: Sequence[str], path: str) -> None:
        if not names:
            raise damaged(path, "no header, and no row", next_step="remove the file, or say source.csv.header")
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise SchemaDrift(
                "a file has two columns of the same name",
                where=path,
                found=f"column {twice[0]!r} more than once",
                expected="each name once",
                next_step="rename one of them in its header",
            )
        unknown = sorted(set(self.types) - set(names))
        if unknown:
            raise SpecError(
                "source.types names a column that the files do not have",
                where=f"source.types.{unknown[0]}",
                found=", ".join(names),
                expected="names of columns",
                next_step="fix source.types",
            )

    def parse(self, data: bytes, schema: pa.Schema, names: Sequence[str] | None) -> Parsed:
        """Parse whole rows: at once if all can be read, else cell by cell where a column does not convert."""
        assert names is not None
        kinds = {field.name: field.type for field in schema}
        if not data.strip(b"\r\n"):
            return Parsed(empty_table(schema))
        bad: list[Any] = []
        # Without a column of its own, pyarrow tells no number of rows.
        include = schema.names or [names[0]]
        types = kinds if schema.names else {names[0]: pa.binary()}
        try:
            table = self._read(data, names=names, column_types=types, include=include, bad=bad)
            unreadable: list[Unreadable] = []
        except pa.ArrowInvalid:
            bad.clear()
            raw = self._read(
                data, names=names, column_types=dict.fromkeys(include, pa.binary()), include=include, bad=bad
            )
            table, unreadable = _convert(raw, schema)
        if bad:
            # pyarrow numbers rows from 1, without empty lines.
            gaps = [row.number - 1 for row in bad]
            rows = table.num_rows + len(gaps)
            places = np.delete(np.arange(rows), gaps)
            unreadable = [
                Unreadable(int(places[one.row]), one.kind, one.column, one.expected, one.found) for one in unreadable
            ]
            unreadable += [
                Unreadable(gap, ReasonKind.LINE, "", "columns", f"{row.actual_columns} cells, not {len(names)}")
                for gap, row in zip(gaps, bad, strict=True)
            ]
            table = with_gaps(table, gaps, rows)
        first = {one.row: one for one in reversed(unreadable)}
        return Parsed(table.select(schema.names) if schema.names else table, tuple(first[row] for row in sorted(first)))

    def _read(
        self,
        data: bytes,
        *,
        column_types: Mapping[str, pa.DataType],
        names: Sequence[str] | None = None,
        include: Sequence[str] | None = None,
        bad: list[Any] | None = None,
        autogenerate: bool = False,
        as_text: bool = False,
        skip_bad: bool = False,
    ) -> pa.Table:
        options = self.options

        def handle(row: Any) -> str:
            if bad is not None:
                bad.append(row)
            return "skip" if bad is not None or skip_bad else "error"

        return pcsv.read_csv(
            pa.py_buffer(data),
            read_options=pcsv.ReadOptions(
                use_threads=False,
                block_size=len(data) + 1,
                column_names=None if names is None else list(names),
                autogenerate_column_names=autogenerate,
            ),
            parse_options=pcsv.ParseOptions(
                delimiter=options.delimiter,
                quote_char=options.quote if options.quote is not None else False,
                double_quote=True,
                escape_char=options.escape if options.escape is not None else False,
                newlines_in_values=True,
                invalid_row_handler=handle,
            ),
            convert_options=pcsv.ConvertOptions(
                check_utf8=True,
                column_types=dict(column_types),
                include_columns=None if include is None else list(include),
                null_values=[] if as_text else list(options.nulls),
                strings_can_be_null=not as_text,
                quoted_strings_can_be_null=False,
            ),
        )


def _convert(raw: pa.Table, schema: pa.Schema) -> tuple[pa.Table, list[Unreadable]]:
    """Return columns of cells in their types, and the cells that do not convert, which are null."""
    columns, unreadable = [], []
    for field in schema:
        cells = raw.column(field.name).combine_chunks()
        cells = pa.concat_arrays(cells.chunks) if isinstance(cells, pa.ChunkedArray) else cells
        column, failed = _convert_column(cells, field.type)
        columns.append(column)
        for row in failed.tolist():
            text = shown(cells[row].as_py().decode(errors="backslashreplace"))
            unreadable.append(
                Unreadable(row, ReasonKind.CELL, field.name, str(field.type), f"{text} is no {field.type}")
            )
    return pa.table(columns, schema=schema), unreadable


def _convert_column(cells: pa.Array, kind: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """Return the values of ``cells``, and int64 [failed]: the positions of those that do not convert."""
    valid = np.flatnonzero(np.asarray(cells.is_valid()))
    texts, valid, failed = _decode(cells, valid)
    if not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
        plausible = _plausible(texts, kind)
        failed = np.concatenate([failed, valid[~plausible]])
        texts, valid = texts.filter(pa.array(plausible)), valid[plausible]
        good, values = _convert_some(texts, kind)
        failed = np.concatenate([failed, valid[~good]])
        valid = valid[good]
    else:
        values = texts.cast(kind)
    places = np.zeros(len(cells), np.int64)
    places[valid] = np.arange(len(valid))
    missing = np.ones(len(cells), bool)
    missing[valid] = False
    return values.take(pa.array(places, mask=missing)), np.sort(failed)


def _decode(cells: pa.Array, valid: np.ndarray) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Return the texts of the valid cells that are UTF-8, their positions, and those of the other valid cells."""
    chosen = cells.take(pa.array(valid))
    try:
        return chosen.cast(pa.string()), valid, np.empty(0, np.int64)
    except pa.ArrowInvalid:
        good = np.array([_is_utf8(cell.as_py()) for cell in chosen], bool)
        return chosen.filter(pa.array(good)).cast(pa.string()), valid[good], valid[~good]


def _is_utf8(cell: bytes) -> bool:
    try:
        cell.decode()
    except UnicodeDecodeError:
        return False
    return True


def _plausible(texts: pa.Array, kind: pa.DataType) -> np.ndarray:
    """Return bool [texts]: False for most of those that do not convert, which saves the search for them."""
    if pa.types.is_integer(kind):
        return np.asarray(pc.match_substring_regex(texts, _INTEGER))
    if pa.types.is_floating(kind):
        return np.asarray(pc.match_substring_regex(texts, _FLOAT))
    if pa.types.is_boolean(kind):
        return np.asarray(pc.is_in(texts, pa.array(_BOOLEANS)))
    return np.ones(len(texts), bool)


def _convert_some(texts: pa.Array, kind: pa.DataType) -> tuple[np.ndarray, pa.Array]:
    """Return bool [texts]: True for those that convert, and their values. Halves the texts until each part does."""
    good, parts = np.zeros(len(texts), bool), [pa.array([], kind)]
    waiting = [(0, len(texts))]
    while waiting:
        start, stop = waiting.pop()
        try:
            parts.append(_convert_all(texts.slice(start, stop - start), kind))
            good[start:stop] = True
        except pa.ArrowInvalid:
            if stop - start > 1:
                middle = (start + stop) // 2
                waiting += [(middle, stop), (start, middle)]
    return good, pa.concat_arrays(parts)


def _convert_all(texts: pa.Array, kind: pa.DataType) -> pa.Array:
    if not len(texts):
        return pa.array([], kind)
    doubled = pc.replace_substring(texts, '"', '""')
    data = '"' + '"\n"'.join(doubled.to_pylist()) + '"\n'
    column = pcsv.read_csv(
        pa.py_buffer(data.encode()),
        read_options=pcsv.ReadOptions(use_threads=False, block_size=len(data) * 4 + 1, column_names=["x"]),
        parse_options=pcsv.ParseOptions(newlines_in_values=True),
        convert_options=pcsv.ConvertOptions(column_types={"x": kind}, null_values=[], quoted_strings_can_be_null=False),
    ).column(0)
    return pa.concat_arrays(column.chunks)
