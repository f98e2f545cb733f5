"""A plan as a Dask DataFrame. The only module that builds collections; it holds no logic.

``from_map`` over the stored partitions gives the frame of their fragments, one Dask partition each. The same chain is
cut at two places: `receipts` (what a job runs: every partition read, scored and written by one fused task that returns
a row) and `scored` (what a notebook gets: the scored rows, lazily).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask
import dask.dataframe
import pandas as pd

from pipeline.isolation import Isolation
from pipeline.plan import Partition
from pipeline.recipe import StageRecipe
from pipeline.tasks import FRAGMENTS_META, RECEIPTS_META, Versions, fragment_frame, receipt_frame, score_frame

# Dask DataFrame has no usable types.
dd: Any = dask.dataframe

# Strings stay as they are built: a conversion would be one more task in every partition before fusing.
_CONFIG = {"dataframe.convert-string": False}


def fragments(partitions: Sequence[Partition], versions: Versions) -> Any:
    """The fragments of ``partitions`` as a Dask DataFrame, one Dask partition each, in the given order."""
    with dask.config.set(_CONFIG):
        return dd.from_map(
            fragment_frame,
            list(partitions),
            [{fragment.path: versions[fragment.path] for fragment in part.fragments} for part in partitions],
            meta=FRAGMENTS_META,
            enforce_metadata=False,
            label="fragments",
        )


def receipts(
    recipe: StageRecipe,
    partitions: Sequence[Partition],
    versions: Versions,
    *,
    isolation: Isolation | None = None,
    copy: int = 0,
) -> Any:
    """The frame of receipts: computing a Dask partition reads, scores and writes it.

    :param isolation: score in a process of its own, with these limits.
    :param copy: tasks of another number have other keys: Dask runs a key once.
    """
    with dask.config.set(_CONFIG):
        return fragments(partitions, versions).map_partitions(
            receipt_frame, recipe, isolation, copy, meta=RECEIPTS_META, enforce_metadata=False
        )


def scored(recipe: StageRecipe, partitions: Sequence[Partition], versions: Versions, *, meta: pd.DataFrame) -> Any:
    """The scored rows as a lazy Dask DataFrame, one Dask partition per plan partition, in source order.

    :param meta: empty frame with the columns and dtypes of the output.
    """
    with dask.config.set(_CONFIG):
        return fragments(partitions, versions).map_partitions(score_frame, recipe, meta=meta, enforce_metadata=False)


def tasks(
    recipe: StageRecipe,
    partitions: Sequence[Partition],
    versions: Versions,
    *,
    isolation: Isolation | None = None,
    copy: int = 0,
) -> list[Any]:
    """One `dask.delayed` of a frame of receipts per partition, in order: a single fused task each."""
    with dask.config.set(_CONFIG):
        return list(receipts(recipe, partitions, versions, isolation=isolation, copy=copy).to_delayed())
