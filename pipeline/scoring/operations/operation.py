"""`Operation`: a step, or consecutive ``map`` steps, applied to some rows of a batch. A chain is a list of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from pipeline.common.agreement import Agreement
from pipeline.common.stopwatch import Stopwatch
from pipeline.models.model import OutputType
from pipeline.scoring.rows import Failures, Rows


@dataclass(frozen=True, slots=True)
class Applied:
    """What an operation made of some rows: each of them is in a part, failed, or dropped."""

    parts: list[Rows]
    """Remaining rows, in order. A step that raised was called on each part alone."""
    failures: Failures = field(default_factory=Failures)
    """Rejected rows, by their positions in the batch."""
    dropped: int = 0
    """Rows that the operation filtered, counted when it returned."""
    agreements: Mapping[str, Agreement] = field(default_factory=dict)
    """Comparison of a challenger, by its output column."""


class RowScorer(Protocol):
    """The model or models of a ``score`` step."""

    output: OutputType
    """Type and number of the scores of a row."""
    finite: frozenset[str]
    """Features whose infinite values are found in every row that is scored."""

    def score(self, rows: Rows) -> tuple[Rows, np.ndarray, Failures]:
        """Return the rows that the models take, their scores [rows] or [rows, outputs], and the others as failures."""

    def take_seconds(self) -> float:
        """Return the seconds of the predictions since the last call."""

    def blame_rows_only(self) -> None:
        """See `Operation`."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `Operation`."""


class Operation(Protocol):
    """A step at work. An operation is not thread-safe."""

    phase: Literal["steps", "score"]
    """Time of a receipt that ``watch`` adds to."""
    watch: Stopwatch

    def apply(self, rows: Rows) -> Applied:
        """Apply the step to ``rows``.

        :raises StepFailed: when the step breaks its contract, or fails on every row.
        """

    def blame_rows_only(self) -> None:
        """Take for granted that the step works on some row: if every row fails, blame the rows, not the step."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return True if ``error``, raised by `apply`, says that memory ran out; `MemoryError` always does."""
