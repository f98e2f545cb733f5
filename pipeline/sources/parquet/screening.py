"""Screen the files of a source: quarantine unreadable files, and check quarantined files again later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.common.rows import InputFile, QuarantinedFile
from pipeline.errors import InputError
from pipeline.sources.changes import missing_is_changed, missing_is_removed, schema_changed
from pipeline.sources.filters.parse import Filter
from pipeline.sources.locate import SourceFile, current_version
from pipeline.sources.parquet.footer_guard import FooterGuard, read_unknown_footer
from pipeline.sources.parquet.footers import Layout, digest_footer
from pipeline.sources.parquet.opening import arrow_schema, footer_errors, last_bytes, parquet_errors
from pipeline.sources.quarantine import quarantined_file
from pipeline.sources.types import plain_type, same_kind
from pipeline.sources.versions import with_tail


@dataclass(frozen=True)
class ScreenedFiles:
    """The files with readable footers, and the quarantined files."""

    files: tuple[SourceFile, ...]
    usual: SourceFile
    """First of ``files`` with the most common columns."""
    rejected: tuple[QuarantinedFile, ...]


def screen_files(located: Sequence[SourceFile], *, needed: Collection[str] | None, guard: FooterGuard) -> ScreenedFiles:
    """Quarantine the files whose footers cannot be read, and find a file with the most common columns.

    :param needed: columns to compare; None: all.
    :param guard: a child process that tries each footer first.
    :raises CorruptInput: for the first file, if no footer can be read.
    """
    kinds: dict[str, tuple[tuple[str, str], ...]] = {}
    rejected = []
    for file in located:
        try:
            with missing_is_removed(file.path), footer_errors(file.path):
                schema = arrow_schema(read_unknown_footer(file.path, guard), path=file.path)
        except InputError as error:
            rejected.append(quarantined_file(file.path, error, hive_keys=file.hive_keys))
            continue
        fields = [field for field in schema if needed is None or field.name in needed]
        columns = [(field.name, str(plain_type(field.type))) for field in fields]
        kinds[file.path] = tuple(sorted(columns))
    if not kinds:
        with missing_is_removed(located[0].path), footer_errors(located[0].path):
            arrow_schema(read_unknown_footer(located[0].path, guard), path=located[0].path)
    most = Counter(kinds.values()).most_common(1)[0][0]
    files = tuple(file for file in located if file.path in kinds)
    return ScreenedFiles(files, next(file for file in files if kinds[file.path] == most), tuple(rejected))


def recheck_file(
    file: QuarantinedFile,
    *,
    schema: pa.Schema,
    columns: Sequence[str],
    is_all: bool,
    condition: Filter | None,
) -> InputFile | QuarantinedFile:
    """Check a quarantined file again; see `pipeline.sources.adapter.SourceAdapter.recheck`."""
    rows = None
    try:
        with missing_is_changed(file.path), parquet_errors(file.path):
            size, version = current_version(file.path)
            guard = FooterGuard(tuple(condition.columns) if condition else ())
            metadata = read_unknown_footer(file.path, guard)
            tail = last_bytes(file.path)
        located = SourceFile(file.path, size, with_tail(version, tail), file.hive_keys)
        rows = metadata.num_rows
        keys = pa.schema([field for field in schema if field.name not in columns])
        with footer_errors(file.path):
            actual = arrow_schema(metadata, path=file.path)
            _check_columns(file.path, actual, schema=schema, columns=columns, is_all=is_all)
            footer = digest_footer(located, metadata, layout=Layout(actual), keys=keys, condition=condition)
            return footer.input_file(columns)
    except InputError as error:
        return quarantined_file(file.path, error, rows=rows, hive_keys=file.hive_keys)


def _check_columns(path: str, actual: pa.Schema, *, schema: pa.Schema, columns: Sequence[str], is_all: bool) -> None:
    for name in columns:
        planned = schema.field(name)
        times = actual.names.count(name)
        if times != 1 or not same_kind(actual.field(name).type, planned.type):
            found = f"of type {actual.field(name).type}" if times == 1 else "missing" if not times else "more than once"
            raise schema_changed(
                path, found=f"column {name!r} {found}", expected=f"column {name!r} of type {planned.type}"
            )
    extra = [name for name in actual.names if name not in columns]
    if is_all and extra:
        raise schema_changed(path, found=f"column {extra[0]!r}", expected="no such column")
