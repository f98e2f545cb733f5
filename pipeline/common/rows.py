"""Where rows come from and where they went: the vocabulary every module above shares."""

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
    """Uncompressed bytes of the columns the job reads."""
    compressed: int
    """Compressed bytes of the columns the job reads."""
    selected: bool = True
    """False when the statistics prove that the filter keeps no row of it; it is then never read."""


@fast_pickle
@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file as it was when the plan was made."""

    path: str
    """Local path or fsspec URL."""
    size: int
    """Bytes."""
    version: str
    """What changes when the content does: ``mtime:<ns>`` on local disks, ``etag:<etag>`` on object stores."""
    row_groups: tuple[RowGroup, ...]
    hive_keys: tuple[tuple[str, str], ...] = ()
    """Hive partition keys of its folders, in order, percent-decoded; ``__HIVE_DEFAULT_PARTITION__`` stands for null."""
    published_row_groups: int = 0
    """Row groups at its start that an earlier job has published: they are no part of the input."""
    footer_digest: str = ""
    """Digest of what its footer says of all row groups, where a later job is to find out what was appended."""
    why: str = ""
    """Why an incremental job scores it."""

    @property
    def input_groups(self) -> tuple[RowGroup, ...]:
        """The row groups that are part of the input."""
        return self.row_groups[self.published_row_groups :]

    @property
    def rows(self) -> int:
        """All rows of the file that are part of the input, filtered ones too."""
        return sum(group.rows for group in self.input_groups)


@fast_pickle
@dataclass(frozen=True, slots=True)
class Fragment:
    """A contiguous range of rows of one file. Ranges are numbered from the file's first row, 0, stop excluded."""

    path: str
    row_start: int
    row_stop: int
    group_start: int
    """First row group the range touches."""
    group_stop: int
    """One past the last row group the range touches."""
    bytes: int
    """Uncompressed bytes of the columns the job reads, in proportion to the rows."""
    hive_keys: tuple[tuple[str, str], ...] = ()
    """As in `InputFile`."""
    origin: str = ""
    """Input file the rows are from, where ``path`` is a file of rejects in the job directory; else empty."""

    @property
    def rows(self) -> int:
        """Rows of the range."""
        return self.row_stop - self.row_start


@fast_pickle
@dataclass(frozen=True, slots=True)
class QuarantinedFile:
    """An input file that was quarantined as a whole."""

    path: str
    reason: str
    """Kind of reason, such as ``file:CorruptInput``."""
    message: str
    """What was wrong with it."""
    rows: int | None = None
    """As its footer says; None when it cannot be read."""
    hive_keys: tuple[tuple[str, str], ...] = ()
    """As in `InputFile`."""

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`, also after JSON."""
        return cls(**{**record, "hive_keys": tuple((name, value) for name, value in record["hive_keys"])})

    @property
    def title(self) -> str:
        """``a.parquet (1,000 rows)``."""
        return f"{self.path} ({'rows unknown' if self.rows is None else f'{self.rows:,} rows'})"


@fast_pickle
@dataclass(frozen=True, slots=True)
class RowCounts:
    """What became of rows. ``input`` counts every row of the input, also those a filter drops."""

    input: int = 0
    output: int = 0
    rejected: int = 0
    filtered: int = 0

    @property
    def is_reconciled(self) -> bool:
        """Whether every row is in exactly one place."""
        return self.input == self.output + self.rejected + self.filtered

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(
            self.input + other.input,
            self.output + other.output,
            self.rejected + other.rejected,
            self.filtered + other.filtered,
        )

    def details(self) -> dict[str, int]:
        """As JSON output shows them."""
        return {"in": self.input, "out": self.output, "rejected": self.rejected, "filtered": self.filtered}

    @staticmethod
    def from_details(details: dict[str, int]) -> RowCounts:
        """Inverse of `details`."""
        return RowCounts(details["in"], details["out"], details["rejected"], details["filtered"])

    @staticmethod
    def total(counts: Iterable[RowCounts]) -> RowCounts:
        """Sum."""
        total = RowCounts()
        for one in counts:
            total = total + one
        return total
