"""Score one batch, from the source's columns to the output's: contract, steps, model. No Dask, no I/O.

Every row ends in exactly one place: the output, the rejects with a reason, or the filtered rows, which a step dropped.
When memory runs short the batch is halved, and later batches start with the size that fitted.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.common.stopwatch import Stopwatch
from pipeline.errors import ModelError, OutOfMemory, ReconciliationFailed, StepFailed
from pipeline.jobs.code_archive import read_archived
from pipeline.jobs.layout import family_folder
from pipeline.models.model import Predictor
from pipeline.plan.memory import next_batch_rows
from pipeline.plan.recipe import StageRecipe
from pipeline.scoring.arrow import LossyCastError, cast_exactly, one_array, take_rows
from pipeline.scoring.bisection import NoRowWorksError, bisect, blame_rows
from pipeline.scoring.contract import beyond_finite, check, check_matrix
from pipeline.scoring.frame_schemas import FrameSchemas
from pipeline.scoring.outputs import REJECT_FIELDS, check_scores, score_dtype
from pipeline.scoring.rows import Failures, Rows
from pipeline.scoring.steps import Step, load_steps

if TYPE_CHECKING:
    from pipeline.sources import SourceBatch

MIN_HALVED_ROWS = 1024
"""Batches of at most this many rows are not halved."""


@dataclass(frozen=True)
class ScoredBatch:
    """Result of a `SourceBatch`: its rows out, rejected and filtered."""

    table: pa.Table
    """Output rows in the output schema and in the order of the input."""
    fragment: np.ndarray
    """int32 [rows out], index of the fragment of each row."""
    rejects: pa.Table | None
    """Rejected rows with the source's columns and the reason (see `reject_schema`); None if no row was rejected."""
    rejected: np.ndarray
    """int64 [fragments], rejected rows."""
    filtered: np.ndarray
    """int64 [fragments], rows dropped by the source's filter or by a step."""
    seconds_steps: float
    seconds_score: float


@dataclass(frozen=True)
class _ScoredRows:
    """Output of some rows of a batch."""

    rows: Rows
    """Rows in the output schema."""
    failures: Failures
    """Rejected rows, by their positions in the batch."""
    dropped: int = 0
    """Rows that steps dropped, counted when the step returned."""

    @staticmethod
    def concat(parts: Sequence[_ScoredRows], schema: pa.Schema) -> _ScoredRows:
        """Concatenate ``parts`` in order; without parts, return no rows, with ``schema``."""
        if len(parts) == 1:
            return parts[0]
        return _ScoredRows(
            Rows.concat([part.rows for part in parts], schema),
            Failures.merged([part.failures for part in parts]),
            sum(part.dropped for part in parts),
        )


@dataclass
class Scorer:
    """A scorer of the batches of a partition. The scorer is not thread-safe; its predictor is."""

    recipe: StageRecipe
    predictor: Predictor
    steps: Sequence[Step] | None = None
    """Map steps. Default: those of the recipe, imported now."""
    batch_rows: int = 0
    """Rows per call of `_score_rows`; fewer than the recipe's after memory ran short."""
    _fitted: int = field(default=0, init=False)
    _steps_worked: bool = field(default=False, init=False)
    """True if the steps returned for some row; a step that fails on every row is then not at fault."""
    _model_worked: bool = field(default=False, init=False)
    """True if the model returned for some row."""
    _steps_watch: Stopwatch = field(default_factory=Stopwatch, init=False)
    _model_watch: Stopwatch = field(default_factory=Stopwatch, init=False)

    def __post_init__(self) -> None:
        self.batch_rows = self.batch_rows or self.recipe.batch_rows
        if self.steps is None:
            self.steps = recipe_steps(self.recipe)
        self._too_large: tuple[type[BaseException], ...] = (MemoryError, *self.predictor.out_of_memory_errors())
        self._schema = pa.ipc.read_schema(pa.py_buffer(self.recipe.output_schema))
        self._frames = FrameSchemas(
            frozenset(self.recipe.never_null),
            tuple(pa.ipc.read_schema(pa.py_buffer(schema)) for schema in self.recipe.frame_schemas),
        )
        rules = (*(() if self.recipe.maps else self.recipe.source_rules), *self.recipe.score_rules)
        # Check for infinities in the float32 matrix: it is almost free there, and catches values that overflow float32.
        self._finite = frozenset(rule.column for rule in rules if rule.finite) & set(self.recipe.score.features)
        self._in_matrix = frozenset() if self.recipe.maps else self._finite
        self._source_rules = beyond_finite(self.recipe.source_rules, self._in_matrix)
        self._score_rules = beyond_finite(self.recipe.score_rules, self._finite)

    def score_batch(self, batch: SourceBatch, *, paths: Sequence[str] = ()) -> ScoredBatch:
        """Score the rows of ``batch``, in pieces that fit in memory.

        :param paths: path of each fragment of the partition, for the rejects.
        :raises OutOfMemory: when even `MIN_HALVED_ROWS` rows need more memory than there is.
        :raises StepFailed: when a step breaks its contract, or fails on every row.
        :raises BadPrediction: when the model does not give one result per row.
        """
        self._steps_watch, self._model_watch = Stopwatch(), Stopwatch()
        if batch.reasons:
            # In a retry every row failed once already. If all fail again, blame the rows, not the step or the model.
            self._steps_worked = self._model_worked = True
        rows, parts = Rows.from_table(batch.table), list[_ScoredRows]()
        start = 0
        while start < len(rows):
            stop = min(start + self.batch_rows, len(rows))
            try:
                parts.append(self._score_rows(rows.slice(start, stop)))
            except self._too_large as error:
                self._shrink_batch(stop - start, error)
                continue
            start = stop
            self._grow_batch()
        return self._count_rows(batch, _ScoredRows.concat(parts, self._schema), paths)

    def _shrink_batch(self, rows: int, error: BaseException) -> None:
        if rows <= MIN_HALVED_ROWS:
            raise OutOfMemory(
                "a batch does not fit in memory, even at its smallest size",
                found=f"{type(error).__name__} with {rows:,} rows",
                expected=f"room for {MIN_HALVED_ROWS:,} rows",
                next_step="give the workers more memory, or fewer threads each",
            ) from error
        self.batch_rows = next_batch_rows(
            rows, outcome="out_of_memory", floor=MIN_HALVED_ROWS, ceiling=self.recipe.batch_rows, successes=0
        )
        self._fitted = 0

    def _grow_batch(self) -> None:
        before, self._fitted = self.batch_rows, self._fitted + 1
        self.batch_rows = next_batch_rows(
            before, outcome="fitted", floor=MIN_HALVED_ROWS, ceiling=self.recipe.batch_rows, successes=self._fitted
        )
        if self.batch_rows != before:
            self._fitted = 0

    def _score_rows(self, rows: Rows) -> _ScoredRows:
        """Check the contract of the source, run the steps, and predict for the rows of each call of the steps."""
        rows, rejected = rows.reject(check(rows.table, self._source_rules, skip_finite=self._in_matrix))
        if not self.steps:
            scored = self._predict_rows(rows)
            return replace(scored, failures=Failures.merged([rejected, scored.failures]))
        from pipeline.scoring.step_frames import map_rows  # pandas: a third of a worker's imports, for steps only

        with self._steps_watch:
            mapped, failed = map_rows(self.steps, rows, schemas=self._frames, any_worked=self._steps_worked)
        count = sum(map(len, mapped))
        self._steps_worked = self._steps_worked or count > 0
        scored = _ScoredRows.concat([self._predict_rows(part) for part in mapped], self._schema)
        failures = Failures.merged([rejected, failed, scored.failures])
        return replace(scored, failures=failures, dropped=len(rows) - count - len(failed))

    def _predict_rows(self, rows: Rows) -> _ScoredRows:
        """Check the contract of the model, predict, and assemble the output columns."""
        kind, width = self.recipe.score.kind, len(self.recipe.score.outputs)
        with self._model_watch:
            rows, matrix, rejected = self._encode_rows(rows)

            def predict(start: int, stop: int) -> np.ndarray:
                with blame_rows("score", never=self._too_large):
                    scores = self.predictor.predict(matrix[start:stop], kind=kind)
                return check_scores(scores, rows=stop - start, width=width, kind=kind)

            try:
                outcome = bisect(predict, 0, len(matrix), any_worked=self._model_worked)
            except NoRowWorksError as error:
                raise ModelError(
                    "the model fails on every row",
                    where=self.recipe.score.model.uri,
                    found=f"{error.example.message(lines=6)}\non each of {error.tried} rows that were tried",
                ) from error
            self._model_worked = self._model_worked or bool(outcome.parts)
            parts = [part.result for part in outcome.parts] or [np.empty((0, width), dtype=score_dtype(kind))]
            scores = parts[0] if len(parts) == 1 else np.concatenate(parts)
            rows, failed = rows.reject(outcome.to_failures())
            return _ScoredRows(self._with_scores(rows, scores), Failures.merged([rejected, failed]))

    def _encode_rows(self, rows: Rows) -> tuple[Rows, np.ndarray, Failures]:
        """Return the rows that keep the model's contract, their feature matrix, and the other rows as failures."""
        features = self.recipe.score.features
        _expect_columns(rows.table, (*features, *self.recipe.score.keep))
        rows, rejected = rows.reject(check(rows.table, self._score_rules, skip_finite=self._finite))
        matrix = self.predictor.encode(rows.table.select(list(features)))
        infinite = check_matrix(matrix, rows.table, features, self._finite)
        if len(infinite):
            matrix = np.delete(matrix, infinite.rows, axis=0)
            rows, overflowing = rows.reject(infinite)
            rejected = Failures.merged([rejected, overflowing])
        return rows, matrix, rejected

    def _with_scores(self, rows: Rows, scores: np.ndarray) -> Rows:
        """Return the kept columns and ``scores``, [rows] or [rows, outputs], in the output schema."""
        columns = [_cast(rows.table.column(name), self._schema.field(name)) for name in self.recipe.score.keep]
        columns += [pa.array(scores)] if scores.ndim == 1 else list(map(pa.array, np.ascontiguousarray(scores.T)))
        return Rows(pa.Table.from_arrays(columns, schema=self._schema), rows.position)

    def _count_rows(self, batch: SourceBatch, scored: _ScoredRows, paths: Sequence[str]) -> ScoredBatch:
        """Count the rows per fragment, and fail if a row was lost or duplicated."""
        count, failures = len(batch.filtered), scored.failures
        is_complete = len(scored.rows) == batch.table.num_rows
        fragment = batch.fragment if is_complete else batch.fragment[scored.rows.position]
        out, rejected = (np.bincount(rows, minlength=count) for rows in (fragment, batch.fragment[failures.rows]))
        dropped = np.bincount(batch.fragment, minlength=count) - out - rejected
        if dropped.min(initial=0) < 0 or dropped.sum() != scored.dropped:
            raise ReconciliationFailed(
                "rows of a batch are unaccounted for",
                found=f"{len(fragment):,} out, {len(failures):,} rejected, {scored.dropped:,} dropped by steps",
                expected=f"{batch.table.num_rows:,} in all",
                next_step="nothing of this attempt was kept; resume, and report it when it happens again",
            )
        return ScoredBatch(
            table=scored.rows.table,
            fragment=fragment,
            rejects=reject_table(batch, failures, paths) if len(failures) else None,
            rejected=rejected.astype(np.int64),
            filtered=(batch.filtered + dropped).astype(np.int64),
            seconds_steps=self._steps_watch.seconds,
            seconds_score=self._model_watch.seconds,
        )


def recipe_steps(recipe: StageRecipe, *, pin_code: bool | None = None) -> tuple[Step, ...]:
    """Import the steps of a recipe; partitions of one job and round share their modules.

    :param pin_code: True: take sources that the job keeps, where a file is not as planned. Default: as the recipe says.
    """
    is_pinned = recipe.pin_code if pin_code is None else pin_code
    return load_steps(
        recipe.maps,
        code=recipe.code,
        import_paths=recipe.import_paths,
        scope=family_folder(recipe.directory) or recipe.job,
        archived=partial(read_archived, recipe.directory, recipe.code) if is_pinned and recipe.directory else None,
    )


def _expect_columns(table: pa.Table, names: Sequence[str]) -> None:
    missing = sorted(set(names) - set(table.column_names))
    if missing:
        near = difflib.get_close_matches(missing[0], table.column_names, n=1)
        raise StepFailed(
            "a column is missing after the steps",
            found=", ".join(table.column_names),
            expected=", ".join(missing),
            next_step=f"did you mean {near[0]}?" if near else "return it from the step",
        )


def _cast(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    """Cast ``column`` to the type of ``field``.

    :raises StepFailed: if a value would change.
    """
    if column.type == field.type:
        return column
    try:
        return cast_exactly(one_array(column), field.type)
    except LossyCastError as error:
        raise StepFailed(
            f"the column {field.name!r} cannot be written in its planned type",
            found=f"{error.value}, type {column.type}",
            expected=f"{field.type}, or values that convert to it without loss",
            next_step="set the dtype of the column in the step, so that it does not depend on the rows",
        ) from error


def reject_table(batch: SourceBatch, failures: Failures, paths: Sequence[str]) -> pa.Table:
    """Return the rows of ``batch`` that failed, with the columns of `pipeline.scoring.outputs.reject_schema`."""
    rows = take_rows(batch.table, failures.rows)
    files = [paths[index] for index in batch.fragment[failures.rows]] if paths else None
    added = (files or [""] * len(failures), batch.row[failures.rows], failures.reasons, failures.messages)
    for (name, kind), values in zip(REJECT_FIELDS, added, strict=True):
        rows = rows.append_column(pa.field(name, kind), pa.array(values, type=kind))
    return rows.replace_schema_metadata(None)
