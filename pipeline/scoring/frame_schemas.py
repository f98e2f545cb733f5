"""The schemas of the frames that map steps get, planned once for all batches of a job. pandas is not imported here."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from pipeline.plan.recipe import AnyScore, MapRecipe, SelectRecipe, StepRecipe, may_leave_null


@dataclass(frozen=True)
class FrameSchemas:
    """The schemas of the frames of a job's steps, equal for all its batches."""

    never_null: frozenset[str] = frozenset()
    """Columns of the source that have no nulls in the planned files."""
    after: tuple[pa.Schema, ...] = ()
    """Columns after each step; empty while they are being planned. Columns that are not nullable have NumPy's dtype of
    integers or booleans in the next frame."""

    def before_step(self, number: int) -> frozenset[str]:
        """Return the columns without nulls in the frame of step ``number``, from 0."""
        if number == 0 or not self.after:
            return self.never_null
        return never_null_columns(self.after[number - 1])

    def after_step(self, number: int) -> pa.Schema | None:
        """Return the columns after step ``number``; None if they are not planned."""
        return self.after[number] if self.after else None


def never_null_after(step: StepRecipe, never_null: frozenset[str]) -> frozenset[str]:
    """Return the columns planned without nulls after a step.

    :param never_null: those before it.
    """
    if isinstance(step, MapRecipe):
        return never_null_columns(pa.ipc.read_schema(pa.py_buffer(step.frame))) if step.frame else frozenset()
    if isinstance(step, SelectRecipe):
        return frozenset(new for new, old in step.columns if old in never_null)
    if isinstance(step, AnyScore):
        is_whole = not may_leave_null(step)
        return never_null | set(step.outputs) if is_whole else never_null - set(step.outputs)
    return never_null


UNPLANNED = FrameSchemas()
"""Schemas that are not planned yet: every step's frame is found from its rows."""


def never_null_columns(schema: pa.Schema) -> frozenset[str]:
    """Return the columns of ``schema`` that are not nullable."""
    return frozenset(field.name for field in schema if not field.nullable)
