"""`FilterOperation`: drop the rows for which a condition is not true."""

from __future__ import annotations

from typing import Literal

from pipeline.common.stopwatch import Stopwatch
from pipeline.plan.recipe import FilterRecipe
from pipeline.scoring.operations.operation import Applied
from pipeline.scoring.rows import Rows
from pipeline.sources.filters.parse import parse_filter


class FilterOperation:
    """A ``filter`` step. Nulls follow SQL, as in ``source.filter``."""

    phase: Literal["steps", "score"] = "steps"

    def __init__(self, recipe: FilterRecipe) -> None:
        self.watch = Stopwatch()
        self._filter = parse_filter(recipe.condition)

    def apply(self, rows: Rows) -> Applied:
        """Drop rows.

        :raises SpecError: if Arrow cannot compute the condition, because an integer overflows.
        """
        with self.watch:
            kept = rows.matching(self._filter.mask(rows.table))
        return Applied([kept], dropped=len(rows) - len(kept))

    def blame_rows_only(self) -> None:
        """Do nothing: a condition raises for no row."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.scoring.operations.operation.Operation`."""
        return False
