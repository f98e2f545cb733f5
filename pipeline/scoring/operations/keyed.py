"""`KeyedScorer`: a model for each value of a column. The rows of a batch are grouped by model, and scored in groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.common.reasons import Reason, ReasonKind
from pipeline.models.lazy_evaluator import LazyEvaluator
from pipeline.models.model import Predictor
from pipeline.plan.recipe import KeyedRecipe
from pipeline.scoring.arrow import decoded, one_array
from pipeline.scoring.operations.members import Members
from pipeline.scoring.operations.model_scorer import ModelScorer, expect_columns
from pipeline.scoring.operations.shared_matrix import encoding_key
from pipeline.scoring.rows import Failures, Rows

NO_MODEL_REASON = str(Reason(ReasonKind.NO_MODEL, ""))
"""Reason of rows for whose key there is no model."""
_NO_MODEL = -1


Part = tuple[np.ndarray, np.ndarray]
"""Positions of scored rows in the batch, int64 [rows], and their scores."""


class KeyedScorer(Members):
    """The models of a step with ``by``. A model is loaded for the rows of its key, and released behind them."""

    def __init__(self, recipe: KeyedRecipe, members: Sequence[ModelScorer], predictors: Sequence[Predictor]) -> None:
        """:param predictors: those of ``members``."""
        self.output = members[0].output
        self.finite = frozenset[str]()
        """None: a model sees its own rows only."""
        self._recipe = recipe
        self._members = members
        self._predictors = predictors
        self._by_key = {key: member for member, key in enumerate(recipe.values)}
        self._other = len(recipe.values) if recipe.other == "model" else _NO_MODEL
        needed = {recipe.by: None}
        for member in recipe.members:
            needed |= dict.fromkeys((*member.features, *(rule.column for rule in member.rules)))
        self._columns = list(needed)
        self._is_backwards = False
        """True if the next batch goes through the keys backwards."""
        keys = {encoding_key(member) for member in recipe.members}
        self._is_uniform = len(keys) == 1 and None not in keys and len({member.checks for member in members}) == 1
        """True if all models encode and check rows in the same way."""

    def score(self, rows: Rows) -> tuple[Rows, np.ndarray, Failures]:
        """See `ModelScorer.score`. Rows without a model are failures, or in no result where others get null."""
        expect_columns(rows.table, self._columns)
        slim = Rows(rows.table.select(self._columns), rows.position)
        chosen = self._choose(slim.table.column(self._recipe.by))
        failures = [self._without_model(slim, chosen)] if self._recipe.other == "reject" else []
        with_model = np.flatnonzero(chosen != _NO_MODEL)
        if len(with_model) < len(slim):
            slim, chosen = slim.select(with_model), chosen[with_model]
        parts, rejected = (self._score_encoded if self._is_uniform else self._score_groups)(slim, chosen)
        return *self._joined(rows, parts), Failures.merged([*failures, *rejected])

    def _score_groups(self, rows: Rows, chosen: np.ndarray) -> tuple[list[Part], list[Failures]]:
        """Score the rows of each model; each encodes its own."""
        order = np.argsort(chosen, kind="stable")
        rows, parts, failures = rows.select(order), list[Part](), list[Failures]()
        for member, start, stop in self._groups(chosen[order]):
            scored, scores, failed = self._members[member].score(rows.slice(start, stop))
            parts.append((scored.position, scores))
            failures.append(failed)
            self._release(member)
        return parts, failures

    def _score_encoded(self, rows: Rows, chosen: np.ndarray) -> tuple[list[Part], list[Failures]]:
        """Encode all rows once, as every model does, and score the rows of each model."""
        if not len(rows):
            return [], []
        first = int(chosen.max() if self._is_backwards else chosen.min())
        kept, matrix, rejected = self._members[first].encode(rows)
        if len(rejected):
            chosen = chosen[~np.isin(rows.position, rejected.rows)]
        order = np.argsort(chosen, kind="stable")
        matrix, position = matrix[order], kept.position[order]
        parts, failures = list[Part](), [rejected]
        for member, start, stop in self._groups(chosen[order]):
            scores, failed = self._members[member].predict(matrix[start:stop])
            places = position[start:stop]
            parts.append((np.delete(places, failed.rows), scores))
            failures.append(failed.renumber(places))
            self._release(member)
        self._release(first)
        return parts, failures

    def _release(self, member: int) -> None:
        predictor = self._predictors[member]
        if isinstance(predictor, LazyEvaluator):
            predictor.release()

    def _choose(self, column: pa.ChunkedArray) -> np.ndarray:
        """Return the number of the member for each row, int64 [rows]; `_NO_MODEL` without one."""
        codes = decoded(one_array(column)).cast(pa.string()).dictionary_encode()
        members = [self._by_key.get(key, self._other) for key in codes.dictionary.to_pylist()]
        # The last place is that of nulls.
        places = codes.indices.fill_null(len(members)).to_numpy(zero_copy_only=False)
        chosen: np.ndarray = np.array([*members, self._other], dtype=np.int64)[places]
        return chosen

    def _groups(self, members: np.ndarray) -> list[tuple[int, int, int]]:
        """Return number, start and stop of each member's rows in ``members``, which is sorted.

        The order is that of the keys, in every second batch backwards: the models used last are still in memory.
        """
        numbers, starts = np.unique(members, return_index=True)
        stops = (*starts.tolist()[1:], len(members))
        groups = list(zip(numbers.tolist(), starts.tolist(), stops, strict=False))
        self._is_backwards = not self._is_backwards
        return groups if self._is_backwards else groups[::-1]

    def _without_model(self, rows: Rows, chosen: np.ndarray) -> Failures:
        """Return the rows without a model, by their positions in the batch."""
        lacking = np.flatnonzero(chosen == _NO_MODEL)
        if not len(lacking):
            return Failures()
        by = self._recipe.by
        keys = decoded(one_array(rows.table.column(by).take(pa.array(lacking)))).to_pylist()
        messages = tuple(f"{by} is {'null' if key is None else repr(key)[:100]}: there is no model" for key in keys)
        return Failures(rows.position[lacking], (NO_MODEL_REASON,) * len(lacking), messages)

    def _joined(self, rows: Rows, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Rows, np.ndarray]:
        """Return the scored rows in the order of the batch, and their scores."""
        if not parts:
            none = np.empty((0, self.output.width), dtype=self.output.dtype)
            is_flat = self.output.width == 1 and not self.output.is_list
            return rows.select(np.empty(0, np.int64)), none[:, 0] if is_flat else none
        position, scores = (np.concatenate([part[index] for part in parts]) for index in (0, 1))
        order = np.argsort(position)
        position, scores = position[order], scores[order]
        if len(position) == len(rows):
            return rows, scores
        return rows.select(np.searchsorted(rows.position, position)), scores
