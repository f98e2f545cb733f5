"""The adapter for Parquet files."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence

import pyarrow as pa

from pipeline.common.rows import Fragment, InputFile, QuarantinedFile
from pipeline.sources.batch import HasFragments, SourceBatch
from pipeline.sources.changes import missing_is_removed
from pipeline.sources.discovery import Discovery, FileSelection
from pipeline.sources.distinct import Occurrences
from pipeline.sources.filters.parse import Filter
from pipeline.sources.locate import SourceFile
from pipeline.sources.parquet.discover import discover
from pipeline.sources.parquet.distinct_values import column_values
from pipeline.sources.parquet.footer_guard import FooterGuard, read_unknown_footer
from pipeline.sources.parquet.footers import group_marks
from pipeline.sources.parquet.opening import footer_errors, read_footer
from pipeline.sources.parquet.reader import read_batches
from pipeline.sources.parquet.screening import recheck_file
from pipeline.spec.parts import Source


class ParquetSource:
    """See `pipeline.sources.SourceAdapter`."""

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
        """Find the files and read their footers."""
        return discover(
            source,
            columns=columns,
            planned=planned,
            selection=selection,
            quarantine_files=quarantine_files,
            count_nulls=count_nulls,
            threads=threads,
        )

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
        """Yield rows. Memory depends on the batch size only."""
        return read_batches(
            partition,
            columns=columns,
            schema=schema,
            filter=filter,
            batch_rows=batch_rows,
            batch_bytes=batch_bytes,
            versions=versions,
        )

    def identify(self, file: SourceFile) -> tuple[str, ...]:
        """Return the digests of the footer's row groups."""
        with missing_is_removed(file.path), footer_errors(file.path):
            return group_marks(read_unknown_footer(file.path, FooterGuard(is_digested=True)))

    def recheck(
        self,
        file: QuarantinedFile,
        *,
        schema: pa.Schema,
        columns: Sequence[str],
        is_all: bool,
        condition: Filter | None,
    ) -> InputFile | QuarantinedFile:
        """Check a quarantined file again."""
        return recheck_file(file, schema=schema, columns=columns, is_all=is_all, condition=condition)

    def count_rows(self, path: str) -> int:
        """Return the number of rows that the footer states."""
        return int(read_footer(path).num_rows)

    def distinct_values(self, discovery: Discovery, column: str, *, limit: int) -> Occurrences:
        """Return the values of a column."""
        return column_values(discovery, column, limit=limit)
