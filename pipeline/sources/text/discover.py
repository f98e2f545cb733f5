"""Discover the files and columns of a source of text: types from the first file, rows from a scan of all files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.common.rows import InputFile, QuarantinedFile, RowGroup
from pipeline.errors import CorruptInput, InputError, MissingInput, SpecError
from pipeline.sources.changes import missing_is_removed, schema_changed
from pipeline.sources.discovery import Discovery, FileSelection
from pipeline.sources.filters.parse import Filter, parse_filter
from pipeline.sources.hive import key_schema, with_keys
from pipeline.sources.locate import SourceFile, locate, locate_planned
from pipeline.sources.quarantine import quarantined_file
from pipeline.sources.text.files import SAMPLE_BYTES, read_head, scan_files, text_errors
from pipeline.sources.text.parser import Parser
from pipeline.sources.text.scan import last_row_stop
from pipeline.sources.versions import TAIL_BYTES, with_tail
from pipeline.spec.parts import Source
from pipeline.storage.urls import is_local_path

HEAD_BYTES = 1 << 16
"""Bytes at the beginning of each file that hold its header."""


@dataclass(frozen=True)
class TextFile:
    """An input file with the widths of its decoded columns."""

    file: SourceFile
    groups: tuple[RowGroup, ...]
    """Row groups with the bytes of their text."""
    widths: Mapping[str, float]
    """Decoded bytes of a column for a byte of text."""
    reason: str = ""
    """See `pipeline.common.rows.InputFile.reason`."""

    def input_file(self, columns: Sequence[str]) -> InputFile:
        """Return the file for the plan, with the bytes of ``columns`` only."""
        width = sum(self.widths.get(name, 0.0) for name in columns)
        groups = tuple(replace(group, bytes=round(group.bytes * width)) for group in self.groups)
        file = self.file
        return InputFile(file.path, file.size, file.version, groups, file.hive_keys, reason=self.reason)

    def total_bytes(self, columns: Sequence[str]) -> int:
        """Return the decoded bytes of ``columns``."""
        return sum(group.bytes for group in self.input_file(columns).row_groups)

    def narrow(self, groups: Collection[int]) -> TextFile:
        """Return the file with no other row groups selected than ``groups``."""
        chosen = (replace(one, selected=one.selected and n in groups) for n, one in enumerate(self.groups))
        return replace(self, groups=tuple(chosen))


def discover_text(
    source: Source,
    parser: Parser,
    *,
    columns: tuple[str, ...] | None = None,
    planned: Collection[InputFile] | None = None,
    selection: Mapping[str, FileSelection] | None = None,
    quarantine_files: bool = False,
    threads: int = 16,
) -> Discovery:
    """Find the files of ``source`` and their rows; see `pipeline.sources.discover`.

    All columns of a file that can be read belong to the schema: what is not needed costs nothing at planning.
    """
    unusable: list[MissingInput] | None = [] if quarantine_files else None
    if planned is None:
        files = locate(source.path, base=source.base, unusable=unusable)
    else:
        files = locate_planned(source.path, planned, base=source.base)
    keys = key_schema(files)
    if selection is not None:
        files = tuple(file for file in files if file.path in selection) or files[:1]
    first, schema, widths, rejected = _first_columns(files, parser, quarantine_files=quarantine_files)
    whole = with_keys(list(schema), keys)
    condition = parse_filter(source.filter) if source.filter is not None else None
    if condition is not None:
        condition.check(whole)
    schema = _requested(source, columns, schema, whole, condition)
    found: list[TextFile] = []
    usable = [file for file in files if file.path not in {one.path for one in rejected}]
    heads = _with_heads(usable, parser, schema, first=first, quarantined=rejected if quarantine_files else None)
    for file, result in zip(heads, _scans(heads, parser, threads=threads), strict=True):
        if isinstance(result, tuple):
            chosen = selection.get(file.path) if selection else None
            found.append(TextFile(file, result, widths, chosen.reason if chosen else ""))
        elif quarantine_files:
            rejected.append(quarantined_file(file.path, result, hive_keys=file.hive_keys))
        else:
            raise result
    rejected += [quarantined_file(error.where, error) for error in unusable or ()]
    final = with_keys(list(schema), keys)
    own_keys = tuple(name for name in keys.names if name not in first.schema.names)
    return Discovery(
        files=tuple(file.input_file(final.names) for file in found),
        schema=final,
        key_names=own_keys,
        available=(*first.schema.names, *own_keys),
        filter=source.filter,
        rejected=tuple(sorted(rejected, key=lambda one: one.path)),
        measured=tuple(found),
    )


def _requested(
    source: Source, columns: tuple[str, ...] | None, schema: pa.Schema, whole: pa.Schema, condition: Filter | None
) -> pa.Schema:
    """Return the fields of ``schema`` that are needed.

    :param whole: ``schema`` with the hive keys.
    :raises SpecError: for a requested column that does not exist.
    """
    for name in source.columns or ():
        if name not in whole.names:
            raise SpecError(
                "the source has no such column",
                where="source.columns",
                found=name,
                expected=", ".join(whole.names),
                next_step="fix source.columns",
            )
    requested = source.columns if columns is None else columns
    if requested is None:
        return schema
    needed = {*requested, *(condition.columns if condition else ())}
    return pa.schema([field for field in schema if field.name in needed])


def _scans(files: Sequence[SourceFile], parser: Parser, *, threads: int) -> Iterator[tuple[RowGroup, ...] | InputError]:
    """Yield the row groups of each file, or its error."""
    for file, result in zip(
        files, scan_files(files, parser.dialect, has_header=parser.has_header, threads=threads), strict=True
    ):
        try:
            with missing_is_removed(file.path):
                if isinstance(result, Exception):
                    raise result
                yield result
        except InputError as error:
            yield error


@dataclass(frozen=True)
class _First:
    """The file whose columns are those of the source."""

    path: str
    schema: pa.Schema
    names: tuple[str, ...] | None


def _first_columns(
    files: Sequence[SourceFile], parser: Parser, *, quarantine_files: bool
) -> tuple[_First, pa.Schema, dict[str, float], list[QuarantinedFile]]:
    """Return the columns of the first file that has any, the widths of their values, and the files before it.

    :raises InputError: if the first file cannot be read, or with ``quarantine_files`` no file can.
    """
    rejected: list[QuarantinedFile] = []
    for number, file in enumerate(files):
        try:
            with missing_is_removed(file.path):
                head = read_head(file.path)
            if len(head) == SAMPLE_BYTES:
                body = parser.body(head)
                head = head[: body + last_row_stop(head[body:], parser.dialect)] or head
            schema = parser.infer(head, path=file.path)
            return _First(file.path, schema, parser.names(head)), schema, _widths(parser, head, schema), rejected
        except InputError as error:
            if not quarantine_files or number == len(files) - 1:
                raise
            rejected.append(quarantined_file(file.path, error, hive_keys=file.hive_keys))
    raise AssertionError("a source has files")


def _widths(parser: Parser, head: bytes, schema: pa.Schema) -> dict[str, float]:
    data = head[parser.body(head) :]
    table = parser.parse(data, schema, parser.names(head)).table
    return {name: table.column(name).nbytes / max(1, len(data)) for name in schema.names}


def _with_heads(
    files: Sequence[SourceFile],
    parser: Parser,
    schema: pa.Schema,
    *,
    first: _First,
    quarantined: list[QuarantinedFile] | None,
) -> list[SourceFile]:
    """Return the files with the digests of their last bytes; each has the columns of ``schema`` in its header.

    :param quarantined: receives files that lack a column; None: such a file is an error.
    """
    checked = []
    for file in files:
        try:
            with missing_is_removed(file.path):
                names = first.names if file.path == first.path else parser.names(read_head(file.path, HEAD_BYTES))
                check_names(names, schema, path=file.path, like=first.path)
                checked.append(replace(file, version=with_tail(file.identity, last_bytes(file))))
        except InputError as error:
            if quarantined is None:
                raise
            quarantined.append(quarantined_file(file.path, error, hive_keys=file.hive_keys))
    return checked


def check_names(names: Sequence[str] | None, schema: pa.Schema, *, path: str, like: str) -> None:
    """Check that a header has the columns of ``schema``, each once. An empty file needs no header.

    :raises SchemaDrift: for a column that is missing, or there twice.
    """
    if not names:
        return
    for name in schema.names:
        if (times := list(names).count(name)) != 1:
            found = "more than once" if times else f"missing; its columns: {', '.join(names)}"
            raise schema_changed(path, found=f"column {name!r} {found}", expected=f"the columns of {like}")


def last_bytes(file: SourceFile) -> bytes:
    """Return the last bytes of a file, as they are stored, which are part of its version; b"" for remote files."""
    if not is_local_path(file.path):
        return b""
    with text_errors(file.path), open(file.path.removeprefix("file://"), "rb", buffering=0) as raw:
        raw.seek(max(0, file.size - TAIL_BYTES))
        return raw.read(TAIL_BYTES)


def scan_one(file: SourceFile, parser: Parser) -> tuple[RowGroup, ...]:
    """Return the row groups of one file.

    :raises CorruptInput: if its rows cannot be told apart.
    :raises FileNotFoundError: if it does not exist.
    """
    groups = next(scan_files([file], parser.dialect, has_header=parser.has_header, threads=4))
    if isinstance(groups, (CorruptInput, FileNotFoundError)):
        raise groups
    return groups
