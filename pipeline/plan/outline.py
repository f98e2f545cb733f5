"""Outline of a job: its steps, cut into stages. Pure.

A stage is a run of steps that a task applies to its rows without a pause. A ``checkpoint`` ends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.spec.job_spec import AnyStep, JobSpec
from pipeline.spec.parts import CheckpointStep, DaskStep, Source

StageKind = Literal["narrow", "dask"]
"""``narrow``: each partition is one task, whose rows need no others. ``dask``: one ``dask`` step."""


@dataclass(frozen=True)
class Stage:
    """Some consecutive steps of a job."""

    number: int
    """From 0, in order."""
    first: int
    """Number of its first step in the job spec."""
    stop: int
    """Number after its last step."""
    is_last: bool
    """True for the stage whose result is the output."""
    partition_bytes: int | None = None
    """Most uncompressed bytes of its partitions; None: the default."""
    kind: StageKind = "narrow"

    @property
    def slug(self) -> str:
        """Its steps, as its folder is named: ``0-1``, or ``2`` for one step."""
        return f"{self.first}-{self.stop - 1}" if self.stop > self.first + 1 else str(self.first)

    def steps(self, spec: JobSpec) -> tuple[AnyStep, ...]:
        """Return its steps."""
        return spec.steps[self.first : self.stop]


def outline(spec: JobSpec) -> tuple[Stage, ...]:
    """Return the stages of a job, in order; empty for a job without a step that ends a stage."""
    if not spec.has_stages:
        return ()
    runs: list[tuple[int, int, int | None, StageKind]] = []
    first, size = 0, None
    for number, step in enumerate(spec.steps):
        if not isinstance(step, (CheckpointStep, DaskStep)):
            continue
        if number > first:
            runs.append((first, number, size, "narrow"))
        first, size = number + 1, None
        if isinstance(step, DaskStep):
            runs.append((number, number + 1, step.target_bytes, "dask"))
        else:
            size = step.partition_bytes
    if first < len(spec.steps):
        runs.append((first, len(spec.steps), size, "narrow"))
    return tuple(
        Stage(number, first, stop, is_last=number == len(runs) - 1, partition_bytes=size, kind=kind)
        for number, (first, stop, size, kind) in enumerate(runs)
    )


def stage_spec(spec: JobSpec, stage: Stage, *, folder: str = "steps") -> JobSpec:
    """Return the job spec of one stage: its steps, over what it reads.

    :param folder: folder with the files of the stage before; the first stage reads the source.
    """
    changes: dict[str, object] = {"steps": stage.steps(spec), "fan_out": None, "triggers": (), "hooks": ()}
    if stage.number:
        # Only files of the source can be quarantined, and only they can be new to a sink.
        errors = spec.errors.model_copy(update={"files": "fail", "max_files": None})
        changes |= {"source": Source(path=folder), "errors": errors}
    return spec.model_copy(update=changes)
