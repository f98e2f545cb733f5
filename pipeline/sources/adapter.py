"""`SourceAdapter`: the protocol of input formats, and the calls that find the adapter by name."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Protocol, cast

import pyarrow as pa

from pipeline.common.plugins import find_adapter
from pipeline.common.rows import Fragment, InputFile, QuarantinedFile
from pipeline.errors import InputError
from pipeline.sources.batch import HasFragments, SourceBatch
from pipeline.sources.discovery import Discovery, FileSelection, selected_fragments
from pipeline.sources.distinct import Occurrences
from pipeline.sources.filters.parse import Filter
from pipeline.sources.locate import SourceFile
from pipeline.spec.parts import Source

BUILT_IN = {"parquet": "pipeline.sources.parquet.source:ParquetSource"}
SAMPLED_FILES = 8
"""Files that `sample_batch` opens before it gives up."""
SAMPLED_ROWS = 200_000
"""Rows of a file that `sample_batch` filters at most."""


class SourceAdapter(Protocol):
    """One format of input files."""

    def discover(
        self,
        source: Source,
        *,
        columns: tuple[str, ...] | None = None,
        planned: Collection[InputFile] | None = None,
        selection: Mapping[str, FileSelection] | None = None,
        quarantine_files: bool = False,
        threads: int = 16,
    ) -> Discovery:
        """See `discover`."""

    def read(
        self,
        partition: HasFragments | Sequence[Fragment],
        *,
        columns: Sequence[str],
        schema: pa.Schema,
        filter: str | None = None,
        batch_rows: int,
        versions: Mapping[str, tuple[int, str]] | None = None,
    ) -> Generator[SourceBatch, None, None]:
        """See `read_batches`."""

    def identify(self, file: SourceFile) -> tuple[str, ...]:
        """Return a digest for each number of row groups, from 1: of all metadata of the first so many of them.

        If a later version of the file begins with the same digest, row groups were only appended.

        :raises CorruptInput: if the file cannot be read.
        """

    def recheck(
        self,
        file: QuarantinedFile,
        *,
        schema: pa.Schema,
        columns: Sequence[str],
        is_all: bool,
        condition: Filter | None,
    ) -> InputFile | QuarantinedFile:
        """Check again a file that was quarantined. Return it as input if it can be read now, else with the new reason.

        :param schema: of a source batch; its fields besides ``columns`` are hive keys.
        :param columns: physical columns that are read.
        :param is_all: whether the file may have no columns besides ``columns``.
        :param condition: row filter that selects row groups.
        """

    def count_rows(self, path: str) -> int:
        """Return the number of rows of a file, from its metadata.

        :raises CorruptInput: if the file cannot be read.
        :raises FileNotFoundError: if it is gone.
        """

    def distinct_values(self, discovery: Discovery, column: str, *, limit: int) -> Occurrences:
        """Return the values of a physical column, with the rows and row groups that hold each.

        :raises SpecError: for a type without plain values, or more than ``limit`` values.
        """


def find_source(format_name: str) -> SourceAdapter:
    """Return the adapter for ``source.format``.

    :raises SpecError: if there is none.
    """
    return cast(SourceAdapter, find_adapter(format_name, kind="source", built_in=BUILT_IN)())


def discover(
    source: Source,
    *,
    columns: tuple[str, ...] | None = None,
    planned: Collection[InputFile] | None = None,
    selection: Mapping[str, FileSelection] | None = None,
    quarantine_files: bool = False,
    threads: int = 16,
) -> Discovery:
    """Find the files of ``source`` and read their metadata.

    :param columns: the only columns that will be needed; default ``source.columns``, and with neither all. Columns that
        are not needed may differ from file to file.
    :param planned: the only files to use, as they were planned; others may have come since.
    :param selection: the only files to score, by path, and how. If empty, the result has the schema alone.
    :param quarantine_files: quarantine files that are damaged, or have other columns than most, instead of raising.
    :param threads: files whose metadata is read at the same time.
    :raises MissingInput: if there is no file.
    :raises InputChanged: if a file of ``planned`` was changed or removed.
    :raises CorruptInput: for a file of another format, a truncated or an encrypted one.
    :raises SchemaDrift: for a file that has other columns than the others, or a column of another type.
    :raises SpecError: if ``source.columns`` or the filter name unknown columns.
    """
    discovery = find_source(source.format).discover(
        source,
        columns=columns,
        planned=planned,
        selection=selection,
        quarantine_files=quarantine_files,
        threads=threads,
    )
    return replace(discovery, format=source.format)


def read_batches(
    partition: HasFragments | Sequence[Fragment],
    *,
    columns: Sequence[str],
    schema: pa.Schema,
    filter: str | None = None,
    batch_rows: int,
    versions: Mapping[str, tuple[int, str]] | None = None,
    format: str = "parquet",
) -> Generator[SourceBatch, None, None]:
    """Yield the rows of ``partition`` that ``filter`` keeps, at most ``batch_rows`` at a time.

    Small fragments share a batch. The last batch has no rows if only filtered rows are left to count.

    :param columns: physical columns to read; matched by name.
    :param schema: of the tables: ``columns`` and the requested hive keys, in its order.
    :param versions: size and version per path, as planned. None: not checked.
    :param format: name of the adapter.
    :raises InputChanged: if a file is not the planned one.
    :raises SchemaDrift: if a column is missing or has another type.
    :raises CorruptInput: if a file cannot be read, or holds other rows than its footer says.
    :raises StorageError: if storage fails.
    """
    return find_source(format).read(
        partition, columns=columns, schema=schema, filter=filter, batch_rows=batch_rows, versions=versions
    )


def sample_batch(
    discovery: Discovery,
    *,
    columns: Sequence[str],
    schema: pa.Schema,
    rows: int = 1000,
    skip_unreadable: bool = False,
) -> SourceBatch | None:
    """Return the first rows that the filter keeps, as a worker would read them; used to learn what the steps return.

    :param skip_unreadable: continue with the next file if one is damaged or was changed, instead of raising.
    :returns: at most ``rows`` rows; None if the first files hold no such row.
    """
    opened = 0
    for file in discovery.files:
        fragments = tuple(_head(fragment) for fragment in selected_fragments(file))[:1]
        if not fragments or opened == SAMPLED_FILES:
            continue
        opened += 1
        batches = read_batches(
            fragments,
            columns=columns,
            schema=schema,
            filter=discovery.filter,
            batch_rows=rows,
            versions=discovery.versions,
            format=discovery.format,
        )
        try:
            with closing(batches):
                batch = next(batches)
        except InputError:
            if not skip_unreadable:
                raise
            continue
        if batch.table.num_rows:
            return batch
    return None


def _head(fragment: Fragment) -> Fragment:
    return replace(fragment, row_stop=min(fragment.row_stop, fragment.row_start + SAMPLED_ROWS))
