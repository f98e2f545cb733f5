"""`ModelScorer`: the contract of one model, and its prediction for the rows that keep it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.common.reasons import Reason, ReasonKind
from pipeline.common.secrets import redact
from pipeline.common.step_output import of_step
from pipeline.common.stopwatch import Stopwatch
from pipeline.errors import ModelError, StepFailed
from pipeline.models.flavors import find_flavor
from pipeline.models.model import OutputType, Predictor
from pipeline.models.outputs import output_type
from pipeline.plan.recipe import ColumnRule, ScoreRecipe
from pipeline.scoring.bisection import MAX_FAILED_ROWS, NoRowWorksError, bisect, blame_rows
from pipeline.scoring.contract import beyond_finite, check, check_matrix
from pipeline.scoring.operations.shared_matrix import EncodedRows, SharedMatrix
from pipeline.scoring.outputs import check_scores
from pipeline.scoring.rows import Failures, Rows


class ModelScorer:
    """A loaded model that scores the rows of a step."""

    def __init__(
        self,
        recipe: ScoreRecipe,
        predictor: Predictor,
        *,
        finite: Collection[str] = (),
        shared: SharedMatrix | None = None,
    ) -> None:
        """Prepare to score.

        :param finite: further columns that rules require to be finite, and that nothing has checked before.
        :param shared: matrix shared with other models that encode the same columns.
        """
        self.watch = Stopwatch()
        """Time of the predictions alone."""
        self._shared = shared
        found = output_type(recipe.model, recipe.kind)
        width = len(recipe.outputs)
        if found is None:
            found = OutputType(recipe.kind, "float32", width)
        self.output = found if found.is_list else replace(found, width=width)
        """Type and number of the scores of a row."""
        self._recipe = recipe
        self._name = recipe.model.name
        self._predictor = predictor
        self._worked = False
        """True if the model returned for some row."""
        self._refused = 0
        """Rows that a service has refused."""
        # Check for infinities in the float32 matrix: it is almost free there, and catches values that overflow float32.
        required = {*finite, *(rule.column for rule in recipe.rules if rule.finite)}
        has_matrix = find_flavor(recipe.model.flavor).takes == "matrix"
        self.finite = frozenset(required & set(recipe.features)) if has_matrix else frozenset[str]()
        """Features in which infinite values are found in the model's matrix."""
        self._rules = beyond_finite(recipe.rules, self.finite)

    def score(self, rows: Rows) -> tuple[Rows, np.ndarray, Failures]:
        """Return the rows that the model takes, their scores [rows] or [rows, outputs], and the others as failures.

        :raises StepFailed: when a feature is missing.
        :raises ModelError: when the model fails on every row.
        :raises BadPrediction: when the model does not give one result per row.
        """
        rows, matrix, rejected = self.encode(rows)
        scores, failures = self.predict(matrix)
        rows, failed = rows.reject(failures)
        return rows, scores, Failures.merged([rejected, failed])

    @property
    def checks(self) -> tuple[tuple[ColumnRule, ...], frozenset[str]]:
        """Everything that `encode` checks: scorers with equal checks reject the same rows."""
        return tuple(self._rules), self.finite

    def take_seconds(self) -> float:
        """Return the seconds of the predictions since the last call."""
        watch, self.watch = self.watch, Stopwatch()
        return watch.seconds

    def blame_rows_only(self) -> None:
        """See `pipeline.scoring.operations.operation.Operation`."""
        self._worked = True

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.models.model.Predictor.is_out_of_memory`."""
        return isinstance(error, MemoryError) or self._predictor.is_out_of_memory(error)

    def encode(self, rows: Rows) -> tuple[Rows, np.ndarray, Failures]:
        """Return the rows that keep the model's contract, their feature matrix, and the other rows as failures."""
        features = self._recipe.features
        expect_columns(rows.table, features)
        columns = rows.table.select(list(features))
        encoded = None if self._shared is None else self._shared.find(columns, rows.position)
        if encoded is not None and (encoded.rules, encoded.finite) == (self._rules, self.finite):
            return rows, encoded.matrix, Failures()
        rows, rejected = rows.reject(check(rows.table, self._rules, skip_finite=self.finite))
        if encoded is None or len(rejected):
            matrix = self._predictor.encode(rows.table.select(list(features)))
        else:
            matrix = encoded.matrix
        infinite = self._infinite(matrix, rows.table)
        if len(infinite):
            matrix = np.delete(matrix, infinite.rows, axis=0)
            rows, overflowing = rows.reject(infinite)
            rejected = Failures.merged([rejected, overflowing])
        if self._shared is not None and not len(rejected):
            self._shared.keep(EncodedRows(columns, rows.position, matrix, self._rules, self.finite))
        return rows, matrix, rejected

    def _infinite(self, matrix: np.ndarray, table: pa.Table) -> Failures:
        """Return the rows with infinite values in columns that must be finite. A GPU tells whether there are any."""
        features = self._recipe.features
        look = getattr(self._predictor, "may_have_infinite", None)
        if look is not None and self.finite:
            columns = [index for index, name in enumerate(features) if name in self.finite]
            if not look(matrix, columns):
                return Failures()
        return check_matrix(matrix, table, features, self.finite)

    def predict(self, matrix: np.ndarray) -> tuple[np.ndarray, Failures]:
        """Return the scores of the rows that the model takes, and the other rows by their places in ``matrix``."""
        kind = self._recipe.kind
        if self._recipe.model.endpoint:
            return self._ask_service(matrix)

        def predict(start: int, stop: int) -> np.ndarray:
            with blame_rows("score", never=self.is_out_of_memory), self.watch, of_step(self._name):
                scores = self._predictor.predict(matrix[start:stop], kind=kind)
            return check_scores(scores, rows=stop - start, expected=self.output)

        try:
            outcome = bisect(predict, 0, len(matrix), any_worked=self._worked)
        except NoRowWorksError as error:
            raise ModelError(
                "the model fails on every row",
                where=self._recipe.model.uri,
                found=f"{error.example.message(lines=6)}\non each of {error.tried} rows that were tried",
            ) from error
        self._worked = self._worked or bool(outcome.parts)
        parts = [part.result for part in outcome.parts] or [np.empty((0, self.output.width), dtype=self.output.dtype)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts), outcome.to_failures()

    def _ask_service(self, matrix: np.ndarray) -> tuple[np.ndarray, Failures]:
        """Return the answers to the rows, and those that the service refuses: no row is asked about twice.

        :raises ModelError: when the service refuses many rows, and has taken none.
        """
        with self.watch:
            scores = self._predictor.predict(matrix, kind=self._recipe.kind)
        take_refusals = getattr(self._predictor, "take_refusals", dict)
        refused: dict[int, tuple[str, str]] = dict(sorted(take_refusals().items()))
        self._worked = self._worked or len(refused) < len(matrix)
        self._refused += len(refused)
        if not self._worked and self._refused >= MAX_FAILED_ROWS:
            reason, message = next(iter(refused.values()))
            raise ModelError(
                "the service refuses every row",
                where=self._recipe.model.uri,
                found=f"{reason}: {redact(message)}, and {self._refused:,} rows without an answer",
                next_step="fix the request in score.endpoint; preview shows the first rows",
            )
        check_scores(scores, rows=len(matrix), expected=self.output)
        rows = np.array(list(refused), dtype=np.int64)
        reasons = tuple(str(Reason(ReasonKind.SCORE, reason)) for reason, _ in refused.values())
        messages = tuple(redact(f"{reason}: {message}")[:300] for reason, message in refused.values())
        return np.delete(scores, rows, axis=0), Failures(rows, reasons, messages)


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
