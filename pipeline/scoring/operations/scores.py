"""`ScoreOperation`: the rows that a step scores, with one model or several, and the columns that receive the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.common.agreement import Agreement, compare_scores
from pipeline.common.stopwatch import Stopwatch
from pipeline.errors import ModelError
from pipeline.plan.recipe import AnyScore, Shadow, may_leave_null
from pipeline.scoring.operations.model_scorer import expect_columns
from pipeline.scoring.operations.operation import Applied, RowScorer
from pipeline.scoring.outputs import score_columns
from pipeline.scoring.rows import Failures, Rows
from pipeline.sources.filters.parse import parse_filter


class ScoreOperation:
    """A ``score`` step with its models loaded."""

    phase: Literal["steps", "score"] = "score"

    def __init__(
        self,
        recipe: AnyScore,
        scorer: RowScorer,
        *,
        passed: Sequence[str] | None = None,
    ) -> None:
        """Prepare to score.

        :param scorer: the model or models of the step.
        :param passed: columns to pass on. Default: all, less those that the scores replace.
        """
        self.watch = Stopwatch()
        self._recipe = recipe
        self._scorer = scorer
        self._passed = passed
        self._where = None if recipe.where is None else parse_filter(recipe.where)
        self._shadow = recipe.shadow
        self._may_leave_null = may_leave_null(recipe)
        self.finite = frozenset[str]() if self._may_leave_null else scorer.finite
        """Columns that the operation checks for infinite values in every row."""

    def apply(self, rows: Rows) -> Applied:
        """Check the contract of each model, predict, and add the columns of the scores; see `ModelScorer.score`.

        A row that one of several models rejects is rejected; a challenger rejects none.
        """
        with self.watch:
            expect_columns(rows.table, self._passed or ())
            scored, scores, failed = self._score_or_give_up(self._chosen(rows))
            columns = score_columns(scores, self._scorer.output)
            agreements: dict[str, Agreement] = {}
            if self._shadow is not None:
                agreements[self._recipe.outputs[0]] = self._compare(scored, scores, self._shadow, errors=len(failed))
                failed = Failures()
            if self._may_leave_null and len(scored) != len(rows):
                rows = rows.drop(np.flatnonzero(np.isin(rows.position, failed.rows)))
                columns = _scattered(columns, scored.position, rows.position)
                scored = rows
            return Applied([self._with_columns(scored, columns)], failed, agreements=agreements)

    @property
    def shadow(self) -> Shadow | None:
        """Comparison of a challenger; None for another step."""
        return self._shadow

    @property
    def outputs(self) -> tuple[str, ...]:
        """Columns that receive the scores."""
        return self._recipe.outputs

    def take_seconds(self) -> float:
        """Return the seconds of the predictions since the last call."""
        return self._scorer.take_seconds()

    def blame_rows_only(self) -> None:
        """See `pipeline.scoring.operations.operation.Operation`."""
        self._scorer.blame_rows_only()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.scoring.operations.operation.Operation`."""
        return self._scorer.is_out_of_memory(error)

    def _score_or_give_up(self, rows: Rows) -> tuple[Rows, np.ndarray, Failures]:
        """Score ``rows``; a challenger that fails on every row scores none, and the job goes on."""
        try:
            return self._scorer.score(rows)
        except ModelError:
            if self._shadow is None:
                raise
            none = np.empty((0, len(self._recipe.outputs)), dtype=self._scorer.output.dtype)
            return rows.select(np.empty(0, np.int64)), none[:, 0], Failures(rows.position)

    def _compare(self, rows: Rows, scores: np.ndarray, shadow: Shadow, *, errors: int) -> Agreement:
        """Compare the scores of ``rows`` with another column."""
        other = np.asarray(rows.table.column(shadow.column).cast(pa.float64(), safe=False).to_numpy())
        return compare_scores(scores.astype(np.float64), other, decision=shadow.decision, errors=errors)

    def _chosen(self, rows: Rows) -> Rows:
        """Return the rows to score."""
        if self._where is None:
            return rows
        return rows.matching(self._where.mask(rows.table))

    def _with_columns(self, rows: Rows, scores: Sequence[pa.Array]) -> Rows:
        """Return the passed columns and ``scores``, one array [rows] for each output."""
        outputs, table = self._recipe.outputs, rows.table
        taken = set(outputs)
        passed = [name for name in table.column_names if name not in taken] if self._passed is None else self._passed
        columns: list[pa.ChunkedArray | pa.Array] = [table.column(name) for name in passed]
        return Rows(pa.Table.from_arrays([*columns, *scores], names=[*passed, *outputs]), rows.position)


def _scattered(columns: Sequence[pa.Array], scored: np.ndarray, rows: np.ndarray) -> list[pa.Array]:
    """Return ``columns``, which are of the rows ``scored``, for all ``rows``, with null for the others.

    :param scored: positions in the batch, ascending, each also in ``rows``.
    """
    index = np.searchsorted(scored, rows)
    places = pa.array(index, mask=~np.isin(rows, scored))
    return [column.take(places) for column in columns]
