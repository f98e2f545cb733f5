"""Build a `StageRecipe` and a partition by hand, for tests that need no plan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.rows import Fragment
from pipeline.models.model import ModelVersion
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import MapRecipe, ScoreRecipe, StageRecipe
from pipeline.scoring.contract import feature_rules
from pipeline.scoring.outputs import prediction_schema
from pipeline.sources import SourceBatch
from pipeline.spec.score import Output


def make_recipe(
    version: ModelVersion,
    schema: pa.Schema,
    *,
    directory: str = "unused",
    maps: Sequence[MapRecipe] = (),
    frame: pa.Schema | None = None,
    features: Sequence[str] | None = None,
    keep: Sequence[str] | None = None,
    output: Output | None = None,
    **fields: Any,
) -> StageRecipe:
    """Return a recipe for ``version`` on a source with ``schema``, with the rules of the model's features.

    :param frame: schema after the map steps; default: ``schema``.
    :param fields: fields of `StageRecipe` that replace the defaults here.
    """
    frame = frame or schema
    features = tuple(features or version.feature_names)
    keep = tuple(frame.names if keep is None else keep)
    predictions = prediction_schema(version, output or Output(column="prediction"))
    score = ScoreRecipe(
        model=version,
        features=features,
        kind=output.kind if output else "prediction",
        outputs=tuple(predictions.names),
        rules=feature_rules(version, features),
    )
    made: dict[str, Any] = {
        "job": "job-1",
        "plan": "0" * 64,
        "directory": directory,
        "round": 0,
        "columns": tuple(schema.names),
        "filter": None,
        "schema": schema.serialize().to_pybytes(),
        "chain": (*maps, score),
        "source_rules": (),
        "output_schema": pa.schema([*(frame.field(name) for name in keep), *predictions]).serialize().to_pybytes(),
        "batch_rows": 8192,
        "fsync": False,
    }
    return StageRecipe(**{**made, **fields})


def make_batch(table: pa.Table) -> SourceBatch:
    """Return ``table`` as the only batch of a partition with one fragment."""
    rows = table.num_rows
    return SourceBatch(table, np.zeros(rows, np.int32), np.arange(rows, dtype=np.int64), np.zeros(1, np.int64))


def make_partition(*paths: str | os.PathLike[str], id: str = "00000") -> Partition:
    """Return all rows of some Parquet files as one partition."""
    fragments = []
    for path in [os.fspath(path) for path in paths]:
        footer = pq.read_metadata(path)
        fragments.append(Fragment(path, 0, footer.num_rows, 0, footer.num_row_groups, os.path.getsize(path)))
    return Partition(id, tuple(fragments))
