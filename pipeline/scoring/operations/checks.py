"""`CheckOperation`: the contract of columns that a step has made."""

from __future__ import annotations

from typing import Literal

from pipeline.common.stopwatch import Stopwatch
from pipeline.plan.recipe import CheckRecipe
from pipeline.scoring.contract import check
from pipeline.scoring.operations.operation import Applied
from pipeline.scoring.rows import Rows


class CheckOperation:
    """A part of the contract, checked between two steps."""

    phase: Literal["steps", "score"] = "steps"

    def __init__(self, recipe: CheckRecipe) -> None:
        self.watch = Stopwatch()
        self._rules = recipe.rules

    def apply(self, rows: Rows) -> Applied:
        """Reject the rows that break a rule."""
        with self.watch:
            kept, rejected = rows.reject(check(rows.table, self._rules))
        return Applied([kept], rejected)

    def blame_rows_only(self) -> None:
        """Do nothing: a rule always blames rows."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.scoring.operations.operation.Operation`."""
        return False
