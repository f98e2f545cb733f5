"""Stages in plans: each stage in the plan of its job, and its place in the plan of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pipeline.plan.outline import StageKind


def steps_title(slug: str) -> str:
    """Return the steps of a stage in words: ``step 2``, ``steps 0-1``."""
    return f"steps {slug}" if "-" in slug else f"step {slug}"


@dataclass(frozen=True)
class SealedInput:
    """A manifest of an earlier stage."""

    stage: str
    """Folder of the stage below ``steps``."""
    manifest: int
    """Number of the manifest."""
    digest: str
    """SHA-256 of the manifest's file."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage, in the plan of its job. Its partitions are planned once the stage before it is sealed."""

    slug: str
    """Numbers of its steps, such as ``0-1``."""
    kind: StageKind
    recipes: int
    """Number of its recipes in the chain of the plan, which holds those of all stages in order."""
    output_schema: bytes
    """Arrow schema (IPC) of the rows after its last step, without hidden columns."""
    scores: tuple[str, ...] = ()
    """Columns of them that hold scores."""
    never_null: tuple[str, ...] = ()
    """Columns that it reads without nulls; only if it or a later stage has ``map`` steps."""
    partition_bytes: int | None = None
    """Most uncompressed bytes of a partition; None: the default."""
    partitions: int = 0
    """Number of its partitions, estimated if no row is dropped before it; exact for the first stage."""
    task_memory: int = 0
    """Projected peak bytes of one task, estimated likewise."""

    @property
    def title(self) -> str:
        """Its steps in words: ``step 2``, ``steps 0-1``."""
        return steps_title(self.slug)

    def to_record(self) -> dict[str, Any]:
        """Return the stage for storage as JSON."""
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**record, "output_schema": self.output_schema.hex()}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> PlannedStage:
        """Inverse of `to_record`."""
        names = {"scores": tuple(record["scores"]), "never_null": tuple(record["never_null"])}
        return PlannedStage(**{**record, **names, "output_schema": bytes.fromhex(record["output_schema"])})

    @property
    def identity(self) -> list[Any]:
        """The part of the stage that digests of the work hold: no estimates."""
        return [self.slug, self.kind, self.recipes, self.output_schema.hex(), self.never_null, self.partition_bytes]


@dataclass(frozen=True)
class StageRole:
    """The place of a stage in its job, in the plan of the stage."""

    number: int
    """From 0, in order."""
    slug: str
    kind: StageKind = "narrow"
    inputs: tuple[SealedInput, ...] = ()
    """Manifests whose files it reads; none for the first stage."""
    keeps_origin: bool = False
    """True: its files have the hidden columns ``_file`` and ``_row``, which name the input row of each row."""
    reads_origin: bool = False
    """True: the files that it reads have these columns."""

    def to_record(self) -> dict[str, Any]:
        """Return the role for storage as JSON."""
        inputs = [[one.stage, one.manifest, one.digest] for one in self.inputs]
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "inputs": inputs}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> StageRole:
        """Inverse of `to_record`."""
        return StageRole(**{**record, "inputs": tuple(SealedInput(*one) for one in record["inputs"])})
