"""Reduce the footers of Parquet files to the figures that planning needs."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.rows import InputFile, RowGroup
from pipeline.sources.filters.parse import Filter
from pipeline.sources.filters.prune import Bounds
from pipeline.sources.locate import SourceFile, hive_value

SMALL_FILE_BYTES = 1 << 20
"""Files up to this size are small: a partition holds many of them."""
SAMPLED_FILES = 64
"""Approximate number of small files whose columns are measured, if there are many."""


class Shares:
    """The share of each column in the bytes of one file, or of many small files with the same columns."""

    def __init__(self, columns: int) -> None:
        self._plain, self._packed = np.zeros(columns), np.zeros(columns)
        self._lock = threading.Lock()

    def measure(self, groups: list[Any], owners: np.ndarray) -> None:
        """Add the bytes of up to three row groups of a file.

        :param owners: see `Layout.owners`.
        """
        count = len(self._plain)
        for number in sorted({0, len(groups) // 2, len(groups) - 1} if groups else ()):
            chunks = [groups[number].column(leaf) for leaf in range(min(len(owners), groups[number].num_columns))]
            own = owners[: len(chunks)]
            plain = np.bincount(own, [chunk.total_uncompressed_size for chunk in chunks], count)
            packed = np.bincount(own, [chunk.total_compressed_size for chunk in chunks], count)
            with self._lock:
                self._plain += plain
                self._packed += packed

    @property
    def weights(self) -> np.ndarray:
        """float64 [columns]: share of each column in the uncompressed bytes; equal shares if nothing was measured."""
        total = self._plain.sum()
        return self._plain / total if total else np.full(len(self._plain), 1.0 / max(len(self._plain), 1))

    @property
    def packed(self) -> np.ndarray:
        """float64 [columns]: compressed / uncompressed bytes of each column."""
        return self._packed / np.maximum(self._plain, 1.0)


class SmallFiles:
    """Many small files with the same columns. Only a sample of the files is measured.

    Measuring each file would take a quarter of its planning time.
    """

    def __init__(self, files: Sequence[SourceFile], *, columns: int) -> None:
        small = [file.path for file in files if file.size <= SMALL_FILE_BYTES]
        step = len(small) // SAMPLED_FILES
        self._shares = Shares(columns)
        self._small = frozenset(small) if step > 1 else frozenset()
        self._measured = frozenset(small[::step] if step > 1 else ())

    def is_measured(self, file: SourceFile) -> bool:
        """True if the columns of ``file`` are measured: it is large, or in the sample."""
        return file.path not in self._small or file.path in self._measured

    def shares(self, file: SourceFile, groups: list[Any], layout: Layout) -> Shares | None:
        """Return the shares of all small files, after measuring ``file`` if it is in the sample.

        None if ``file`` is not small, or there are too few small files for a sample.
        """
        if file.path not in self._small:
            return None
        if file.path in self._measured:
            self._shares.measure(groups, layout.owners)
        return self._shares


@dataclass(frozen=True, slots=True)
class Footer:
    """The reduced content of a footer. Its memory grows with row groups + columns, not with their product."""

    file: SourceFile
    rows: np.ndarray
    """int64 [groups]: rows of each row group."""
    totals: np.ndarray
    """int64 [groups]: uncompressed bytes of all columns."""
    names: tuple[str, ...]
    """Columns of the file, in file order."""
    shares: Shares
    """Share of each column in ``totals``."""
    widths: np.ndarray
    """float64 [columns]: bytes of a decoded value if its width is fixed, else 0."""
    selected: tuple[bool, ...]
    """Per row group: True if the filter could keep a row of the group."""
    footer_digest: str = ""
    """See `pipeline.common.rows.InputFile.footer_digest`."""
    published_row_groups: int = 0
    """See `pipeline.common.rows.InputFile.published_row_groups`."""
    reason: str = ""
    """See `pipeline.common.rows.InputFile.reason`."""

    def group_bytes(self, columns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the uncompressed and compressed bytes of ``columns``, int64 [groups] each.

        Values of a fixed width count with at least this width, even if encoded shorter: they need it in memory.
        """
        chosen = _positions(self.names, tuple(columns))
        encoded = np.outer(self.totals, self.shares.weights[chosen])
        decoded = np.maximum(encoded, np.outer(self.rows, self.widths[chosen]))
        return decoded.sum(axis=1).astype(np.int64), (encoded @ self.shares.packed[chosen]).astype(np.int64)

    def total_bytes(self, columns: Sequence[str]) -> int:
        """Return the uncompressed bytes of ``columns``, estimated as in `group_bytes`."""
        return int(self.group_bytes(columns)[0].sum())

    def input_file(self, columns: Sequence[str]) -> InputFile:
        """Return the file for the plan, with the bytes of ``columns`` only."""
        plain, packed = self.group_bytes(columns)
        groups = map(RowGroup, self.rows.tolist(), plain.tolist(), packed.tolist(), self.selected)
        file = self.file
        return InputFile(
            file.path,
            file.size,
            file.version,
            tuple(groups),
            file.hive_keys,
            published_row_groups=self.published_row_groups,
            footer_digest=self.footer_digest,
            reason=self.reason,
        )

    def narrow(self, groups: Collection[int]) -> Footer:
        """Return the footer with no other row groups selected than ``groups``."""
        return replace(self, selected=tuple(one and number in groups for number, one in enumerate(self.selected)))


@lru_cache(maxsize=8)
def _positions(names: tuple[str, ...], columns: tuple[str, ...]) -> list[int]:
    """Return the positions in ``names`` of the known ``columns``. Cached, because most files have the same columns."""
    places = {name: number for number, name in reversed(list(enumerate(names)))}
    return [places[name] for name in columns if name in places]


@dataclass(frozen=True)
class Layout:
    """The mapping of a file's Arrow columns to its Parquet columns, shared by all files of the same schema."""

    schema: pa.Schema

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Arrow columns."""
        return tuple(self.schema.names)

    @cached_property
    def owners(self) -> np.ndarray:
        """int64 [Parquet columns]: the Arrow column to which each belongs."""
        return np.repeat(np.arange(len(self.schema)), [_leaves(field.type) for field in self.schema])

    @cached_property
    def widths(self) -> np.ndarray:
        """float64 [Arrow columns]: see `Footer.widths`."""
        return np.array([_width(field.type) for field in self.schema], float)


def group_marks(metadata: pq.FileMetaData) -> tuple[str, ...]:
    """Return one digest per number of row groups, from 1. Digest n covers all metadata of the first n row groups.

    Writers that append to a file keep the existing row groups in place and write a new footer.
    """
    running, marks = hashlib.sha256(), []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number).to_dict()
        running.update(json.dumps(group, sort_keys=True, default=str).encode())
        marks.append(running.hexdigest())
    return tuple(marks)


def digest_footer(
    file: SourceFile,
    metadata: pq.FileMetaData,
    *,
    layout: Layout,
    keys: pa.Schema,
    condition: Filter | None,
    small: SmallFiles | None = None,
) -> Footer:
    """Reduce ``metadata`` to the figures that planning needs.

    :param keys: fields of the hive keys.
    :param small: small files of the same layout, which are measured by sample.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    shares = small.shares(file, groups, layout) if small else None
    if shares is None:
        shares = Shares(len(layout.schema))
        shares.measure(groups, layout.owners)
    return Footer(
        file=file,
        rows=np.array([group.num_rows for group in groups], np.int64),
        totals=np.array([group.total_byte_size for group in groups], np.int64),
        names=layout.names,
        shares=shares,
        widths=layout.widths,
        selected=_selected(file, groups, layout=layout, keys=keys, condition=condition),
    )


def _leaves(arrow_type: pa.DataType) -> int:
    """Return the number of adjacent Parquet columns that store an Arrow column."""
    if isinstance(arrow_type, pa.BaseExtensionType):
        return _leaves(arrow_type.storage_type)
    if pa.types.is_dictionary(arrow_type):
        return _leaves(arrow_type.value_type)
    leaves = sum(_leaves(arrow_type.field(child).type) for child in range(arrow_type.num_fields))
    return leaves if pa.types.is_nested(arrow_type) else 1


def _width(arrow_type: pa.DataType) -> float:
    if pa.types.is_dictionary(arrow_type):
        return _width(arrow_type.index_type)
    try:
        return float(arrow_type.bit_width / 8)
    except ValueError:
        return 0.0


def _selected(
    file: SourceFile, groups: list[Any], *, layout: Layout, keys: pa.Schema, condition: Filter | None
) -> tuple[bool, ...]:
    if condition is None:
        return (True,) * len(groups)
    bounds = {}
    for name, text in file.hive_keys:
        if name in keys.names and name in condition.columns:
            arrow_type = keys.field(name).type
            value = hive_value(text, arrow_type)
            bounds[name] = Bounds(arrow_type, value, value, nulls=value is None, only_nulls=value is None)
    if not condition.may_keep(bounds):
        return (False,) * len(groups)
    columns = _flat_columns(groups, layout, condition)
    return tuple(
        condition.may_keep({**bounds, **{name: _bounds(group, leaf, kind) for name, (leaf, kind) in columns.items()}})
        for group in groups
    )


def _flat_columns(groups: list[Any], layout: Layout, condition: Filter) -> dict[str, tuple[int, pa.DataType]]:
    """Return Parquet column and type of each column of the filter that is stored in one Parquet column of its name."""
    columns = {}
    for number in (layout.names.index(name) for name in condition.columns if name in layout.names):
        leaf = int(np.searchsorted(layout.owners, number))
        name = layout.names[number]
        if groups and groups[0].column(leaf).path_in_schema == name:
            columns[name] = (leaf, layout.schema.field(number).type)
    return columns


def _bounds(group: Any, leaf: int, arrow_type: pa.DataType) -> Bounds:
    statistics = group.column(leaf).statistics
    if statistics is None:
        return Bounds(arrow_type)
    nulls = statistics.null_count if statistics.has_null_count else None
    low = high = None
    # Python's times end at microseconds; the bounds of float16 are bytes.
    is_cut = arrow_type == pa.time64("ns") or pa.types.is_float16(arrow_type)
    if statistics.has_min_max and not is_cut:
        try:
            low, high = statistics.min, statistics.max
            if isinstance(low, float) and (math.isnan(low) or math.isnan(high)):
                low = high = None
        except (ValueError, OverflowError, TypeError):
            # Text cut inside a character, or a date after the year 9999: unknown bounds are always safe.
            low = high = None
    only_nulls = nulls == group.num_rows and group.num_rows > 0
    return Bounds(arrow_type, low, high, nulls=nulls != 0, only_nulls=only_nulls)
