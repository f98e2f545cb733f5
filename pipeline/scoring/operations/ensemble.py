"""`EnsembleScorer`: several models for the same rows, whose scores are combined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.plan.recipe import EnsembleRecipe
from pipeline.scoring.operations.combine import combine_scores
from pipeline.scoring.operations.members import Members
from pipeline.scoring.operations.model_scorer import ModelScorer
from pipeline.scoring.rows import Failures, Rows


class EnsembleScorer(Members):
    """The models of a list. A row that one of them rejects is rejected, and those behind it do not see the row."""

    def __init__(self, recipe: EnsembleRecipe, members: Sequence[ModelScorer]) -> None:
        self.output = members[0].output
        self.finite = frozenset[str]()
        """None: a later model may check a column that the first does not."""
        self._recipe = recipe
        self._members = members

    def score(self, rows: Rows) -> tuple[Rows, np.ndarray, Failures]:
        """See `ModelScorer.score`."""
        parts, failures = list[tuple[np.ndarray, np.ndarray]](), list[Failures]()
        for member in self._members:
            rows, scores, failed = member.score(rows)
            parts.append((rows.position, scores))
            failures.append(failed)
        # Rows that a later model rejected are still among the scores of the earlier ones.
        left = [scores[np.searchsorted(position, rows.position)] for position, scores in parts]
        combined = combine_scores(left, self._recipe.combine, weights=self._recipe.weights)
        return rows, combined, Failures.merged(failures)
