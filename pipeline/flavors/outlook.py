"""Which engines can evaluate a model, and whether the tree engine's start pays: the same answer for plan and worker."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ModelError
from pipeline.flavors import find_flavor
from pipeline.model import Engine, ModelVersion, OutputKind
from pipeline.trees import available

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
