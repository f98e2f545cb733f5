"""`SelectOperation`: go on with some columns, under new names."""

from __future__ import annotations

from typing import Literal

from pipeline.common.stopwatch import Stopwatch
from pipeline.plan.recipe import SelectRecipe
from pipeline.scoring.operations.operation import Applied
from pipeline.scoring.rows import Rows


class SelectOperation:
    """A ``select`` step."""

    phase: Literal["steps", "score"] = "steps"

    def __init__(self, recipe: SelectRecipe) -> None:
        self.watch = Stopwatch()
        self._new = [new for new, _ in recipe.columns]
        self._old = [old for _, old in recipe.columns]

    def apply(self, rows: Rows) -> Applied:
        """Select and rename columns."""
        with self.watch:
            return Applied([Rows(rows.table.select(self._old).rename_columns(self._new), rows.position)])

    def blame_rows_only(self) -> None:
        """Do nothing: a selection raises for no row."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.scoring.operations.operation.Operation`."""
        return False
