"""Distributions of a job's scores and features: their figures for the report, and their distance from another job's.

``sketches.json`` of a job directory has the counts, so comparisons need no receipts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import iadd
from typing import Any

import numpy as np

from pipeline.common.sketch import ColumnSketch, NumberSketch, Sketches, ValueSketch, sample_every, slot_edges
from pipeline.errors import StateCorrupt
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.stages import stage_states

SCHEMA_VERSION = 1
CELLS = 10
"""Cells of a comparison of numbers, each with a tenth of the baseline's values."""
FLOOR = 1e-4
"""Smallest share of a cell in a PSI, which has no value for an empty cell."""
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN_VALUES = 5


@dataclass(frozen=True)
class Distribution:
    """Figures of a column's distribution."""

    column: str
    is_score: bool
    """True for a column that a ``score`` step makes, False for a feature."""
    rows: int
    """Rows counted: all for a score; of a feature in a larger job those of a sample."""
    nulls: int
    mean: float | None = None
    """Mean of the finite numbers; None for texts, and without any."""
    least: float | None = None
    most: float | None = None
    quantiles: tuple[float, ...] = ()
    """Values below which 5, 25, 50, 75 and 95 % of the numbers lie, right to 3 %."""
    not_finite: int = 0
    """Rows with NaN or infinity."""
    values: tuple[tuple[str, int], ...] = ()
    """The most frequent texts, with their rows; of a column of many texts, the most frequent of those counted."""

    @staticmethod
    def of(column: str, sketch: ColumnSketch, *, is_score: bool) -> Distribution:
        """Return the figures of a sketch."""
        if isinstance(sketch, ValueSketch):
            top = sorted(sketch.counts.items(), key=lambda pair: (-pair[1], pair[0]))[:SHOWN_VALUES]
            return Distribution(column, is_score, sketch.rows, sketch.nulls, values=tuple(top))
        found = Distribution(column, is_score, sketch.rows, sketch.nulls, not_finite=sketch.nans + sketch.infinite)
        if not sketch.finite:
            return found
        quantiles = tuple(_short(value) for value in sketch.quantiles(SHARES))
        return Distribution(
            column,
            is_score,
            sketch.rows,
            sketch.nulls,
            mean=_short(sketch.mean),
            least=_short(sketch.least),
            most=_short(sketch.most),
            quantiles=quantiles,
            not_finite=found.not_finite,
        )

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Distribution:
        """Inverse of ``asdict``."""
        values = tuple((str(value), int(count)) for value, count in record["values"])
        return Distribution(**{**record, "quantiles": tuple(record["quantiles"]), "values": values})

    def text(self) -> str:
        """Return the figures in a line."""
        missing = [
            f"{count:,} {name}" for name, count in (("null", self.nulls), ("not finite", self.not_finite)) if count
        ]
        if self.mean is not None:
            low, _, middle, _, high = self.quantiles
            parts = [f"mean {self.mean:.4g}, 5 % {low:.4g}, median {middle:.4g}, 95 % {high:.4g}"]
        else:
            parts = (
                [", ".join(f"{value} {count / self.rows:.1%}" for value, count in self.values)] if self.values else []
            )
        return f"{self.column}: {', '.join([*parts, *missing])}"


def _short(value: float) -> float:
    """Round to six digits: a figure for people."""
    return float(f"{value:.6g}")


@dataclass(frozen=True)
class Drift:
    """Distance of a column's distribution from that of a baseline."""

    column: str
    psi: float
    """Population stability index over `CELLS` cells of equal weight in the baseline, and one for rows without a value.

    Siddiqi, Credit Risk Scorecards (2005): below 0.1 little has changed, from 0.25 on much.
    """
    js: float
    """Jensen-Shannon divergence over the same cells, in bits: from 0, equal, to 1."""
    ks: float | None
    """Largest difference of the cumulative distributions (Kolmogorov-Smirnov); None for texts."""
    rows: int
    """Rows of the smaller of the two."""
    new_values: tuple[str, ...] = ()
    """Texts that the baseline does not have, the most frequent first."""

    @property
    def expected_psi(self) -> float:
        """PSI that two samples of these sizes of one distribution have on average, at the most."""
        return 2 * CELLS / self.rows if self.rows else 0.0


def drift_of(column: str, baseline: ColumnSketch, now: ColumnSketch) -> Drift | None:
    """Return the distance of ``now`` from ``baseline``; None if one has no rows, or they are of different kinds."""
    if not baseline.rows or not now.rows or type(baseline) is not type(now):
        return None
    rows = min(baseline.rows, now.rows)
    if isinstance(baseline, NumberSketch) and isinstance(now, NumberSketch):
        one, two = _number_cells(baseline, now)
        return Drift(column, _psi(one, two), _js(one, two), _ks(baseline, now), rows)
    assert isinstance(baseline, ValueSketch)
    assert isinstance(now, ValueSketch)
    one, two, new = _value_cells(baseline, now)
    return Drift(column, _psi(one, two), _js(one, two), None, rows, new)


def drifts(baseline: Sketches, now: Sketches) -> list[Drift]:
    """Return the drift of each column that both have, in the order of ``now``."""
    found = (
        drift_of(name, baseline.columns[name], sketch)
        for name, sketch in now.columns.items()
        if name in baseline.columns
    )
    return [drift for drift in found if drift is not None]


def _number_cells(baseline: NumberSketch, now: NumberSketch) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows by cell of both. Cells end at the deciles of the baseline, as `numpy.quantile` has them.

    A decile may lie within a bucket: values there are taken to be spread evenly, in both. A bucket with one whole
    number only belongs to one cell, that above the decile.
    """
    ends, later = np.cumsum(baseline.counts), np.cumsum(now.counts)
    total = int(ends[-1])
    below_one = below_two = np.zeros(CELLS - 1)
    if total:
        shares = np.arange(1, CELLS) / CELLS
        place = shares * (total - 1)
        slot = np.searchsorted(ends, np.floor(place), side="right")
        weight, before = baseline.counts[slot], ends[slot] - baseline.counts[slot]
        part = np.clip((shares * total - before) / weight, 0, 1)
        if baseline.is_whole and now.is_whole:
            edges = slot_edges()
            part = np.where(edges[slot + 1] - edges[slot] <= 1, np.ceil(place) >= ends[slot], part)
        below_one = before + part * weight
        below_two = later[slot] - (1 - part) * now.counts[slot]
    one, two = (
        np.append(np.diff(below, prepend=0, append=float(sketch.counts.sum())), [missing, sketch.infinite])
        for sketch, below, missing in (
            (baseline, below_one, baseline.nulls + baseline.nans),
            (now, below_two, now.nulls + now.nans),
        )
    )
    return one, two


def _value_cells(baseline: ValueSketch, now: ValueSketch) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return the rows by value, with one cell for values that one of the two does not count; and the new values."""
    shared = [value for value in baseline.counts if value in now.counts]
    # A value that was counted together with others is not new.
    is_complete = not baseline.others
    gone = [value for value in baseline.counts if value not in now.counts and not now.others]
    cells = [*shared, *gone]
    one, two = (
        np.array(
            [
                *(sketch.counts.get(value, 0) for value in cells),
                sketch.rows - sketch.nulls - sum(sketch.counts.get(value, 0) for value in cells),
                sketch.nulls,
            ],
            dtype=np.float64,
        )
        for sketch in (baseline, now)
    )
    unseen = [value for value in now.counts if value not in baseline.counts] if is_complete else []
    return one, two, tuple(sorted(unseen, key=lambda value: -now.counts[value])[:SHOWN_VALUES])


def _psi(baseline: np.ndarray, now: np.ndarray) -> float:
    used = (baseline > 0) | (now > 0)
    one, two = (np.maximum(rows[used] / rows.sum(), FLOOR) for rows in (baseline, now))
    return float(np.sum((two - one) * np.log(two / one)))


def _js(baseline: np.ndarray, now: np.ndarray) -> float:
    one, two = baseline / baseline.sum(), now / now.sum()
    middle = (one + two) / 2
    return float(sum(np.sum(part[part > 0] * np.log2(part[part > 0] / middle[part > 0])) for part in (one, two)) / 2)


def _ks(baseline: NumberSketch, now: NumberSketch) -> float | None:
    if not baseline.finite or not now.finite:
        return None
    one, two = (np.cumsum(sketch.counts) / sketch.finite for sketch in (baseline, now))
    return float(np.max(np.abs(one - two)))


def distributions_of(sketches: Sketches, scores: Sequence[str]) -> tuple[Distribution, ...]:
    """Return the figures of all columns, the scores first.

    :param scores: names of the columns that are scores.
    """
    order = sorted(sketches.columns, key=lambda name: scores.index(name) if name in scores else len(scores))
    return tuple(Distribution.of(name, sketches.columns[name], is_score=name in scores) for name in order)


def score_columns(job: JobDirectory) -> tuple[str, ...]:
    """Return the columns of the output that ``score`` steps make; none for a fan-out, whose children have them."""
    if job.record.children:
        return tuple(dict.fromkeys(name for child in job.children() for name in score_columns(child)))
    return job.recipe.score_columns


def sketches_of(job: JobDirectory, ledger: Ledger | None = None) -> Sketches:
    """Return the sketches of a job: those stored at its end, else those of its receipts; of a fan-out, of its children.

    :param ledger: ledger of the job, if already read.
    """
    if job.record.children:
        return reduce(iadd, map(sketches_of, job.children()), Sketches())
    if job.record.stages:
        found = Sketches()
        for state in stage_states(job):
            # A column of several stages counts as the last of them had it.
            found.columns.update(sketches_of(state.job).columns if state.job is not None else {})
        return found
    stored = read_sketches(job) if ledger is None and job.is_ended else None
    return stored if stored is not None else (ledger or job.ledger()).sketches()


def write_sketches(job: JobDirectory, sketches: Sketches) -> None:
    """Store the sketches of a job; none are stored if there are none."""
    if sketches.columns:
        record = {"schema_version": SCHEMA_VERSION, "sampled": sample_every(job.plan.rows), **sketches.pack()}
        job.store.replace(layout.SKETCHES_FILE, json.dumps(record).encode())


def read_sketches(job: JobDirectory) -> Sketches | None:
    """Return the stored sketches of a job; None if it has none.

    :raises StateCorrupt: if the file is damaged.
    """
    try:
        data = job.store.read(layout.SKETCHES_FILE)
    except FileNotFoundError:
        return None
    sketches = Sketches()
    try:
        sketches.add_packed(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateCorrupt(
            "the distributions of a job are damaged",
            where=job.store.url(layout.SKETCHES_FILE),
            found=f"{type(error).__name__}: {error}",
            expected=f"the JSON that the job wrote, schema_version {SCHEMA_VERSION}",
            next_step="remove the file: the receipts have the same counts",
        ) from error
    return sketches
