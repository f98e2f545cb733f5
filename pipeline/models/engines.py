"""Which engines can evaluate a model, and whether the tree engine's start pays: the same answer for plan and worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pipeline.common.pickling import quickly_pickled
from pipeline.errors import ModelError
from pipeline.models.flavors import find_flavor
from pipeline.models.model import ModelVersion
from pipeline.models.trees import available
from pipeline.spec.model_ref import Engine, OutputKind

EARNING = 50_000_000
"""Rows of a process × trees from which on the tree engine earns its start: 170,000 rows with 300 trees of depth 6. With
60 million it saved a tenth of a job's CPU, with 30 million nothing (measured with forked workers and the kernels on
disk; a worker that has to import numba itself breaks even at 90 million)."""
INSTALL = "install the extra: pip install 'dask-batch-pipeline[fast]'"
_MISSING = "numba is not installed (the extra 'fast')"


@dataclass(frozen=True)
class Outlook:
    """What can evaluate a model in a job."""

    wanted: Engine
    """As the spec says."""
    possible: tuple[str, ...]
    """``xgboost``, ``trees``, or both when the worker is to choose."""
    reasons: tuple[str, ...]
    """What keeps the tree engine out, by name."""

    @property
    def has_trees(self) -> bool:
        """Whether the tree engine is possible."""
        return "trees" in self.possible


def look_out(engine: Engine, version: ModelVersion, *, kind: OutputKind, rows: int) -> Outlook:
    """What can evaluate ``version`` in this process, or in one like it.

    :param rows: that a worker process will score.
    """
    if engine == "xgboost":
        return Outlook(engine, ("xgboost",), ("xgboost was asked for",))
    reasons = obstacles(version, kind)
    if engine == "auto" and not reasons and not earns_start(rows, trees=version.trees):
        reasons = (f"{rows:,} rows a worker and {version.trees:,} trees are too few to earn its start",)
    if reasons:
        return Outlook(engine, ("xgboost",), reasons)
    return Outlook(engine, ("trees",) if engine == "trees" else ("xgboost", "trees"), ())


def obstacles(version: ModelVersion, kind: OutputKind) -> tuple[str, ...]:
    """Why the tree engine cannot give ``kind`` here, by name; empty where it can."""
    reasons = find_flavor(version.flavor).not_for_trees
    found = (f"the flavor {version.flavor}",) if reasons is None else reasons(version, kind)
    return found or (() if available() else (_MISSING,))


def earns_start(rows: int, *, trees: int) -> bool:
    """Whether so many rows of one process take the tree engine less time than they save."""
    return rows * trees >= EARNING


def check_engine(engine: Engine, version: ModelVersion, *, kind: OutputKind) -> None:
    """Refuse a job that asks for the tree engine where it cannot be had.

    :raises ModelError: with every reason by name.
    """
    reasons = obstacles(version, kind) if engine == "trees" else ()
    if reasons:
        raise ModelError(
            "the tree engine cannot score this job",
            where="score.engine",
            found=f"trees was asked for; what it does not do: {'; '.join(reasons)}",
            expected="engine: auto or xgboost",
            next_step=INSTALL if reasons == (_MISSING,) else "leave score.engine out: what it cannot do xgboost does",
        )


GIVEN_UP = "it "
"""How a reason of `EngineUse` begins that came up while scoring and is worth a warning."""


@quickly_pickled
@dataclass(frozen=True, slots=True)
class EngineUse:
    """What evaluated the model for some rows, and the evidence for that choice."""

    rows: dict[str, int] = field(default_factory=dict)
    """Rows per engine (``trees``, ``xgboost``) whose result was taken; batches done again count again."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds each engine took for the ``timed_rows``."""
    timed_rows: int = 0
    """Rows that both engines scored to see which one is faster; they are compared too."""
    compared_rows: int = 0
    """Rows that both engines scored and whose results were compared."""
    mismatches: int = 0
    """Compared rows whose results differ. xgboost's were taken, and the tree engine was given up in that process."""
    seconds_start: float = 0.0
    """Seconds to start the tree engine: import, compile or load its kernels, read the trees. Once per process."""
    kernels: tuple[str, ...] = ()
    """What the tree engine ran as, such as ``numba 0.68 (znver4)``."""
    reasons: tuple[str, ...] = ()
    """Why the tree engine was not used, or not for all rows, by name; see `GIVEN_UP`."""

    def __add__(self, other: EngineUse) -> EngineUse:
        return EngineUse(
            rows=_added(self.rows, other.rows),
            seconds=_added(self.seconds, other.seconds),
            timed_rows=self.timed_rows + other.timed_rows,
            compared_rows=self.compared_rows + other.compared_rows,
            mismatches=self.mismatches + other.mismatches,
            seconds_start=self.seconds_start + other.seconds_start,
            kernels=tuple(sorted({*self.kernels, *other.kernels})),
            reasons=tuple(sorted({*self.reasons, *other.reasons})),
        )

    @property
    def speedup(self) -> float:
        """How many times faster the tree engine was on the timed rows; 0.0 where nothing was timed."""
        trees = self.seconds.get("trees", 0.0)
        return self.seconds.get("xgboost", 0.0) / trees if trees > 0 else 0.0


Number = TypeVar("Number", int, float)


def _added(one: Mapping[str, Number], other: Mapping[str, Number]) -> dict[str, Number]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in sorted({*one, *other})}
