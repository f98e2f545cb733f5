"""Rows of the page's table of distributions: a small picture of each column, its figures, and its drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from pipeline.common.sketch import ColumnSketch, NumberSketch, Sketches, ValueSketch
from pipeline.report.distributions import Distribution, Drift, distributions_of, drift_of

BINS = 40
HEIGHT = 36
WIDTH = 200
BAR_VALUES = 12
"""Texts that have a bar."""


@dataclass(frozen=True)
class DistributionRow:
    """A column in the table."""

    distribution: Distribution
    picture: Markup
    drift: Drift | None
    """Distance from the baseline; None without one."""

    @property
    def values(self) -> str:
        """The most frequent texts with their shares."""
        one = self.distribution
        return ", ".join(f"{value} {count / one.rows:.1%}" for value, count in one.values)


def distribution_rows(
    sketches: Sketches, scores: Sequence[str], *, baseline: Sketches | None = None
) -> list[DistributionRow]:
    """Return a row for each column, scores first.

    :param scores: names of the columns that are scores.
    :param baseline: sketches of another job.
    """
    found = []
    for distribution in distributions_of(sketches, scores):
        sketch = sketches.columns[distribution.column]
        other = baseline.columns.get(distribution.column) if baseline is not None else None
        drift = drift_of(distribution.column, other, sketch) if other is not None else None
        found.append(DistributionRow(distribution, _picture(sketch, other, distribution), drift))
    return found


def _picture(sketch: ColumnSketch, other: ColumnSketch | None, distribution: Distribution) -> Markup:
    if isinstance(sketch, NumberSketch):
        bars, outline = _number_bars(sketch, other if isinstance(other, NumberSketch) else None)
    else:
        bars, outline = _value_bars(sketch, other if isinstance(other, ValueSketch) else None)
    if not len(bars):
        return Markup()
    top, width = max(bars.max(initial=0.0), outline.max(initial=0.0)) or 1.0, WIDTH / len(bars)
    drawn = "".join(
        f"M{place * width:.1f} {HEIGHT}v-{share / top * (HEIGHT - 2):.1f}h{width - 0.8:.1f}V{HEIGHT}z"
        for place, share in enumerate(bars)
        if share
    )
    line = "".join(
        f"{'L' if place else 'M'}{place * width:.1f} {HEIGHT - share / top * (HEIGHT - 2):.1f}h{width:.1f}"
        for place, share in enumerate(outline)
    )
    line = f'<path class="before" d="{line}"/>' if line else ""
    # All texts are escaped where they are put in.
    return Markup(
        f'<svg class="small" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(distribution.text())}">'
        f'<path class="c1" d="{drawn}"/>{line}</svg>'
    )


def _number_bars(sketch: NumberSketch, other: NumberSketch | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of bins of equal width, between the 1st and the 99th percentile of both."""
    both = [one for one in (sketch, other) if one is not None and one.finite]
    if not both:
        return np.empty(0), np.empty(0)
    ends = [one.quantiles((0.01, 0.99)) for one in both]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    bars, outline = (
        one.histogram(edges) / max(one.finite, 1) if one is not None else np.empty(0) for one in (sketch, other)
    )
    return bars, outline


def _value_bars(sketch: ValueSketch, other: ValueSketch | None) -> tuple[np.ndarray, np.ndarray]:
    names = sorted(sketch.counts, key=lambda value: (-sketch.counts[value], value))[:BAR_VALUES]
    bars, outline = (
        np.array([one.counts.get(name, 0) / max(one.rows, 1) for name in names]) if one is not None else np.empty(0)
        for one in (sketch, other)
    )
    return bars, outline
