"""Score one batch, from the source's columns to the output's: contract, then the steps in order. No Dask, no I/O.

Every row ends in exactly one place: the output, the rejects with a reason, or the filtered rows, which a step dropped.
When memory runs short the batch is halved, and later batches start with the size that fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import iadd
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.common.agreement import Agreement, merged
from pipeline.common.sketch import SCORES_PER_FEATURE, Sketches, is_in_sample, sample_keys
from pipeline.common.stopwatch import Stopwatch
from pipeline.errors import OutOfMemory, ReconciliationFailed, StepFailed
from pipeline.jobs.code_archive import read_archived, read_packed
from pipeline.jobs.layout import family_folder
from pipeline.models.model import Predictor
from pipeline.plan.memory import next_batch_rows
from pipeline.plan.recipe import ORIGIN, StageRecipe
from pipeline.scoring.arrow import LossyCastError, cast_exactly, one_array, take_rows
from pipeline.scoring.contract import beyond_finite, check
from pipeline.scoring.operations.chain import open_operations
from pipeline.scoring.operations.model_scorer import expect_columns
from pipeline.scoring.operations.scores import ScoreOperation
from pipeline.scoring.outputs import REJECT_FIELDS
from pipeline.scoring.rows import Failures, Rows
from pipeline.scoring.steps import Step, load_steps

if TYPE_CHECKING:
    from pipeline.sources import SourceBatch

_KEYS = 8192
"""Rows whose keys are made at a time: new memory for the keys of a batch costs more than to make them."""
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
    agreements: Mapping[str, Agreement] = field(default_factory=dict)
    """Comparison of each challenger, by its output column."""
    sketches: Sketches = field(default_factory=Sketches)
    """Distributions of the scores, and of the features in a sample of the rows."""
    usage: Mapping[str, float] = field(default_factory=dict)
    """Amounts that models counted themselves, where no evaluator takes them; see `EngineUse.usage`."""


@dataclass(frozen=True)
class _ScoredRows:
    """Output of some rows of a batch."""

    rows: Rows
    """Rows in the output schema."""
    failures: Failures
    """Rejected rows, by their positions in the batch."""
    dropped: int = 0
    """Rows that steps dropped, counted when the step returned."""
    agreements: Mapping[str, Agreement] = field(default_factory=dict)
    sketches: Sketches = field(default_factory=Sketches)

    @staticmethod
    def concat(parts: Sequence[_ScoredRows], schema: pa.Schema) -> _ScoredRows:
        """Concatenate ``parts`` in order; without parts, return no rows, with ``schema``."""
        if len(parts) == 1:
            return parts[0]
        return _ScoredRows(
            Rows.concat([part.rows for part in parts], schema),
            Failures.merged([part.failures for part in parts]),
            sum(part.dropped for part in parts),
            reduce(merged, (part.agreements for part in parts), {}),
            reduce(iadd, (part.sketches for part in parts), Sketches()),
        )


@dataclass
class Scorer:
    """A scorer of the batches of a partition. The scorer is not thread-safe; its predictors are."""

    recipe: StageRecipe
    predictors: Sequence[Predictor]
    """Loaded models of the ``score`` steps, in order."""
    steps: Sequence[Step] | None = None
    """Map steps. Default: those of the recipe, imported now."""
    batch_rows: int = 0
    """Rows per call of `_score_rows`; fewer than the recipe's after memory ran short."""
    _fitted: int = field(default=0, init=False)
    _output_watch: Stopwatch = field(default_factory=Stopwatch, init=False)

    def __post_init__(self) -> None:
        self.batch_rows = self.batch_rows or self.recipe.batch_rows
        if self.steps is None:
            self.steps = recipe_steps(self.recipe)
        self._operations = open_operations(self.recipe, steps=self.steps, predictors=self.predictors)
        self._schema = self.recipe.visible_schema
        first = self._operations[0] if self._operations else None
        self._in_matrix = first.finite if isinstance(first, ScoreOperation) else frozenset()
        """Columns of the source in which the first operation finds infinite values."""
        self._source_rules = beyond_finite(self.recipe.source_rules, self._in_matrix)
        self._sketched_scores = self.recipe.score_columns if self.recipe.sketch_every else ()
        self._row_numbers = np.empty(0, dtype=np.int64)
        self._keys = np.empty(_KEYS, dtype=np.uint64)
        self._samples: dict[int, np.ndarray] = {}
        """Rows of the batch in each sample; see `_in_sample`."""

    def score_batch(self, batch: SourceBatch, *, paths: Sequence[str] = ()) -> ScoredBatch:
        """Score the rows of ``batch``, in pieces that fit in memory.

        :param paths: path of each fragment of the partition, for the rejects.
        :raises OutOfMemory: when even `MIN_HALVED_ROWS` rows need more memory than there is.
        :raises StepFailed: when a step breaks its contract, or fails on every row.
        :raises BadPrediction: when the model does not give one result per row.
        """
        self._output_watch = Stopwatch()
        for operation in self._operations:
            operation.watch = Stopwatch()
            if batch.reasons:  # in a retry every row failed once already
                operation.blame_rows_only()
        self._row_numbers, self._samples = batch.row, {}
        rows, parts = Rows.from_table(batch.table), list[_ScoredRows]()
        if batch.problems:
            rows, unreadable = rows.reject(_unreadable_rows(batch))
            parts.append(_ScoredRows(Rows.concat([], self._schema), unreadable))
        start = 0
        while start < len(rows):
            stop = min(start + self.batch_rows, len(rows))
            try:
                parts.append(self._score_rows(rows.slice(start, stop)))
            except Exception as error:
                if not self._is_out_of_memory(error):
                    raise
                self._shrink_batch(stop - start, error)
                continue
            start = stop
            self._grow_batch()
        scored = _ScoredRows.concat(parts, self._schema)
        if scored.agreements:
            scored = replace(scored, agreements=merged(scored.agreements, self._take_seconds()))
        return self._count_rows(batch, scored, paths)

    def _is_out_of_memory(self, error: BaseException) -> bool:
        """Return True if fewer rows may avoid ``error``."""
        return isinstance(error, MemoryError) or any(one.is_out_of_memory(error) for one in self._operations)

    def _take_seconds(self) -> dict[str, Agreement]:
        """Return the seconds of each challenger and of the model it is compared with, since the last call."""
        seconds: dict[str, float] = {}
        taken: dict[str, Agreement] = {}
        for operation in self._operations:
            if isinstance(operation, ScoreOperation):
                own = operation.take_seconds()
                if operation.shadow is not None:
                    other = seconds.get(operation.shadow.column, 0.0)
                    taken[operation.outputs[0]] = Agreement(seconds=own, other_seconds=other)
                seconds |= dict.fromkeys(operation.outputs, own)
        return taken

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
        """Check the contract of the source, apply the operations in order, and assemble the output columns."""
        rows, rejected = rows.reject(check(rows.table, self._source_rules, skip_finite=self._in_matrix))
        parts, failures, dropped, agreements = [rows], [rejected], 0, dict[str, Agreement]()
        sketches, features = Sketches(), list(self.recipe.sketched_features)
        for operation in self._operations:
            applied = [operation.apply(part) for part in parts]
            if features and isinstance(operation, ScoreOperation):
                with operation.watch:
                    for part, result in zip(parts, applied, strict=True):
                        self._sketch_features(sketches, part, result.failures, features)
                    seen = {name for part in parts for name in part.table.column_names}
                    features = [name for name in features if name not in seen]
            parts = [part for one in applied for part in one.parts]
            failures += [one.failures for one in applied]
            dropped += sum(one.dropped for one in applied)
            agreements = reduce(merged, (one.agreements for one in applied), agreements)
        with self._output_watch:
            output = Rows.concat([self._to_output(part) for part in parts], self._schema)
            if self._sketched_scores:
                scores = Rows(output.table.select(self._sketched_scores), output.position)
                sketches.add(self._sample(scores, max(1, self.recipe.sketch_every // SCORES_PER_FEATURE)).table)
        return _ScoredRows(output, Failures.merged(failures), dropped, agreements, sketches)

    def _sketch_features(self, sketches: Sketches, rows: Rows, failures: Failures, features: Sequence[str]) -> None:
        """Count the features of the sampled rows that a ``score`` step was given and did not reject."""
        names = [name for name in features if name in rows.table.column_names]
        chosen = self._sample(Rows(rows.table.select(names), rows.position), self.recipe.sketch_every)
        if len(failures):
            chosen = chosen.drop(np.flatnonzero(np.isin(chosen.position, failures.rows)))
        sketches.add(chosen.table)

    def _sample(self, rows: Rows, every: int) -> Rows:
        """Return one of ``every`` rows, chosen by the number of the row in its file."""
        if every <= 1:
            return rows
        chosen = np.flatnonzero(self._in_sample(every)[rows.position])
        # So few rows that the cost of each column counts.
        return Rows(rows.table.take(chosen), rows.position[chosen])

    def _in_sample(self, every: int) -> np.ndarray:
        """Return which rows of the batch are in the sample, bool [rows]."""
        if every not in self._samples:
            self._samples[every] = sampled = np.empty(len(self._row_numbers), dtype=bool)
            for start in range(0, len(sampled), _KEYS):
                rows = self._row_numbers[start : start + _KEYS]
                sampled[start : start + _KEYS] = is_in_sample(sample_keys(rows, self._keys[: len(rows)]), every=every)
        return self._samples[every]

    def _to_output(self, rows: Rows) -> Rows:
        """Return the columns of the output, in its schema."""
        if rows.table.schema.equals(self._schema):
            return rows
        expect_columns(rows.table, self._schema.names)
        columns = [_cast(rows.table.column(field.name), field) for field in self._schema]
        return Rows(pa.Table.from_arrays(columns, schema=self._schema), rows.position)

    def _seconds(self, phase: str) -> float:
        return sum(operation.watch.seconds for operation in self._operations if operation.phase == phase)

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
        table = scored.rows.table
        return ScoredBatch(
            table=with_origin(table, batch, scored.rows.position, paths) if self.recipe.keeps_origin else table,
            fragment=fragment,
            rejects=reject_table(batch, failures, paths) if len(failures) else None,
            rejected=rejected.astype(np.int64),
            filtered=(batch.filtered + dropped).astype(np.int64),
            seconds_steps=self._seconds("steps"),
            seconds_score=self._seconds("score") + self._output_watch.seconds,
            agreements=scored.agreements,
            sketches=scored.sketches,
            usage=self._take_usage(),
        )

    def _take_usage(self) -> dict[str, float]:
        usage: dict[str, float] = {}
        for predictor in self.predictors:
            for name, amount in getattr(predictor, "take_usage", dict)().items():
                usage[name] = usage.get(name, 0) + amount
        return usage


def _unreadable_rows(batch: SourceBatch) -> Failures:
    """Return the rows of ``batch`` that could not be read."""
    problems = [(number, problem) for number, problem in enumerate(batch.problems) if problem is not None]
    return Failures(
        np.array([number for number, _ in problems], dtype=np.int64),
        tuple(problem.reason for _, problem in problems),
        tuple(problem.message for _, problem in problems),
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
        stored=recipe.functions.get if recipe.functions else partial(read_packed, recipe.directory),
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


def with_origin(table: pa.Table, batch: SourceBatch, position: np.ndarray, paths: Sequence[str]) -> pa.Table:
    """Return rows of ``batch`` with the hidden columns that name the row of the job's source each comes from.

    :param position: int64 [rows], positions in the batch.
    :param paths: path of each fragment of the partition.
    """
    if batch.origin is not None:
        is_whole = len(position) == batch.origin.num_rows and table.num_rows == len(position)
        origin = batch.origin if is_whole else take_rows(batch.origin, position)
    else:
        index = pa.array(batch.fragment[position], type=pa.int32())
        files = pa.DictionaryArray.from_arrays(index, pa.array(list(paths), type=pa.string()))
        origin = pa.Table.from_arrays([files, pa.array(batch.row[position])], schema=ORIGIN)
    for number, column in enumerate(origin.columns):
        table = table.append_column(ORIGIN.field(number), column)
    return table


def reject_table(batch: SourceBatch, failures: Failures, paths: Sequence[str]) -> pa.Table:
    """Return the rows of ``batch`` that failed, with the columns of `pipeline.scoring.outputs.reject_schema`."""
    rows = take_rows(batch.table, failures.rows)
    if batch.origin is None:
        files, numbers = [paths[index] if paths else "" for index in batch.fragment[failures.rows]], batch.row
        numbers = numbers[failures.rows]
    else:
        files, numbers = (column.to_pylist() for column in take_rows(batch.origin, failures.rows).columns)
    added = (files, numbers, failures.reasons, failures.messages)
    for (name, kind), values in zip(REJECT_FIELDS, added, strict=True):
        rows = rows.append_column(pa.field(name, kind), pa.array(values, type=kind))
    return rows.replace_schema_metadata(None)
