"""Origin and outcome of rows: the types that all other packages share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pipeline.common.pickling import fast_pickle


@fast_pickle
@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group of a Parquet file, as its footer describes it."""

    rows: int
    bytes: int
    """Uncompressed bytes of the columns that the job reads."""
    compressed: int
    """Compressed bytes of the columns that the job reads."""
    selected: bool = True
    """False if statistics prove that the filter keeps no row of the group; the group is then not read."""
    lines: int = 0
    """Lines of text of the group, in formats that are read by byte ranges: quoted newlines and empty lines count.
    ``compressed`` is the group's length in the file then. 0 in other formats."""


@fast_pickle
@dataclass(frozen=True, slots=True)
class ByteSpan:
    """The bytes of some adjacent row groups in a file that is read by byte ranges."""

    start: int
    """Offset of the first byte, from 0."""
    stop: int
    """Offset after the last byte."""
    row: int
    """Number of the first row."""
    rows: int
    """Number of rows."""
    line: int
    """Number of the first line, from 1."""


@fast_pickle
@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file at planning time."""

    path: str
    """Local path or fsspec URL."""
    size: int
    """Bytes."""
    version: str
    """Text that changes with the content: ``mtime:<ns> inode:<number> ctime:<ns> tail:<digest>`` on local disks,
    ``etag:<etag>`` on object stores; see `pipeline.sources.versions`."""
    row_groups: tuple[RowGroup, ...]
    hive_keys: tuple[tuple[str, str], ...] = ()
    """Hive partition keys of the folders, in order, percent-decoded; ``__HIVE_DEFAULT_PARTITION__`` means null."""
    published_row_groups: int = 0
    """Number of row groups at the start that an earlier job has published; these are not part of the input."""
    footer_digest: str = ""
    """Digest of the metadata of all row groups, with which a later incremental job detects appended row groups."""
    reason: str = ""
    """Reason for which an incremental job scores the file."""

    @property
    def input_groups(self) -> tuple[RowGroup, ...]:
        """The row groups that are part of the input."""
        return self.row_groups[self.published_row_groups :]

    @property
    def rows(self) -> int:
        """All rows of the file that are part of the input, including filtered ones."""
        return sum(group.rows for group in self.input_groups)

    def span(self, group_start: int, group_stop: int) -> ByteSpan | None:
        """Return the bytes of the row groups ``group_start`` to ``group_stop``; None in formats without lines."""
        if not any(group.lines for group in self.row_groups[group_start:group_stop]):
            return None
        before, chosen = self.row_groups[:group_start], self.row_groups[group_start:group_stop]
        start = sum(group.compressed for group in before)
        return ByteSpan(
            start,
            start + sum(group.compressed for group in chosen),
            sum(group.rows for group in before),
            sum(group.rows for group in chosen),
            1 + sum(group.lines for group in before),
        )


@fast_pickle
@dataclass(frozen=True, slots=True)
class Fragment:
    """A contiguous range of rows of one file. The file's first row is number 0; ``row_stop`` is excluded."""

    path: str
    row_start: int
    row_stop: int
    group_start: int
    """First row group with rows of the range."""
    group_stop: int
    """Number after the last row group with rows of the range."""
    bytes: int
    """Uncompressed bytes of the columns that the job reads, in proportion to the rows."""
    hive_keys: tuple[tuple[str, str], ...] = ()
    """See `InputFile.hive_keys`."""
    rejected_from: str = ""
    """Input file of the rows, if ``path`` is a file of rejects in the job directory; else empty."""
    span: ByteSpan | None = None
    """Bytes of the row groups, in formats that are read by byte ranges."""

    @property
    def rows(self) -> int:
        """Rows of the range."""
        return self.row_stop - self.row_start


@fast_pickle
@dataclass(frozen=True, slots=True)
class QuarantinedFile:
    """An input file that was quarantined."""

    path: str
    reason: str
    """Kind of reason, such as ``file:CorruptInput``."""
    message: str
    """Error of the file, as text."""
    rows: int | None = None
    """Number of rows from the footer; None if the footer cannot be read."""
    hive_keys: tuple[tuple[str, str], ...] = ()
    """See `InputFile.hive_keys`."""

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`, also after JSON."""
        return cls(**{**record, "hive_keys": tuple((name, value) for name, value in record["hive_keys"])})

    @property
    def title(self) -> str:
        """Path and number of rows: ``a.parquet (1,000 rows)``."""
        return f"{self.path} ({'rows unknown' if self.rows is None else f'{self.rows:,} rows'})"


@fast_pickle
@dataclass(frozen=True, slots=True)
class RowCounts:
    """Counts of rows by outcome. ``input`` counts every row of the input, including filtered rows."""

    input: int = 0
    output: int = 0
    rejected: int = 0
    filtered: int = 0
    made: int = 0
    """Rows that ``dask`` steps made, less the rows that went into them: below 0 after a groupby. 0 without such
    steps."""

    @property
    def is_reconciled(self) -> bool:
        """True if every input row, and every row that a step made, is output, rejected or filtered."""
        return self.input + self.made == self.output + self.rejected + self.filtered

    def equation(self) -> str:
        """Return ``1,000 in = 990 out + 10 rejected + 0 filtered``, with ≠ if the counts do not add up."""
        made = f" {'−' if self.made < 0 else '+'} {abs(self.made):,} in dask steps" if self.made else ""
        sign = "=" if self.is_reconciled else "≠"
        into = f"{self.input:,} in{made} {sign} {self.output:,} out"
        return f"{into} + {self.rejected:,} rejected + {self.filtered:,} filtered"

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(
            self.input + other.input,
            self.output + other.output,
            self.rejected + other.rejected,
            self.filtered + other.filtered,
            self.made + other.made,
        )

    def to_dict(self) -> dict[str, int]:
        """Return the counts for JSON output."""
        counts = {"in": self.input, "out": self.output, "rejected": self.rejected, "filtered": self.filtered}
        return counts | ({"made": self.made} if self.made else {})

    @staticmethod
    def from_dict(record: Mapping[str, int]) -> RowCounts:
        """Inverse of `to_dict`."""
        return RowCounts(record["in"], record["out"], record["rejected"], record["filtered"], record.get("made", 0))

    @staticmethod
    def total(counts: Iterable[RowCounts]) -> RowCounts:
        """Return the sum of ``counts``."""
        total = RowCounts()
        for other in counts:
            total = total + other
        return total
