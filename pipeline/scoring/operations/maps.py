"""`MapOperation`: consecutive ``map`` steps, called one after the other on the same frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pipeline.common.stopwatch import Stopwatch
from pipeline.scoring.frame_schemas import FrameSchemas
from pipeline.scoring.operations.operation import Applied
from pipeline.scoring.rows import Rows
from pipeline.scoring.steps import Step


class MapOperation:
    """Consecutive ``map`` steps. Where one raises, all are called again on fewer rows."""

    phase: Literal["steps", "score"] = "steps"

    def __init__(self, steps: Sequence[Step], schemas: FrameSchemas) -> None:
        self.watch = Stopwatch()
        self._steps = steps
        self._schemas = schemas
        self._worked = False
        """True if the steps returned for some row; steps that fail on every row are then not at fault."""

    def apply(self, rows: Rows) -> Applied:
        """See `pipeline.scoring.operations.operation.Operation`."""
        from pipeline.scoring.step_frames import map_rows  # pandas: a third of a worker's imports, for steps only

        with self.watch:
            parts, failures = map_rows(self._steps, rows, schemas=self._schemas, any_worked=self._worked)
        count = sum(map(len, parts))
        self._worked = self._worked or count > 0
        return Applied(parts, failures, dropped=len(rows) - count - len(failures))

    def blame_rows_only(self) -> None:
        """See `pipeline.scoring.operations.operation.Operation`."""
        self._worked = True

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.scoring.operations.operation.Operation`."""
        return False
