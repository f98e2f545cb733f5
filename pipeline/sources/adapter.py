"""`SourceAdapter`: the protocol of input formats, and functions that find the adapter by name."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Protocol, cast

import numpy as np
import pyarrow as pa

from pipeline.common.plugins import find_adapter
from pipeline.common.rows import Fragment, InputFile, QuarantinedFile
from pipeline.errors import CorruptInput, InputError
from pipeline.sources.batch import HasFragments, SourceBatch
from pipeline.sources.discovery import Discovery, FileSelection, selected_fragments
from pipeline.sources.distinct import Occurrences
from pipeline.sources.filters.parse import Filter
from pipeline.sources.locate import SourceFile
from pipeline.spec.parts import Source

BUILT_IN = {
    "parquet": "pipeline.sources.parquet.source:ParquetSource",
    "csv": "pipeline.sources.text.csv_source:CsvSource",
    "jsonl": "pipeline.sources.text.json_source:JsonLinesSource",
}
SAMPLED_FILES = 8
"""Files that `sample_batch` opens before it gives up."""
SAMPLED_ROWS = 200_000
"""Largest number of rows of a file that `sample_batch` filters."""
SAMPLED_BYTES = 1 << 28
"""Decoded bytes of a file that `sample_batch` reads at most, but at least one row."""


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
        count_nulls: bool = False,
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
        batch_bytes: int = 0,
        versions: Mapping[str, tuple[int, str]] | None = None,
    ) -> Generator[SourceBatch, None, None]:
        """See `read_batches`."""

    def identify(self, file: SourceFile) -> tuple[str, ...]:
        """Return one digest per number of row groups, from 1. Digest n covers all metadata of the first n row groups.

        If a later version of the file has the same digest for n row groups, row groups were only appended.

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
        """Check a quarantined file again. Return an input file if it can be read now, else the new reason.

        :param schema: schema of a source batch; its fields besides ``columns`` are hive keys.
        :param columns: physical columns that are read.
        :param is_all: if True, the file may have no columns besides ``columns``.
        :param condition: row filter that selects row groups.
        """

    def count_rows(self, path: str) -> int:
        """Return the number of rows of a file, from its metadata.

        :raises CorruptInput: if the file cannot be read.
        :raises FileNotFoundError: if the file does not exist.
        """

    def distinct_values(self, discovery: Discovery, column: str, *, limit: int) -> Occurrences:
        """Return the values of a physical column, with the rows and row groups that hold each.

        :raises SpecError: for a type without plain values, or more than ``limit`` values.
        """


def find_source(format_name: str) -> SourceAdapter:
    """Return the adapter for ``source.format``, or for ``source.reader``: ``format?{"option": …}``.

    :raises SpecError: for an unknown format.
    """
    name, _, options = format_name.partition("?")
    adapter = find_adapter(name, kind="source", built_in=BUILT_IN)
    return cast(SourceAdapter, adapter(**(json.loads(options) if options else {})))


def discover(
    source: Source,
    *,
    columns: tuple[str, ...] | None = None,
    planned: Collection[InputFile] | None = None,
    selection: Mapping[str, FileSelection] | None = None,
    quarantine_files: bool = False,
    count_nulls: bool = False,
    threads: int = 16,
) -> Discovery:
    """Find the files of ``source`` and read their metadata.

    :param columns: columns that are needed. Default: ``source.columns``, and without these all columns. Columns that
        are not needed may differ from file to file.
    :param planned: the only files to use, in their planned versions; newer files are ignored.
    :param selection: the only files to score, by path. If empty, the result has the schema alone.
    :param quarantine_files: quarantine files that are damaged, or whose columns differ from most, instead of raising.
    :param count_nulls: find out which columns have no nulls (`Discovery.never_null`).
    :param threads: files whose metadata is read at the same time.
    :raises MissingInput: if there is no file.
    :raises InputChanged: if a file of ``planned`` was changed or removed.
    :raises CorruptInput: for a file of another format, and for a truncated or encrypted file.
    :raises SchemaDrift: for a file whose columns, or their types, differ from those of other files.
    :raises SpecError: if ``source.columns`` or the filter name unknown columns.
    """
    discovery = find_source(source.reader).discover(
        source,
        columns=columns,
        planned=planned,
        selection=selection,
        quarantine_files=quarantine_files,
        count_nulls=count_nulls,
        threads=threads,
    )
    return replace(discovery, format=source.reader)


def read_batches(
    partition: HasFragments | Sequence[Fragment],
    *,
    columns: Sequence[str],
    schema: pa.Schema,
    filter: str | None = None,
    batch_rows: int,
    batch_bytes: int = 0,
    versions: Mapping[str, tuple[int, str]] | None = None,
    format: str = "parquet",
    keep_problems: bool = False,
) -> Generator[SourceBatch, None, None]:
    """Yield the rows of ``partition`` that ``filter`` keeps, at most ``batch_rows`` at a time.

    Small fragments share a batch. The last batch has no rows if only filtered rows are left to count.

    :param columns: physical columns to read; matched by name.
    :param schema: schema of the tables: ``columns`` and the requested hive keys, in this order.
    :param batch_bytes: limit for the decoded bytes of a batch of more than one row; 0: no limit.
    :param versions: planned size and version per path. None: not checked.
    :param format: name of the adapter, with options as in ``source.reader``.
    :param keep_problems: yield rows of text that cannot be read, too; see `SourceBatch.problems`.
    :raises InputChanged: if a file has changed since planning.
    :raises SchemaDrift: if a column is missing or has another type.
    :raises CorruptInput: if a file cannot be read, or holds other rows than its footer says; without
        ``keep_problems`` also for a row that cannot be read.
    :raises StorageError: if storage fails.
    """
    batches = find_source(format).read(
        partition,
        columns=columns,
        schema=schema,
        filter=filter,
        batch_rows=batch_rows,
        batch_bytes=batch_bytes,
        versions=versions,
    )
    if keep_problems:
        return batches
    return _without_problems(batches, partition if isinstance(partition, Sequence) else partition.fragments)


def _without_problems(
    batches: Generator[SourceBatch, None, None], fragments: Sequence[Fragment]
) -> Generator[SourceBatch, None, None]:
    with closing(batches):
        for batch in batches:
            number = next((number for number, problem in enumerate(batch.problems) if problem is not None), None)
            if number is not None:
                problem = batch.problems[number]
                assert problem is not None
                raise CorruptInput(
                    "a row of an input file cannot be read",
                    where=f"{fragments[batch.fragment[number]].path}, row {batch.row[number]}",
                    found=problem.message,
                    expected="values of the column's type",
                    next_step="fix the file, or say the types of its columns: types: {column: string}",
                )
            yield batch


def sample_batch(
    discovery: Discovery,
    *,
    columns: Sequence[str],
    schema: pa.Schema,
    rows: int = 1000,
    skip_unreadable: bool = False,
) -> SourceBatch | None:
    """Return the first rows that the filter keeps, read like on a worker.

    Planning runs the steps on these rows to learn the columns that the steps return.

    :param skip_unreadable: skip a file that is damaged or was changed, instead of raising.
    :returns: at most ``rows`` rows of at most `SAMPLED_BYTES`; None if the first files hold no such row.
    """
    opened = 0
    for file in discovery.files:
        fragments = tuple(_head(fragment) for fragment in selected_fragments(file))[:1]
        if not fragments or opened == SAMPLED_FILES:
            continue
        opened += 1
        fitting = SAMPLED_BYTES * fragments[0].rows // max(fragments[0].bytes, 1)
        batches = read_batches(
            fragments,
            columns=columns,
            schema=schema,
            filter=discovery.filter,
            batch_rows=max(1, min(rows, fitting)),
            batch_bytes=SAMPLED_BYTES,
            versions=discovery.versions,
            format=discovery.format,
            keep_problems=True,
        )
        try:
            with closing(batches):
                batch = next(batches)
        except InputError:
            if not skip_unreadable:
                raise
            continue
        if batch.problems:
            batch = _readable(batch)
        if batch.table.num_rows:
            return batch
    return None


def _readable(batch: SourceBatch) -> SourceBatch:
    """Return the rows of ``batch`` that could be read."""
    keep = np.array([problem is None for problem in batch.problems])
    return SourceBatch(batch.table.filter(pa.array(keep)), batch.fragment[keep], batch.row[keep], batch.filtered)


def _head(fragment: Fragment) -> Fragment:
    stop = min(fragment.row_stop, fragment.row_start + SAMPLED_ROWS)
    size = fragment.bytes * (stop - fragment.row_start) // max(fragment.rows, 1)
    return replace(fragment, row_stop=stop, bytes=size)
