"""One batch of rows, from the source's columns to the output's: contract, steps, model. No Dask, no I/O.

Every row of a batch ends in exactly one place: the output, the rejects with a reason, or the filtered, which a step
dropped. When memory runs short the batch is halved, and the size that worked is remembered.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ModelError, OutOfMemory, ReconciliationFailed, StepFailed
from pipeline.models.model import Predictor
from pipeline.plan.memory import next_batch_rows
from pipeline.plan.recipe import MapRecipe, StageRecipe
from pipeline.scoring.arrow import CONVERSION_ERRORS, take_rows
from pipeline.scoring.bisection import NoRowWorksError, RowFailure, RowsError, bisect, blame_rows
from pipeline.scoring.contract import Failures, beyond_finite, check, check_matrix
from pipeline.scoring.outputs import REJECT_FIELDS, check_scores, prediction_schema, reject_schema, score_dtype
from pipeline.scoring.steps import ROW_INDEX, Step, load_steps, run_steps
from pipeline.spec.parts import MapStep

if TYPE_CHECKING:
    from pipeline.sources import SourceBatch

__all__ = ["ROW_INDEX", "ScoredBatch", "Scorer", "frame_schema", "prediction_schema", "reject_schema", "reject_table"]

FLOOR_ROWS = 1024
"""A batch of so few rows is not halved again."""


@dataclass(frozen=True)
class ScoredBatch:
    """What became of the rows of a `SourceBatch`."""

    table: pa.Table
    """Rows that came out, in the output schema, in the order they came in."""
    fragment: np.ndarray
    """int32 [rows out], index of the fragment each is from."""
    rejects: pa.Table | None
    """Rejected rows with the source's columns and why (see `reject_schema`); None when there are none."""
    rejected: np.ndarray
    """int64 [fragments]."""
    filtered: np.ndarray
    """int64 [fragments], dropped by the source's filter or by a step."""
    seconds_steps: float
    seconds_score: float


@dataclass(frozen=True)
class _ScoredRows:
    """Output rows and rejects of some rows of a table, by their positions in it."""

    table: pa.Table
    positions: np.ndarray
    failures: Failures
    dropped: int = 0
    """Rows that steps dropped, as counted where it happened."""

    def moved(self, positions: np.ndarray) -> _ScoredRows:
        """The same, numbered otherwise: ``positions[row]`` in place of ``row``."""
        return replace(self, positions=positions[self.positions], failures=self.failures.moved(positions))

    def behind(self, failures: Failures) -> _ScoredRows:
        """With the rejects of an earlier check beside its own."""
        return replace(self, failures=Failures.merged([failures, self.failures]))


@dataclass
class _Clock:
    steps: float = 0.0
    score: float = 0.0


@dataclass
class Scorer:
    """Scores the batches of a partition. Not for several threads at once; the predictor in it is."""

    recipe: StageRecipe
    predictor: Predictor
    steps: Sequence[Step] | None = None
    """The map steps; default: those of the recipe, imported now."""
    batch_rows: int = 0
    """Rows that are scored at a time; smaller than the recipe's after memory ran short."""
    _fitted: int = field(default=0, init=False)
    _worked: set[str] = field(default_factory=set, init=False)
    _clock: _Clock = field(default_factory=_Clock, init=False)

    def __post_init__(self) -> None:
        self.batch_rows = self.batch_rows or self.recipe.batch_rows
        if self.steps is None:
            self.steps = load_steps(
                self.recipe.maps, import_paths=self.recipe.import_paths, is_mended=self.recipe.round > 0
            )
        self._too_large: tuple[type[BaseException], ...] = (MemoryError, *self.predictor.out_of_memory_errors())
        self._schema = pa.ipc.read_schema(pa.py_buffer(self.recipe.output_schema))
        rules = (*(() if self.recipe.maps else self.recipe.source_rules), *self.recipe.score_rules)
        # Infinity is looked for in the matrix the model gets: there it costs next to nothing, and what only overflows
        # float32 is seen too.
        self._finite = frozenset(rule.column for rule in rules if rule.finite) & set(self.recipe.score.features)
        self._in_matrix = frozenset() if self.recipe.maps else self._finite
        self._source_rules = beyond_finite(self.recipe.source_rules, self._in_matrix)
        self._score_rules = beyond_finite(self.recipe.score_rules, self._finite)

    def score(self, batch: SourceBatch, *, paths: Sequence[str] = ()) -> ScoredBatch:
        """What becomes of the rows of ``batch``.

        :param paths: path of each fragment of the partition, for the rejects.
        :raises OutOfMemory: when even `FLOOR_ROWS` rows need more memory than there is.
        :raises StepFailed: when a step breaks its contract, or fails on whatever row it is given.
        :raises BadPrediction: when the model gives something else than one result a row.
        """
        self._clock = _Clock()
        if batch.reasons:
            # Rows that were rejected before may well be rejected to the last one: that does not speak against the code.
            self._worked |= {"steps", "model"}
        parts: list[_ScoredRows] = []
        start = 0
        while start < batch.table.num_rows:
            rows = min(self.batch_rows, batch.table.num_rows - start)
            try:
                part = self._chain(batch.table.slice(start, rows))
            except self._too_large as error:
                self._shrink(rows, error)
                continue
            parts.append(part.moved(np.arange(start, start + rows, dtype=np.int64)))
            start += rows
            self._grow()
        return self._account(batch, parts, paths)

    def _shrink(self, rows: int, error: BaseException) -> None:
        if rows <= FLOOR_ROWS:
            raise OutOfMemory(
                "a batch does not fit in memory, however small it is cut",
                found=f"{type(error).__name__} with {rows:,} rows",
                expected=f"room for {FLOOR_ROWS:,} rows",
                next_step="give the workers more memory, or fewer threads each",
            ) from error
        self.batch_rows = next_batch_rows(
            rows, outcome="out_of_memory", floor=FLOOR_ROWS, ceiling=self.recipe.batch_rows, successes=0
        )
        self._fitted = 0

    def _grow(self) -> None:
        before, self._fitted = self.batch_rows, self._fitted + 1
        self.batch_rows = next_batch_rows(
            before, outcome="fitted", floor=FLOOR_ROWS, ceiling=self.recipe.batch_rows, successes=self._fitted
        )
        if self.batch_rows != before:
            self._fitted = 0

    def _chain(self, table: pa.Table) -> _ScoredRows:
        """Contract of the source, then the steps, then what each of their results scores to."""
        failures = check(table, self._source_rules, skip_finite=self._in_matrix)
        table, positions = _without(table, failures.rows)
        if not self.steps:
            return self._score_frame(table).moved(positions).behind(failures)
        start = perf_counter()
        frames, failed = _run_steps(self.steps, table, any_worked="steps" in self._worked)
        self._clock.steps += perf_counter() - start
        if any(len(rows) for _, rows in frames):
            self._worked.add("steps")
        whole = _joined([self._score_frame(frame).moved(rows) for frame, rows in frames], self._schema)
        dropped = table.num_rows - sum(len(rows) for _, rows in frames) - len(failed)
        return replace(whole, dropped=dropped).behind(failed).moved(positions).behind(failures)

    def _score_frame(self, table: pa.Table) -> _ScoredRows:
        """Contract of the model, then the model, then the output's columns."""
        start = perf_counter()
        _expect_columns(table, (*self.recipe.score.features, *self.recipe.score.keep))
        failures = check(table, self._score_rules, skip_finite=self._finite)
        table, positions = _without(table, failures.rows)
        matrix = self.predictor.encode(table.select(list(self.recipe.score.features)))
        infinite = check_matrix(matrix, table, self.recipe.score.features, self._finite)
        if len(infinite):
            table, left = _without(table, infinite.rows)
            matrix, failures = matrix[left], Failures.merged([failures, infinite.moved(positions)])
            positions = positions[left]
        scores, failed = self._predict(matrix)
        table, left = _without(table, failed.rows)
        columns = [_cast(table.column(name), self._schema.field(name)) for name in self.recipe.score.keep]
        columns += [pa.array(scores)] if scores.ndim == 1 else list(map(pa.array, np.ascontiguousarray(scores.T)))
        out = pa.Table.from_arrays(columns, schema=self._schema)
        self._clock.score += perf_counter() - start
        return _ScoredRows(out, positions[left], Failures.merged([failures, failed.moved(positions)]))

    def _predict(self, matrix: np.ndarray) -> tuple[np.ndarray, Failures]:
        """Scores of the rows that can be scored, and the other ones."""
        kind, width = self.recipe.score.kind, len(self.recipe.score.outputs)

        def call(start: int, stop: int) -> np.ndarray:
            with blame_rows("score", never=self._too_large):
                scores = self.predictor.predict(matrix[start:stop], kind=kind)
            return check_scores(scores, rows=stop - start, width=width, kind=kind)

        if not len(matrix):
            return np.empty((0, width), dtype=score_dtype(kind)), Failures()
        try:
            found = bisect(call, 0, len(matrix), any_worked="model" in self._worked)
        except NoRowWorksError as error:
            raise ModelError(
                "the model fails on every row",
                where=self.recipe.score.model.uri,
                found=f"{error.example.message(lines=6)}\non each of {error.tried} rows that were tried",
            ) from error
        if found.parts:
            self._worked.add("model")
        parts = [part.result for part in found.parts] or [np.empty((0, width), dtype=score_dtype(kind))]
        scores = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return scores, _failures(found.failures)

    def _account(self, batch: SourceBatch, parts: list[_ScoredRows], paths: Sequence[str]) -> ScoredBatch:
        whole = _joined(parts, self._schema)
        count = len(batch.filtered)
        is_whole = len(whole.positions) == batch.table.num_rows
        fragment = batch.fragment if is_whole else batch.fragment[whole.positions]
        out, rejected = (np.bincount(rows, minlength=count) for rows in (fragment, batch.fragment[whole.failures.rows]))
        dropped = np.bincount(batch.fragment, minlength=count) - out - rejected
        if dropped.min(initial=0) < 0 or dropped.sum() != whole.dropped:
            raise ReconciliationFailed(
                "rows of a batch are unaccounted for",
                found=f"{len(fragment):,} out, {len(whole.failures):,} rejected, {whole.dropped:,} dropped by steps",
                expected=f"{batch.table.num_rows:,} in all",
                next_step="nothing of this attempt was kept; resume, and report it when it happens again",
            )
        return ScoredBatch(
            table=whole.table,
            fragment=fragment,
            rejects=reject_table(batch, whole.failures, paths) if len(whole.failures) else None,
            rejected=rejected.astype(np.int64),
            filtered=(batch.filtered + dropped).astype(np.int64),
            seconds_steps=self._clock.steps,
            seconds_score=self._clock.score,
        )


def frame_schema(
    maps: Sequence[MapStep | MapRecipe],
    sample: SourceBatch | None,
    *,
    schema: pa.Schema | None = None,
    import_paths: Sequence[str] = (),
    is_mended: bool = False,
) -> pa.Schema:
    """Columns that rows have after the map steps, found by running them on a sample.

    :param sample: some rows of the source; None when it has none.
    :param schema: of the source; needed when there is no sample.
    :param is_mended: see `load_steps`.
    :raises StepFailed: when a step cannot be loaded, breaks its contract, or works on no row of the sample.
    """
    if sample is None and schema is None:
        raise ValueError("frame_schema needs a sample or a schema")
    table = schema.empty_table() if sample is None and schema is not None else sample.table  # type: ignore[union-attr]
    steps = load_steps([_map_recipe(step) for step in maps], import_paths=import_paths, is_mended=is_mended)
    if not steps:
        return table.schema
    frames, failed = _run_steps(steps, table, any_worked=False)
    if not frames:
        raise StepFailed(
            "the steps fail on every row of a sample",
            found=f"{failed.messages[0]}\non each of {len(failed)} rows that were tried",
            next_step="mend the step, then run it on a few rows of the source",
        )
    return pa.unify_schemas([frame.schema for frame, _ in frames], promote_options="permissive").remove_metadata()


def _map_recipe(step: MapStep | MapRecipe) -> MapRecipe:
    return step if isinstance(step, MapRecipe) else MapRecipe(step.map, step.dtype_backend)


def _run_steps(
    steps: Sequence[Step], table: pa.Table, *, any_worked: bool
) -> tuple[list[tuple[pa.Table, np.ndarray]], Failures]:
    """Results of ``steps`` on ranges of ``table``, with the positions of their rows; and rows on which they raise."""

    def call(start: int, stop: int) -> tuple[pa.Table, np.ndarray]:
        frame, rows = run_steps(steps, table.slice(start, stop - start))
        return frame, rows + start

    try:
        if not table.num_rows:
            return [call(0, 0)], Failures()
        found = bisect(call, 0, table.num_rows, any_worked=any_worked)
    except RowsError as error:  # on no row at all: nothing to bisect
        raise StepFailed("a step fails on a frame without rows", where=error.source, found=error.message()) from error
    except NoRowWorksError as error:
        raise StepFailed(
            "a step fails on every row",
            where=error.example.source.removeprefix("step:"),
            found=f"{error.example.message(lines=6)}\non each of {error.tried} rows that were tried",
            next_step="mend the step; when these rows are bad and others good, drop them in the step",
        ) from error
    return [part.result for part in found.parts], _failures(found.failures)


def _failures(found: Sequence[RowFailure]) -> Failures:
    rows = np.array([failure.row for failure in found], dtype=np.int64)
    return Failures(rows, tuple(failure.reason for failure in found), tuple(failure.message for failure in found))


def _without(table: pa.Table, rows: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """``table`` less ``rows``, and the positions of those that are left."""
    if not len(rows):
        return table, np.arange(table.num_rows, dtype=np.int64)
    keep = np.ones(table.num_rows, dtype=bool)
    keep[rows] = False
    left = np.flatnonzero(keep)
    return take_rows(table, left), left


def _joined(parts: list[_ScoredRows], schema: pa.Schema) -> _ScoredRows:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return _ScoredRows(schema.empty_table(), np.empty(0, dtype=np.int64), Failures())
    return _ScoredRows(
        pa.concat_tables([part.table for part in parts]),
        np.concatenate([part.positions for part in parts]),
        Failures.merged([part.failures for part in parts]),
        sum(part.dropped for part in parts),
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


def _cast(column: pa.ChunkedArray, wanted: pa.Field) -> pa.ChunkedArray:
    """``column`` in the type that is written, when no value changes by it."""
    if column.type == wanted.type:
        return column
    try:
        if pa.types.is_dictionary(column.type):
            column = pc.cast(column, column.type.value_type)
        if pa.types.is_dictionary(wanted.type):
            column = pc.cast(column, wanted.type.value_type).dictionary_encode()
        return pc.cast(column, wanted.type)
    except CONVERSION_ERRORS as error:
        raise StepFailed(
            f"the column {wanted.name!r} that a step made has another type than it had in the sample",
            found=f"{column.type}: {error}"[:300],
            expected=f"{wanted.type}, or what can be turned into it without a loss",
            next_step="set the dtype of the column in the step, so that it does not depend on the rows",
        ) from error


def reject_table(batch: SourceBatch, failures: Failures, paths: Sequence[str]) -> pa.Table:
    """The rows of ``batch`` that failed, with the columns of `pipeline.scoring.outputs.reject_schema`."""
    rows = take_rows(batch.table, failures.rows)
    files = [paths[index] for index in batch.fragment[failures.rows]] if paths else None
    added = (files or [""] * len(failures), batch.row[failures.rows], failures.reasons, failures.messages)
    for (name, kind), values in zip(REJECT_FIELDS, added, strict=True):
        rows = rows.append_column(pa.field(name, kind), pa.array(values, type=kind))
    return rows.replace_schema_metadata(None)
