"""`Members`: what an operation of several models passes on to each of them."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.scoring.operations.model_scorer import ModelScorer


class Members:
    """An operation of several models."""

    _members: Sequence[ModelScorer]

    def take_seconds(self) -> float:
        """Return the seconds of the predictions since the last call."""
        return sum(member.take_seconds() for member in self._members)

    def blame_rows_only(self) -> None:
        """See `pipeline.scoring.operations.operation.Operation`."""
        for member in self._members:
            member.blame_rows_only()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.models.model.Predictor.is_out_of_memory`."""
        return any(member.is_out_of_memory(error) for member in self._members)
