"""`SourceBatch`: rows of a partition, read from its input files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from pipeline.common.rows import Fragment


class HasFragments(Protocol):
    """The part of a partition that reading needs."""

    @property
    def fragments(self) -> tuple[Fragment, ...]:
        """Row ranges to read, in order."""


class Problem(NamedTuple):
    """The cause for which a row of a text file could not be read."""

    reason: str
    """Text of a `pipeline.common.reasons.Reason`."""
    message: str
    """Line and column in the file, and the value."""


@dataclass(frozen=True, eq=False)
class SourceBatch:
    """Rows of a partition, in the order of its fragments."""

    table: pa.Table
    fragment: np.ndarray
    """int32 [rows]: index of each row's fragment in the partition."""
    row: np.ndarray
    """int64 [rows]: each row's number in its file, from 0."""
    filtered: np.ndarray
    """int64 [fragments]: rows the filter dropped since the previous batch."""
    reasons: tuple[str, ...] = ()
    """Reason for which each row was rejected earlier; empty for rows of input files."""
    origin: pa.Table | None = None
    """File and row of the job's source that each row comes from, where the files that were read say it."""

    problems: tuple[Problem | None, ...] = ()
    """Cause per row for which it could not be read and has to be rejected; its unreadable columns are null. Empty if
    all rows were read."""

    def slice(self, start: int, stop: int, *, filtered: np.ndarray | None = None) -> SourceBatch:
        """Return the rows ``start`` to ``stop``.

        :param filtered: int64 [fragments]: rows that the filter dropped since the previous batch. Default: 0.
        """
        return SourceBatch(
            table=self.table.slice(start, stop - start),
            fragment=self.fragment[start:stop],
            row=self.row[start:stop],
            filtered=np.zeros_like(self.filtered) if filtered is None else filtered,
            reasons=self.reasons[start:stop],
            problems=self.problems[start:stop],
            origin=None if self.origin is None else self.origin.slice(start, stop - start),
        )
