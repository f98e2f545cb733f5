"""`ScoreOperation`: the contract of a model, its prediction, and the columns that receive the scores."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.common.stopwatch import Stopwatch
from pipeline.errors import ModelError, StepFailed
from pipeline.models.model import Predictor
from pipeline.plan.recipe import ScoreRecipe
from pipeline.scoring.bisection import NoRowWorksError, bisect, blame_rows
from pipeline.scoring.contract import beyond_finite, check, check_matrix
from pipeline.scoring.operations.operation import Applied
from pipeline.scoring.outputs import check_scores, score_dtype
from pipeline.scoring.rows import Failures, Rows
from pipeline.sources.filters.parse import parse_filter


class ScoreOperation:
    """A ``score`` step with its model loaded."""

    phase: Literal["steps", "score"] = "score"

    def __init__(
        self,
        recipe: ScoreRecipe,
        predictor: Predictor,
        *,
        finite: Collection[str] = (),
        passed: Sequence[str] | None = None,
    ) -> None:
        """Prepare to score.

        :param finite: further columns that rules require to be finite, and that nothing has checked before.
        :param passed: columns to pass on. Default: all, less those that the scores replace.
        """
        self.watch = Stopwatch()
        self._recipe = recipe
        self._predictor = predictor
        self._passed = passed
        self._where = None if recipe.where is None else parse_filter(recipe.where)
        self._too_large: tuple[type[BaseException], ...] = (MemoryError, *predictor.out_of_memory_errors())
        self._worked = False
        """True if the model returned for some row."""
        # Check for infinities in the float32 matrix: it is almost free there, and catches values that overflow float32.
        required = {*finite, *(rule.column for rule in recipe.rules if rule.finite)}
        self.finite = frozenset(required & set(recipe.features))
        """Features in which infinite values are found in the model's matrix."""
        self._rules = beyond_finite(recipe.rules, self.finite)

    @property
    def scores_all(self) -> bool:
        """True if every row is scored."""
        return self._where is None

    def apply(self, rows: Rows) -> Applied:
        """Check the contract of the model, predict, and add the columns of the scores.

        :raises ModelError: when the model fails on every row.
        :raises BadPrediction: when the model does not give one result per row.
        """
        with self.watch:
            scored, matrix, rejected = self._encode(self._chosen(rows))
            scores, failures = self._predict(matrix)
            scored, failed = scored.reject(failures)
            failed = Failures.merged([rejected, failed])
            columns = [pa.array(scores)] if scores.ndim == 1 else list(map(pa.array, np.ascontiguousarray(scores.T)))
            if self._where is not None:
                rows = rows.select(np.flatnonzero(~np.isin(rows.position, failed.rows)))
                columns = _scattered(columns, scored.position, rows.position)
                scored = rows
            return Applied([self._with_columns(scored, columns)], failed)

    def blame_rows_only(self) -> None:
        """See `pipeline.scoring.operations.operation.Operation`."""
        self._worked = True

    def out_of_memory_errors(self) -> tuple[type[BaseException], ...]:
        """See `pipeline.scoring.operations.operation.Operation`."""
        return self._too_large

    def _encode(self, rows: Rows) -> tuple[Rows, np.ndarray, Failures]:
        """Return the rows that keep the model's contract, their feature matrix, and the other rows as failures."""
        features = self._recipe.features
        expect_columns(rows.table, (*features, *(self._passed or ())))
        rows, rejected = rows.reject(check(rows.table, self._rules, skip_finite=self.finite))
        matrix = self._predictor.encode(rows.table.select(list(features)))
        infinite = check_matrix(matrix, rows.table, features, self.finite)
        if len(infinite):
            matrix = np.delete(matrix, infinite.rows, axis=0)
            rows, overflowing = rows.reject(infinite)
            rejected = Failures.merged([rejected, overflowing])
        return rows, matrix, rejected

    def _predict(self, matrix: np.ndarray) -> tuple[np.ndarray, Failures]:
        """Return the scores of the rows that the model takes, and the other rows by their places in ``matrix``."""
        kind, width = self._recipe.kind, len(self._recipe.outputs)

        def predict(start: int, stop: int) -> np.ndarray:
            with blame_rows("score", never=self._too_large):
                scores = self._predictor.predict(matrix[start:stop], kind=kind)
            return check_scores(scores, rows=stop - start, width=width, kind=kind)

        try:
            outcome = bisect(predict, 0, len(matrix), any_worked=self._worked)
        except NoRowWorksError as error:
            raise ModelError(
                "the model fails on every row",
                where=self._recipe.model.uri,
                found=f"{error.example.message(lines=6)}\non each of {error.tried} rows that were tried",
            ) from error
        self._worked = self._worked or bool(outcome.parts)
        parts = [part.result for part in outcome.parts] or [np.empty((0, width), dtype=score_dtype(kind))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts), outcome.to_failures()

    def _chosen(self, rows: Rows) -> Rows:
        """Return the rows to score."""
        if self._where is None:
            return rows
        return rows.select(np.flatnonzero(self._where.mask(rows.table)))

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


def expect_columns(table: pa.Table, names: Sequence[str]) -> None:
    """Check that a table has the columns that come next.

    :raises StepFailed: for a missing column.
    """
    missing = sorted(set(names) - set(table.column_names))
    if missing:
        near = difflib.get_close_matches(missing[0], table.column_names, n=1)
        raise StepFailed(
            "a column is missing after the steps",
            found=", ".join(table.column_names),
            expected=", ".join(missing),
            next_step=f"did you mean {near[0]}?" if near else "return it from the step",
        )
