"""Find the columns of a Parquet source that have no nulls, from the statistics of its row groups."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.locate import HIVE_NULL, SourceFile
from pipeline.sources.parquet.footers import Layout


class NullCounts:
    """The columns of integers and booleans that have shown no null so far. Thread-safe.

    Only these types have no room for nulls in NumPy. A column is dropped at its first null or missing statistic, and
    never looked at again, so that counting costs little where there are nulls.
    """

    def __init__(self, schema: pa.Schema) -> None:
        """Begin with all columns of ``schema``, hive keys included."""
        fields = (field for field in schema if pa.types.is_integer(field.type) or pa.types.is_boolean(field.type))
        self._never_null = frozenset(field.name for field in fields)
        self._lock = threading.Lock()

    def add(self, file: SourceFile, metadata: pq.FileMetaData, *, layout: Layout, selected: Sequence[bool]) -> None:
        """Count the nulls of a file.

        :param layout: layout of the file's columns.
        :param selected: per row group: False if it is not read.
        """
        nulls = {name for name, text in file.hive_keys if text == HIVE_NULL and name not in layout.names}
        groups = [metadata.row_group(number) for number, is_read in enumerate(selected) if is_read]
        for name in self._never_null.intersection(layout.names):
            leaf = int(np.searchsorted(layout.owners, layout.names.index(name)))
            if metadata.schema.column(leaf).max_definition_level and any(_may_be_null(group, leaf) for group in groups):
                nulls.add(name)
        if nulls:
            with self._lock:
                self._never_null -= nulls

    @property
    def never_null(self) -> frozenset[str]:
        """Columns without nulls in all files."""
        return self._never_null


def _may_be_null(group: pq.RowGroupMetaData, leaf: int) -> bool:
    statistics = group.column(leaf).statistics
    return statistics is None or not statistics.has_null_count or statistics.null_count > 0
