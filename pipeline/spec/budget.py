"""`Budget`: what a job may spend."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from pipeline.spec.fields import SpecModel, spec_error


class Budget(SpecModel):
    """What all runs of a job together may spend: a job that has used it up ends as INCOMPLETE, and keeps everything."""

    cost: float | None = Field(default=None, gt=0.0)
    """Money for services, by the ``prices`` of their endpoints."""
    node_hours: float | None = Field(default=None, gt=0.0)
    """Hours of the machines that have workers of the job, each machine once."""

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if self.cost is None and self.node_hours is None:
            raise spec_error("limits nothing", expected="cost, node_hours, or both")
        return self
