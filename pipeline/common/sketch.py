"""Sketches: the distributions of columns as counts that add up, whatever the order and the cut of the parts.

A number is counted in the bucket of the first 14 bits of its float32: 32 buckets from each power of two to the next,
so a bucket is at most 3.2 % wide. Counts, sums and extremes of any two parts are those of the whole, bit for bit:
partitions, retries and splits make no difference. Quantiles and PSI of such counts are right to about 1 %.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

SLOTS = 1 << 14
"""Buckets of a number."""
_SHIFT = 18
UNIT = 1 << 20
"""Sums are integers of 1 / UNIT, so that they are the same in any order."""
MOST_VALUES = 256
"""Distinct values of a column that are counted one by one."""
KEPT_VALUES = 64
"""Values that remain where there are more: those of the smallest hashes, so that parts agree on them."""
_LONGEST = 80
"""Characters of a value; a longer one is told by its beginning and its hash."""
_OUTSIDE = 2.0**42
_TINY = float(np.finfo(np.float32).tiny)
"""Numbers closer to zero share its bucket, or are no figures for people."""
_FEW = 2048
"""Values that are counted one by one rather than in an array of all buckets."""
_HELD_ROWS = 32_768
MOST_COLUMNS = 32
"""Columns of a job that have a sketch."""
_SAMPLED_BITS = 15
SCORES_PER_FEATURE = 32
"""Rows whose scores are counted for each row whose features are: there are few scores, and they matter most."""

Packed = Mapping[str, Any]
"""Sketches as JSON holds them; see `Sketches.pack`."""


@dataclass
class NumberSketch:
    """Distribution of a column of numbers or booleans."""

    rows: int = 0
    """Rows, nulls included."""
    nulls: int = 0
    nans: int = 0
    infinite: int = 0
    total: int = 0
    """Sum of the finite values, in units of 1 / `UNIT`."""
    least: float = np.inf
    """Smallest finite value; infinity without any."""
    most: float = -np.inf
    """Largest finite value; minus infinity without any."""
    is_whole: bool = True
    """True while all values are of integer types."""
    _dense: np.ndarray | None = None
    """int64 [`SLOTS`]; None while there are few values."""
    _few: list[np.ndarray] = field(default_factory=list)
    """Buckets of values that are not counted in ``_dense``."""
    _few_rows: int = 0

    @property
    def counts(self) -> np.ndarray:
        """int64 [`SLOTS`], finite values by bucket, ascending."""
        if self._dense is None:
            self._dense = np.zeros(SLOTS, dtype=np.int64)
        for slots in self._few:
            np.add.at(self._dense, slots, 1)
        self._few, self._few_rows = [], 0
        return self._dense

    def add(self, values: np.ndarray, *, nulls: int = 0) -> None:
        """Count values.

        :param values: [rows] of any numeric dtype, or bool.
        :param nulls: further rows, without a value.
        """
        self.rows += len(values) + nulls
        self.nulls += nulls
        if not len(values):
            return
        self.is_whole &= values.dtype.kind in "iub"
        numbers = values.astype(np.float64, copy=False)
        slots = _slots(values)
        if slots.max() >= _POSITIVE_INFINITY or slots.min() < _FIRST:
            finite = np.isfinite(numbers)
            self.nans += int(np.isnan(numbers).sum())
            self.infinite += int(np.isinf(numbers).sum())
            numbers = numbers[finite]
            # Numbers beyond float32 are counted beside the largest.
            slots = np.clip(slots[finite], _FIRST, _POSITIVE_INFINITY - 1)
        self.count(slots)
        self.total += _exact_sum(numbers)
        self.least = min(self.least, float(numbers.min(initial=np.inf)))
        self.most = max(self.most, float(numbers.max(initial=-np.inf)))

    def count(self, slots: np.ndarray) -> None:
        """Count finite values by their buckets, intp [rows]; the other figures are the caller's."""
        if self._few_rows + len(slots) < _FEW:
            # An array of all buckets costs more than to sort these.
            self._few.append(slots)
            self._few_rows += len(slots)
        elif len(slots) < _FEW:
            np.add.at(self.counts, slots, 1)
        else:
            counts = self.counts
            counts += np.bincount(slots, minlength=SLOTS)

    @property
    def filled(self) -> np.ndarray:
        """Numbers of the buckets that have values, int64, ascending."""
        # Half the cost of a search among 64-bit integers.
        found: np.ndarray = np.flatnonzero(self.counts != 0)
        return found

    @property
    def finite(self) -> int:
        """Rows with a finite value."""
        return self.rows - self.nulls - self.nans - self.infinite

    @property
    def mean(self) -> float:
        """Mean of the finite values; NaN without any."""
        return self.total / UNIT / self.finite if self.finite else np.nan

    def quantiles(self, shares: Iterable[float]) -> list[float]:
        """Return the values below which these shares of the finite values lie; NaN without any.

        Within a bucket values are taken to be spread evenly, so an answer is off by at most the width of one.
        """
        filled = self.filled
        if not len(filled):
            return [np.nan for _ in shares]
        ends = np.cumsum(self.counts[filled])
        found = []
        for share in shares:
            rank = share * ends[-1]
            place = min(int(np.searchsorted(ends, rank)), len(filled) - 1)
            slot, count = filled[place], self.counts[filled[place]]
            part = (rank - (ends[place] - count)) / count
            low, high = _EDGES[slot], _EDGES[slot + 1]
            value = float(np.clip(low + part * (high - low), self.least, self.most))
            found.append(float(np.trunc(value)) if self.is_whole or abs(value) < _TINY else value)
        return found

    def histogram(self, edges: np.ndarray) -> np.ndarray:
        """Return the finite values in bins, float64 [edges - 1]; values of a bucket are taken to be spread evenly.

        :param edges: float64, ascending; what lies outside is not counted.
        """
        filled = self.filled
        if not len(filled):
            return np.zeros(len(edges) - 1)
        ends = np.cumsum(self.counts[filled])
        # Lower and upper edge of each bucket, and the values below them.
        places = np.clip(np.stack([_EDGES[filled], _EDGES[filled + 1]], axis=1), self.least, self.most).ravel()
        below = np.stack([ends - self.counts[filled], ends], axis=1).ravel()
        bins: np.ndarray = np.diff(np.interp(edges, places, below, left=0.0, right=float(ends[-1])))
        return bins

    def __iadd__(self, other: NumberSketch) -> NumberSketch:
        self._add_header(other._header())
        if other._dense is None:
            for slots in other._few:
                self.count(slots)
        else:
            counts = self.counts
            counts += other.counts
        return self

    def sparse(self) -> tuple[np.ndarray, np.ndarray]:
        """Return `filled`, and the values in each, int64."""
        if self._dense is None and self._few:
            slots, counts = np.unique(np.concatenate(self._few), return_counts=True)
            return slots.astype(np.int64), counts.astype(np.int64)
        filled = self.filled
        return filled, self.counts[filled] if len(filled) else np.empty(0, dtype=np.int64)

    def _header(self) -> list[Any]:
        extremes = [self.least, self.most] if self.finite else [None, None]
        return [self.rows, self.nulls, self.nans, self.infinite, self.total, *extremes, self.is_whole]

    def _add_header(self, header: Iterable[Any]) -> None:
        rows, nulls, nans, infinite, total, least, most, is_whole = header
        self.rows, self.nulls = self.rows + rows, self.nulls + nulls
        self.nans, self.infinite, self.total = self.nans + nans, self.infinite + infinite, self.total + total
        self.is_whole &= is_whole
        if least is not None:
            self.least, self.most = min(self.least, least), max(self.most, most)


@dataclass
class ValueSketch:
    """Counts of the values of a column of texts."""

    rows: int = 0
    """Rows, nulls included."""
    nulls: int = 0
    others: int = 0
    """Rows with a value that is not counted by itself."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows by value: all, or `KEPT_VALUES` of them if there are more than `MOST_VALUES`."""

    def add(self, counts: Mapping[str, int], *, nulls: int = 0, others: int = 0) -> None:
        """Add rows by value."""
        self.rows += sum(counts.values()) + nulls + others
        self.nulls += nulls
        self.others += others
        for value, count in counts.items():
            self.counts[value] = self.counts.get(value, 0) + count
        if self.others or len(self.counts) > MOST_VALUES:
            kept = sorted(self.counts, key=lambda value: xxhash.xxh3_64_intdigest(value.encode()))[:KEPT_VALUES]
            before = sum(self.counts.values())
            self.counts = {value: self.counts[value] for value in kept}
            self.others += before - sum(self.counts.values())

    def __iadd__(self, other: ValueSketch) -> ValueSketch:
        self.add(other.counts, nulls=other.nulls, others=other.others)
        return self


ColumnSketch = NumberSketch | ValueSketch


_Kind = TypeVar("_Kind", NumberSketch, ValueSketch)


def _same_kind(one: _Kind, other: ColumnSketch, column: str) -> _Kind:
    """Return ``other``.

    :raises TypeError: if it is of another kind than ``one``.
    """
    if not isinstance(other, type(one)):
        raise TypeError(f"{column}: numbers in one part, texts in another")
    return other


class Sketches:
    """Sketches of columns by name.

    Few rows cost nearly as much as many, so tables are held until they have `_HELD_ROWS` rows.
    """

    def __init__(self) -> None:
        self._columns: dict[str, ColumnSketch] = {}
        self._held: dict[pa.Schema, list[pa.Table]] = {}
        self._held_rows = 0

    @property
    def columns(self) -> dict[str, ColumnSketch]:
        """The sketch of each column."""
        held, self._held, self._held_rows = self._held, {}, 0
        for tables in held.values():
            table, together = pa.concat_tables(tables), dict[str, np.ndarray]()
            for name, column in zip(table.column_names, table.columns, strict=True):
                if _is_exact(column.type) and not column.null_count and table.num_rows:
                    self._columns.setdefault(name, NumberSketch())
                    together[name] = column.to_numpy()
                elif is_sketched(column.type):
                    self._count(name, column)
            if together:
                self._count_together(together)
        return self._columns

    def add(self, table: pa.Table) -> None:
        """Count the rows of ``table``. Columns of other types than numbers, booleans and texts are passed over."""
        self._hold(table.schema, [table])

    def _hold(self, schema: pa.Schema, tables: Sequence[pa.Table]) -> None:
        self._held.setdefault(schema, []).extend(tables)
        self._held_rows += sum(table.num_rows for table in tables)
        if self._held_rows >= _HELD_ROWS:
            _ = self.columns

    def _count_together(self, columns: Mapping[str, np.ndarray]) -> None:
        """Count columns of equal length as `NumberSketch.add` does: in one pass, since few rows cost much a column.

        :param columns: [rows] each, of types that float64 holds exactly, without nulls.
        """
        sketches = [_same_kind(NumberSketch(), self._columns[name], name) for name in columns]
        numbers = np.array(list(columns.values()), dtype=np.float64)
        slots = _slots(numbers)
        lowest, highest = slots.min(axis=1), slots.max(axis=1)
        least, most = numbers.min(axis=1), numbers.max(axis=1)
        rows = numbers.shape[1]
        with np.errstate(over="ignore", invalid="ignore"):
            largest = np.maximum(most, -least)
            is_plain = (lowest >= _FIRST) & (highest < _POSITIVE_INFINITY) & (largest * UNIT * rows < 2.0**62)
            totals = np.rint(numbers * UNIT).astype(np.int64).sum(axis=1)
        for place, (sketch, values) in enumerate(zip(sketches, columns.values(), strict=True)):
            if not is_plain[place]:
                sketch.add(values)
                continue
            sketch.rows += rows
            sketch.is_whole &= values.dtype.kind in "iu"
            sketch.count(slots[place])
            sketch.total += int(totals[place])
            sketch.least = min(sketch.least, float(least[place]))
            sketch.most = max(sketch.most, float(most[place]))

    def _count(self, name: str, column: pa.ChunkedArray) -> None:
        if pa.types.is_dictionary(column.type) or _is_text(column.type):
            values = _same_kind(ValueSketch(), self._columns.setdefault(name, ValueSketch()), name)
            nulls = column.null_count
            values.add(_value_counts(column, nulls), nulls=nulls)
        else:
            numbers = _same_kind(NumberSketch(), self._columns.setdefault(name, NumberSketch()), name)
            for chunk in column.chunks if column.num_chunks < 2 else [column.combine_chunks()]:
                numbers.add(_numbers(chunk), nulls=chunk.null_count)

    def __iadd__(self, other: Sketches) -> Sketches:
        for name, sketch in other._columns.items():
            own = self._columns.get(name)
            if own is None:
                self._columns[name] = sketch
            elif isinstance(own, NumberSketch):
                own += _same_kind(own, sketch, name)
            else:
                own += _same_kind(own, sketch, name)
        for schema, tables in other._held.items():
            self._hold(schema, tables)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.pack()

    def __setstate__(self, packed: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.add_packed(packed)

    def pack(self) -> dict[str, Any]:
        """Return the sketches for JSON; empty without any."""
        columns = self.columns
        # Sorted, as JSON with sorted keys has them: the counts are in the order of the names.
        numbers = {name: one for name, one in sorted(columns.items()) if isinstance(one, NumberSketch)}
        values = {name: one for name, one in columns.items() if isinstance(one, ValueSketch)}
        packed: dict[str, Any] = {}
        if numbers:
            filled = [one.sparse() for one in numbers.values()]
            places = np.concatenate([slots + SLOTS * place for place, (slots, _) in enumerate(filled)])
            counts = np.concatenate([count for _, count in filled])
            steps, found = np.diff(places, prepend=0).astype("<u4"), counts.astype("<u8")
            # Bytes of one weight side by side: most are zero, and shrink to nothing.
            planes = [part.view(np.uint8).reshape(-1, part.itemsize).T.tobytes() for part in (steps, found)]
            packed["numbers"] = {name: one._header() for name, one in numbers.items()}
            packed["counts"] = base64.b64encode(zlib.compress(b"".join(planes), 1)).decode()
        if values:
            packed["values"] = {name: [one.nulls, one.others, one.counts] for name, one in values.items()}
        return packed

    def add_packed(self, packed: Packed) -> None:
        """Add sketches that `pack` returned.

        :raises ValueError: (or KeyError, TypeError) for anything else.
        """
        columns, numbers = self.columns, packed.get("numbers", {})
        if numbers:
            data = np.frombuffer(zlib.decompress(base64.b64decode(packed["counts"])), dtype=np.uint8)
            size = len(data) // 12
            steps = np.ascontiguousarray(data[: 4 * size].reshape(4, size).T).view("<u4").ravel()
            found = np.ascontiguousarray(data[4 * size :].reshape(8, size).T).view("<u8").ravel()
            places, found = np.cumsum(steps, dtype=np.int64), found.astype(np.int64)
            bounds = np.searchsorted(places, SLOTS * np.arange(len(numbers) + 1)).tolist()
            places &= SLOTS - 1
        for place, (name, header) in enumerate(numbers.items()):
            sketch = _same_kind(NumberSketch(), columns.setdefault(name, NumberSketch()), name)
            part = slice(bounds[place], bounds[place + 1])
            sketch.counts[places[part]] += found[part]
            sketch._add_header(header)
        for name, (nulls, others, counts) in packed.get("values", {}).items():
            values = _same_kind(ValueSketch(), columns.setdefault(name, ValueSketch()), name)
            values.add(counts, nulls=nulls, others=others)


def sample_every(rows: int) -> int:
    """Return the power of two for `is_in_sample` with which a job of so many rows samples 16,384 to 32,768 of them.

    :returns: 1, all rows, for smaller jobs.
    """
    return 1 << max(0, rows.bit_length() - _SAMPLED_BITS)


def sample_keys(rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return a key for each row, uint64 [rows]; it depends on the row's number alone. See `is_in_sample`.

    :param rows: int64 [rows], numbers of the rows in their files.
    :param out: uint64 [rows] that receives the keys. Default: a new array.
    """
    # Multiplied by 2⁶⁴ / the golden ratio, any regular pattern is spread evenly (Knuth, TAOCP 3, 6.4).
    keys: np.ndarray = np.multiply(rows.view(np.uint64), np.uint64(0x9E3779B97F4A7C15), out=out)
    return keys


def is_in_sample(keys: np.ndarray, *, every: int) -> np.ndarray:
    """Return which rows belong to a sample of one in ``every``, bool [rows]. Smaller samples are part of larger ones.

    :param every: a power of two.
    """
    chosen: np.ndarray = keys <= np.uint64((1 << 64) // every - 1)
    return chosen


def _slots(values: np.ndarray) -> np.ndarray:
    """Return the bucket of each value, intp, in the shape of ``values``."""
    # Zero has two signs, and one bucket.
    with np.errstate(over="ignore", invalid="ignore"):
        bits = (values.astype(np.float32) + np.float32(0)).view(np.int32)
    slots: np.ndarray = ((bits ^ ((bits >> 31) | np.int32(-(1 << 31)))).view(np.uint32) >> _SHIFT).astype(np.intp)
    return slots


def _is_exact(kind: pa.DataType) -> bool:
    """Return True if float64 holds all numbers of a type."""
    return bool(pa.types.is_floating(kind)) or (bool(pa.types.is_integer(kind)) and kind.bit_width <= 32)


def _is_text(kind: pa.DataType) -> bool:
    return any(bool(check(kind)) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def is_number(kind: pa.DataType) -> bool:
    """Return True if columns of this type have the sketch of numbers: booleans and decimals too."""
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    return any(bool(check(kind)) for check in checks)


def is_sketched(kind: pa.DataType) -> bool:
    """Return True if columns of this type have a sketch: numbers, booleans and texts, also as a dictionary."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return _is_text(kind) or is_number(kind)


def _numbers(array: pa.Array) -> np.ndarray:
    """Return the values of an array that are not null."""
    if array.null_count:
        array = array.drop_null()
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    values: np.ndarray = array.to_numpy(zero_copy_only=False)
    return values


def _value_counts(column: pa.ChunkedArray, nulls: int) -> dict[str, int]:
    """Return the rows by value, without nulls."""
    if pa.types.is_string_view(column.type):
        # Arrow's functions know no views.
        column = column.cast(pa.large_string())
    if nulls:
        column = column.drop_null()
    if not len(column):
        return {}
    counts: dict[str, int] = {}
    found = pc.value_counts(column.combine_chunks() if pa.types.is_dictionary(column.type) else column)
    values = found.field("values")
    values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    # As bytes: Arrow takes any for a text, and so does Parquet.
    values = values.cast(pa.large_string()).cast(pa.large_binary())
    for value, count in zip(values.to_pylist(), found.field("counts").to_pylist(), strict=True):
        text = value.decode("utf-8", "replace")
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST - 20]}… {xxhash.xxh3_64_hexdigest(text.encode())}"
        counts[text] = counts.get(text, 0) + count
    return counts


def _edges() -> np.ndarray:
    """Return the lower edge of each bucket and the upper of the last, float64 [`SLOTS` + 1], ascending."""
    ordered = (np.arange(SLOTS, dtype=np.uint64) << np.uint64(_SHIFT)).astype(np.uint32)
    is_negative = ordered < np.uint32(1 << 31)
    bits = np.where(is_negative, ~ordered, ordered ^ np.uint32(1 << 31))
    with np.errstate(invalid="ignore"):
        edges = bits.view(np.float32).astype(np.float64)
    edges[np.isnan(edges)] = -np.inf
    edges[_POSITIVE_INFINITY:] = np.inf
    return np.append(edges, np.inf)


def _slot(value: float) -> int:
    bits = int(np.float32(value).view(np.uint32))
    return ((bits ^ (0xFFFFFFFF if bits >> 31 else 1 << 31)) & 0xFFFFFFFF) >> _SHIFT


_POSITIVE_INFINITY = _slot(np.inf)
"""Bucket of infinity; those above are of NaNs."""
_FIRST = _slot(-np.inf) + 1
"""First bucket of finite numbers; those below are of minus infinity and of NaNs."""
_EDGES = _edges()


def slot_edges() -> np.ndarray:
    """Return the lower edge of each bucket and the upper edge of the last, float64 [`SLOTS` + 1]."""
    return _EDGES


def _exact_sum(values: np.ndarray) -> int:
    """Return the sum of finite values in units of 1 / `UNIT`, without rounding sums."""
    largest = max(values.max(initial=0.0), -values.min(initial=0.0))
    if largest >= _OUTSIDE:
        return sum(round(value * UNIT) for value in values.tolist())
    units = np.rint(values * UNIT).astype(np.int64)
    if largest * UNIT * max(1, len(values)) < 2.0**62:
        return int(units.sum())
    # Each half of the bits has room for 2³¹ rows.
    return (int((units >> 32).sum()) << 32) + int((units & 0xFFFFFFFF).sum())
