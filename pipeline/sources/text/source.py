"""The adapter that formats of text share."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.common.rows import Fragment, InputFile, QuarantinedFile
from pipeline.errors import InputError
from pipeline.sources.batch import HasFragments, SourceBatch
from pipeline.sources.changes import missing_is_changed, missing_is_removed, schema_changed
from pipeline.sources.discovery import Discovery, FileSelection, selected_fragments
from pipeline.sources.distinct import Occurrence, Occurrences, check_count
from pipeline.sources.filters.parse import Filter
from pipeline.sources.locate import SourceFile, current_version
from pipeline.sources.quarantine import quarantined_file
from pipeline.sources.text.discover import TextFile, check_names, discover_text, last_bytes, scan_one
from pipeline.sources.text.files import read_head, text_errors
from pipeline.sources.text.parser import Parser
from pipeline.sources.text.reader import read_text
from pipeline.sources.versions import with_tail
from pipeline.spec.parts import Source


class TextSource:
    """See `pipeline.sources.SourceAdapter`."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser

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
        """Find the files and scan their rows. Text does not say which columns have no nulls."""
        return discover_text(
            source,
            self.parser,
            columns=columns,
            planned=planned,
            selection=selection,
            quarantine_files=quarantine_files,
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
        """Yield rows."""
        return read_text(
            partition,
            self.parser,
            columns=columns,
            schema=schema,
            filter=filter,
            batch_rows=batch_rows,
            batch_bytes=batch_bytes,
            versions=versions,
        )

    def identify(self, file: SourceFile) -> tuple[str, ...]:
        """Return no digest: a text file that changed is new as a whole."""
        with missing_is_removed(file.path), text_errors(file.path):
            current_version(file.path)
        return ()

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
        try:
            with missing_is_changed(file.path), text_errors(file.path):
                size, version = current_version(file.path)
                located = SourceFile(file.path, size, version, file.hive_keys)
                located = replace(located, version=with_tail(version, last_bytes(located)))
                names = self.parser.names(read_head(file.path))
                physical = pa.schema([field for field in schema if field.name in columns])
                check_names(names, physical, path=file.path, like="the plan")
                extra = [name for name in names or () if is_all and name not in columns]
                if extra:
                    raise schema_changed(file.path, found=f"column {extra[0]!r}", expected="no such column")
                groups = scan_one(located, self.parser)
            widths = dict.fromkeys(columns, 1 / max(1, len(columns)))
            return TextFile(located, groups, widths).input_file(columns)
        except InputError as error:
            return quarantined_file(file.path, error, hive_keys=file.hive_keys)

    def count_rows(self, path: str) -> int:
        """Return the number of rows, from a scan of the file."""
        size, version = current_version(path)
        return sum(group.rows for group in scan_one(SourceFile(path, size, version), self.parser))

    def distinct_values(self, discovery: Discovery, column: str, *, limit: int) -> Occurrences:
        """Return the values of a column, read from the files."""
        occurrences: Occurrences = {}
        schema = pa.schema([discovery.schema.field(column)])
        for file in discovery.files:
            ends = np.cumsum([group.rows for group in file.row_groups])
            fragments = tuple(selected_fragments(file))
            batches = self.read(
                fragments, columns=(column,), schema=schema, batch_rows=1 << 16, versions=discovery.versions
            )
            for batch in batches if fragments else ():
                values = batch.table.column(0).to_pylist()
                for value, number in zip(values, np.searchsorted(ends, batch.row, side="right").tolist(), strict=True):
                    occurrence = occurrences.setdefault(value, Occurrence())
                    occurrence.rows += 1
                    occurrence.groups.setdefault(file.path, set()).add(number)
                check_count(len(occurrences), column=column, limit=limit)
        return occurrences
