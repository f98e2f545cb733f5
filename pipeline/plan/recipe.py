"""`StageRecipe`: all a worker must know to do any partition of a stage. It is small, and travels with every task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.common.digest import digest_json
from pipeline.models.model import ModelVersion
from pipeline.spec.model_ref import Engine, OutputKind

REJECT_FILE = "_file"
REJECT_ROW = "_row"
REJECT_REASON = "_reason"
REJECT_MESSAGE = "_message"
REJECT_COLUMNS = (REJECT_FILE, REJECT_ROW, REJECT_REASON, REJECT_MESSAGE)
"""Columns a reject has beside those of its input row: file, row number in it (from 0), kind of reason, message."""


@dataclass(frozen=True)
class ColumnRule:
    """One column of the contract after defaults were filled in. None means: not checked."""

    column: str
    dtype: str | None = None
    nullable: bool = True
    finite: bool = False
    min: bool | int | float | str | None = None
    max: bool | int | float | str | None = None
    allowed: tuple[bool | int | float | str, ...] | None = None


@dataclass(frozen=True)
class MapRecipe:
    """One ``map`` step."""

    entrypoint: str
    dtype_backend: str = "numpy"


@dataclass(frozen=True)
class ScoreRecipe:
    """The ``score`` step with everything resolved."""

    model: ModelVersion
    features: tuple[str, ...]
    """Column of the frame for each feature of the model, in the model's order."""
    kind: OutputKind
    outputs: tuple[str, ...]
    """Names of the columns the scores go to."""
    keep: tuple[str, ...]
    """Columns passed through, in order; they come before ``outputs``."""
    engine: Engine = "auto"
    tolerance: float = 0.0
    """Largest difference of margins at which two engines count as equal; 0: every bit."""
    rows_per_worker: int = 0
    """Rows planned for each worker process: too few do not earn the start of the tree engine."""


@dataclass(frozen=True)
class StageRecipe:
    """A stage, ready to run on any of its partitions."""

    job: str
    plan: str
    """Digest of the plan."""
    directory: str
    """Root of the job directory: path or URL."""
    round: int
    columns: tuple[str, ...]
    """Physical columns to read from the files."""
    filter: str | None
    schema: bytes
    """Arrow schema (IPC) of a source batch: ``columns`` plus hive keys that are wanted."""
    maps: tuple[MapRecipe, ...]
    score: ScoreRecipe
    source_rules: tuple[ColumnRule, ...]
    """Contract of columns the source has; checked before the first step."""
    score_rules: tuple[ColumnRule, ...]
    """Contract of what the model gets and of columns that steps make; checked before scoring."""
    output_schema: bytes
    """Arrow schema (IPC) of the output: ``keep`` then ``outputs``."""
    batch_rows: int
    """Rows a batch starts with."""
    source_format: str = "parquet"
    """Name of the `pipeline.sources` adapter."""
    compression: str = "snappy"
    row_group_rows: int = 1 << 20
    """Rows per row group of the written files."""
    fsync: bool = True
    import_paths: tuple[str, ...] = field(default=())
    """Folders added to ``sys.path`` on workers so that the modules of the steps can be imported."""
    storage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of file systems by how URLs begin, with references for secrets; see `pipeline.storage.urls`."""

    @property
    def digest(self) -> str:
        """Content digest, also Dask's token for it."""
        return digest_json(
            {
                **{k: v for k, v in self.__dict__.items()},
                "schema": self.schema.hex(),
                "output_schema": self.output_schema.hex(),
            }
        )

    def __dask_tokenize__(self) -> str:
        return self.digest
