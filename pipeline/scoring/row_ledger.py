"""What became of the rows of a partition, counted as its batches pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.common.rows import Fragment, RowCounts
from pipeline.errors import ReconciliationFailed
from pipeline.jobs.receipts import FileRows
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import REJECT_REASON
from pipeline.scoring.scorer import ScoredBatch


class RowLedger:
    """What became of the rows of each fragment, counted as they pass."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.paths = tuple(fragment.origin or fragment.path for fragment in partition.fragments)
        self.reasons: Counter[str] = Counter()
        self.before: Counter[str] = Counter()
        """Reasons for which the rows had been rejected before."""
        # Rows: out, rejected, filtered. Columns: fragments.
        self._counts = np.zeros((3, len(self.paths)), dtype=np.int64)

    def add(self, scored: ScoredBatch, before: Iterable[str] = ()) -> None:
        """Count the rows of a batch.

        :param before: why each of its rows had been rejected before.
        """
        self.before.update(before)
        out = np.bincount(scored.fragment, minlength=len(self.paths))
        self._counts += np.stack([out, scored.rejected, scored.filtered])
        if scored.rejects is not None:
            self.reasons.update(scored.rejects.column(REJECT_REASON).to_pylist())

    @property
    def rows_done(self) -> int:
        """Input rows that are accounted for: a batch tells of what was filtered before its last row, too."""
        return int(self._counts.sum())

    def files(self, *, is_whole: bool = True) -> tuple[FileRows, ...]:
        """The counts per fragment.

        :param is_whole: all rows were read; else the first `rows_done` of them.
        :raises ReconciliationFailed: when rows are missing, or there are too many.
        """
        fragments = self.partition.fragments
        left = [fragment.rows for fragment in fragments] if is_whole else _first_rows(fragments, self.rows_done)
        files = tuple(
            FileRows(part.path, part.row_start, part.row_start + rows, RowCounts(rows, *map(int, counts)))
            for part, rows, counts in zip(fragments, left, self._counts.T, strict=True)
            if rows or is_whole
        )
        for file in files:
            if not file.rows.is_reconciled:
                raise ReconciliationFailed(
                    "rows of a partition are unaccounted for",
                    where=f"partition {self.partition.id}, {file.path} rows {file.row_start} to {file.row_stop}",
                    found=f"{file.rows.out} out, {file.rows.rejected} rejected, {file.rows.filtered} filtered",
                    expected=f"{file.rows.rows_in} in all",
                    next_step="nothing of this attempt was kept; resume, and report it when it happens again",
                )
        return files


def _first_rows(fragments: Sequence[Fragment], rows: int) -> list[int]:
    """How many of the first ``rows`` rows each fragment has."""
    ends = np.cumsum([fragment.rows for fragment in fragments])
    return [int(take) for take in np.diff(np.minimum(ends, rows), prepend=0)]
