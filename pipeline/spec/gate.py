"""The publish gate of a job spec: conditions on the output that must hold before readers see it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.spec.fields import Name, PathText, SpecModel, spec_error

_Distance = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


DISTANCES = ("psi", "js", "ks")
"""Measures of the distance from a baseline."""


class GateRows(SpecModel):
    """Limits for the rows of the output."""

    min: Annotated[float, Field(gt=0)] | None = None
    """Smallest rows / rows of the baseline, such as 0.5."""
    max: Annotated[float, Field(gt=0)] | None = None
    """Largest rows / rows of the baseline, such as 2."""
    at_least: Annotated[int, Field(ge=0)] | None = None
    """Fewest rows."""
    at_most: Annotated[int, Field(ge=0)] | None = None
    """Most rows."""


class GateColumn(SpecModel):
    """Limits for a score or a feature."""

    psi: _Distance | None = None
    """Largest population stability index against the baseline. Default: that of the gate."""
    js: _Distance | None = None
    """Largest Jensen-Shannon divergence, in bits. Default: that of the gate."""
    ks: _Distance | None = None
    """Largest difference of the cumulative distributions, of numbers. Default: that of the gate."""
    nulls: _Share | None = None
    """Largest share of rows without a value: null or NaN."""
    mean: Annotated[tuple[float, float], Field(strict=False)] | None = None
    """Smallest and largest mean."""
    min: float | None = None
    """Smallest value."""
    max: float | None = None
    """Largest value."""

    @model_validator(mode="after")
    def _check_mean(self) -> Self:
        if self.mean is not None and self.mean[0] > self.mean[1]:
            raise spec_error("mean has its limits in the wrong order", expected="[smallest, largest]")
        return self


class Gate(SpecModel):
    """Conditions on the output, checked when every row is scored and before any is published."""

    psi: _Distance | None = None
    """Largest population stability index of each score and feature against the baseline: below 0.1 little has changed,
    from 0.25 on much."""
    js: _Distance | None = None
    """Largest Jensen-Shannon divergence, in bits: 0 is equal, 1 has no value in common."""
    ks: _Distance | None = None
    """Largest difference of the cumulative distributions (Kolmogorov-Smirnov), of columns of numbers."""
    baseline: PathText = "last"
    """Distributions to compare with. ``last``: the newest job of this name that was published before. ``training``:
    those of the data that the model was registered with. Else a job (its id or directory), or Parquet files with
    columns of these names."""
    rows: GateRows | None = None
    """Limits for the rows of the output."""
    columns: dict[Name, GateColumn] = Field(default_factory=dict)
    """Limits for single columns: scores and features."""
    min_rows: Annotated[int, Field(ge=1)] = 1000
    """Fewest rows of both for a comparison: smaller samples of one distribution differ by chance."""
    action: Literal["fail", "warn"] = "fail"
    """``fail``: publish nothing, and keep what is scored; ``python -m pipeline publish --accept`` publishes it all the
    same. ``warn``: publish, with a warning."""

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not (self.psi or self.js or self.ks or self.rows or self.columns):
            raise spec_error("checks nothing", expected="psi, js, ks, rows or columns", next_step="write psi: 0.2")
        return self
