"""`StackScorer`: the scores of several models are the features of one more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.scoring.operations.model_scorer import ModelScorer
from pipeline.scoring.outputs import score_columns
from pipeline.scoring.rows import Failures, Rows


class StackScorer:
    """The models of a list, and the model on top. A row that one of them rejects is rejected."""

    def __init__(self, members: Sequence[ModelScorer], meta: ModelScorer, *, columns: Sequence[str]) -> None:
        """:param columns: names of the scores of all members, in order: the features of ``meta``."""
        self.output = meta.output
        self.finite = frozenset[str]()
        """None: a later model may check a column that the first does not."""
        self._members = members
        self._meta = meta
        self._columns = columns

    def score(self, rows: Rows) -> tuple[Rows, np.ndarray, Failures]:
        """See `ModelScorer.score`."""
        parts, failures = list[tuple[np.ndarray, list[pa.Array]]](), list[Failures]()
        for member in self._members:
            rows, scores, failed = member.score(rows)
            parts.append((rows.position, score_columns(scores, replace(member.output, is_list=False))))
            failures.append(failed)
        columns: list[pa.Array] = []
        for position, scored in parts:
            # Rows that a later model rejected are still among the scores of the earlier ones.
            is_whole = len(position) == len(rows)
            left = None if is_whole else pa.array(np.searchsorted(position, rows.position))
            columns += scored if left is None else [column.take(left) for column in scored]
        stacked = Rows(pa.Table.from_arrays(columns, names=list(self._columns)), rows.position)
        kept, result, failed = self._meta.score(stacked)
        failures.append(failed)
        if len(kept) != len(rows):
            rows = rows.select(np.searchsorted(rows.position, kept.position))
        return rows, result, Failures.merged(failures)

    def take_seconds(self) -> float:
        """Return the seconds of the predictions since the last call."""
        return sum(model.take_seconds() for model in (*self._members, self._meta))

    def blame_rows_only(self) -> None:
        """See `pipeline.scoring.operations.operation.Operation`."""
        for model in (*self._members, self._meta):
            model.blame_rows_only()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.models.model.Predictor.is_out_of_memory`."""
        return any(model.is_out_of_memory(error) for model in (*self._members, self._meta))
