"""Which files of a source are set aside as a whole, where a job allows that: damaged ones, and those unlike others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.common.rows import InputFile, RejectedFile, RowGroup
from pipeline.errors import InputChanged, InputError, SchemaDrift, TooManyRejects
from pipeline.sources.filters.parse import Filter
from pipeline.sources.locate import SourceFile, current_version
from pipeline.sources.parquet.footers import Footer, Layout, digest_footer
from pipeline.sources.parquet.opening import parquet_errors, read_footer
from pipeline.sources.types import plain_type, same_kind

REASON = "file:"
"""How the reasons of rejected files begin; the kind of error follows."""


@dataclass(frozen=True)
class ScreenedFiles:
    """Files whose footers can be read, and those that are set aside."""

    files: tuple[SourceFile, ...]
    usual: SourceFile
    """The first of ``files`` that has the columns that most of them have."""
    rejected: tuple[RejectedFile, ...]


def quarantined_file(
    path: str, error: InputError, *, rows: int | None = None, keys: tuple[tuple[str, str], ...] = ()
) -> RejectedFile:
    """A file as it is set aside for ``error``.

    :param rows: as its footer says, when it can be read.
    """
    found = f": {error.found}" if error.found else ""
    return RejectedFile(path, f"{REASON}{error.kind}", f"{error.message}{found}", rows, keys)


def screen_files(located: Sequence[SourceFile], *, needed: Collection[str] | None) -> ScreenedFiles:
    """Set aside the files whose footers cannot be read, and find one that is like most others.

    :param needed: columns that count; None: all.
    :raises CorruptInput: when no footer can be read: that of the first.
    """
    kinds: dict[str, tuple[tuple[str, str], ...]] = {}
    rejected = []
    for file in located:
        try:
            with _present(file.path):
                schema = read_footer(file).schema.to_arrow_schema()
        except InputError as error:
            rejected.append(quarantined_file(file.path, error, keys=file.keys))
            continue
        columns = [(one.name, str(plain_type(one.type))) for one in schema if needed is None or one.name in needed]
        kinds[file.path] = tuple(sorted(columns))
    if not kinds:
        read_footer(located[0])
    most = Counter(kinds.values()).most_common(1)[0][0]
    files = tuple(file for file in located if file.path in kinds)
    return ScreenedFiles(files, next(file for file in files if kinds[file.path] == most), tuple(rejected))


def recheck_quarantined_file(
    file: RejectedFile,
    *,
    schema: pa.Schema,
    columns: Sequence[str],
    is_all: bool,
    condition: Filter | None,
) -> InputFile | RejectedFile:
    """A file that was set aside as it is now: what there is to read of it, or why it stays aside.

    :param schema: of a source batch; its fields beside ``columns`` are hive keys.
    :param columns: physical columns that are read.
    :param is_all: whether ``columns`` are all that a file may have.
    """
    rows = None
    try:
        with _present(file.path), parquet_errors(file.path):
            size, version = current_version(file.path)
            located = SourceFile(file.path, size, version, file.keys)
            metadata = read_footer(located)
        rows = metadata.num_rows
        found = metadata.schema.to_arrow_schema()
        _check_columns(file.path, found, schema=schema, columns=columns, is_all=is_all)
    except InputError as error:
        return quarantined_file(file.path, error, rows=rows, keys=file.keys)
    keys = pa.schema([field for field in schema if field.name not in columns])
    return input_file(digest_footer(located, metadata, layout=Layout(found), keys=keys, condition=condition), columns)


def check_file_count(files: Sequence[RejectedFile], *, limit: int | None, job: str = "") -> None:
    """Refuse more files that are set aside than are allowed.

    :raises TooManyRejects: with the first of them.
    """
    if limit is None or len(files) <= limit:
        return
    shown = "; ".join(f"{file.path}: {file.message}" for file in files[:2])
    raise TooManyRejects(
        "too many input files were set aside; nothing was published",
        where=f"job {job}" if job else "source.path",
        found=f"{len(files):,} files: {shown}" + ("; …" if len(files) > 2 else ""),
        expected=f"at most {limit:,} (errors.max_files)",
        next_step="mend the files, or raise errors.max_files",
    )


def input_file(footer: Footer, columns: Sequence[str]) -> InputFile:
    """What planning needs of a file, with the bytes of ``columns`` only."""
    plain, packed = footer.group_bytes(columns)
    groups = map(RowGroup, footer.rows.tolist(), plain.tolist(), packed.tolist(), footer.wanted)
    file = footer.file
    return InputFile(
        file.path,
        file.size,
        file.version,
        tuple(groups),
        file.keys,
        done_groups=footer.done_groups,
        mark=footer.mark,
        why=footer.why,
    )


def _check_columns(path: str, found: pa.Schema, *, schema: pa.Schema, columns: Sequence[str], is_all: bool) -> None:
    for name in columns:
        wanted = schema.field(name)
        if found.names.count(name) != 1 or not same_kind(found.field(name).type, wanted.type):
            there = f"of type {found.field(name).type}" if found.names.count(name) == 1 else "not there, or twice"
            raise _drift(path, f"column {name!r} {there}", f"column {name!r} of type {wanted.type}")
    extra = [name for name in found.names if name not in columns]
    if is_all and extra:
        raise _drift(path, f"column {extra[0]!r}", "no such column")


def _drift(path: str, found: str, expected: str) -> SchemaDrift:
    return SchemaDrift("an input file has another schema than was planned", where=path, found=found, expected=expected)


class _present:  # noqa: N801
    """Context in which a file that is gone is an input that changed."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FileNotFoundError):
            raise InputChanged("an input file is gone", where=self.path, found="no such file") from error
