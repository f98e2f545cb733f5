"""Rows of a batch with their positions in it, and the rows that are rejected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.scoring.arrow import take_rows
from pipeline.sources.types import empty_table


@dataclass(frozen=True)
class Failures:
    """Rows that are rejected, each with its first failing rule."""

    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """int64 [failures], positions in the table, ascending."""
    reasons: tuple[str, ...] = ()
    """Short and stable texts for counting: ``contract:<column>:<rule>``."""
    messages: tuple[str, ...] = ()
    """Messages with the invalid value."""

    def __len__(self) -> int:
        return len(self.rows)

    def renumber(self, positions: np.ndarray) -> Failures:
        """Return the failures with ``positions[row]`` in place of ``row``."""
        return Failures(positions[self.rows], self.reasons, self.messages) if len(self) else self

    @staticmethod
    def merged(parts: Sequence[Failures]) -> Failures:
        """Merge ``parts`` by ascending row; no row may be in two parts."""
        parts = [part for part in parts if len(part)]
        if len(parts) < 2:
            return parts[0] if parts else Failures()
        rows = np.concatenate([part.rows for part in parts])
        reasons = [reason for part in parts for reason in part.reasons]
        messages = [message for part in parts for message in part.messages]
        order = np.argsort(rows, kind="stable")
        return Failures(rows[order], tuple(reasons[i] for i in order), tuple(messages[i] for i in order))


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a batch: a table, and the position of each of its rows in the batch."""

    table: pa.Table
    position: np.ndarray
    """int64 [rows]."""

    @staticmethod
    def from_table(table: pa.Table) -> Rows:
        """Return all rows of a batch, numbered from 0."""
        return Rows(table, np.arange(table.num_rows, dtype=np.int64))

    @staticmethod
    def concat(parts: Sequence[Rows], schema: pa.Schema) -> Rows:
        """Concatenate ``parts`` in order; without parts, return no rows, with ``schema``."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Rows.from_table(empty_table(schema))
        return Rows(pa.concat_tables([part.table for part in parts]), np.concatenate([part.position for part in parts]))

    def __len__(self) -> int:
        return len(self.position)

    def slice(self, start: int, stop: int) -> Rows:
        """Return the rows from ``start`` to ``stop``, which is excluded."""
        return Rows(self.table.slice(start, stop - start), self.position[start:stop])

    def select(self, rows: np.ndarray) -> Rows:
        """Return the given rows, in the given order.

        :param rows: int64, indices into this object.
        """
        return Rows(take_rows(self.table, rows), self.position[rows])

    def matching(self, mask: pa.ChunkedArray | pa.Array) -> Rows:
        """Return the rows for which ``mask``, bool [rows], is true; if all are, without a copy."""
        rows = np.flatnonzero(mask.to_numpy(zero_copy_only=False) if isinstance(mask, pa.Array) else mask.to_numpy())
        return self if len(rows) == len(self) else self.select(rows)

    def drop(self, rows: np.ndarray) -> Rows:
        """Return all rows except the given ones.

        :param rows: int64, indices into this object.
        """
        if not len(rows):
            return self
        keep = np.ones(len(self), dtype=bool)
        keep[rows] = False
        return self.select(np.flatnonzero(keep))

    def number(self, failures: Failures) -> Failures:
        """Return ``failures`` of rows of this object, with the rows' positions in the batch."""
        return failures.renumber(self.position)

    def reject(self, failures: Failures) -> tuple[Rows, Failures]:
        """Drop the rows of ``failures``. Return the other rows, and ``failures`` with positions in the batch."""
        return self.drop(failures.rows), self.number(failures)
