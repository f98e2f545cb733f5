"""Return a plan as a lazy Dask DataFrame, for notebooks.

``from_map`` over the partitions makes the frame of their fragments, one Dask partition each. ``map_partitions`` over
the fragments makes the scored rows. A job runs the same chain as one task per partition, made by
`pipeline.execution.tasks.make_tasks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dask.dataframe
import pandas as pd

from pipeline.execution.dask_config import override_config
from pipeline.execution.fragment_frames import FRAGMENTS_META, fragment_frame, score_frame
from pipeline.execution.tasks import Versions
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import StageRecipe

# Dask DataFrame has no usable types.
dd: Any = dask.dataframe
DaskFrame = dask.dataframe.DataFrame

# Do not convert strings: this adds one task per partition before fusing.
_CONFIG = {"dataframe.convert-string": False}


def fragments(partitions: Sequence[Partition], versions: Versions) -> Any:
    """Return the fragments of ``partitions`` as a Dask DataFrame, one Dask partition each, in the given order."""
    with override_config(_CONFIG):
        return dd.from_map(
            fragment_frame,
            list(partitions),
            [{fragment.path: versions[fragment.path] for fragment in part.fragments} for part in partitions],
            meta=FRAGMENTS_META,
            enforce_metadata=False,
            label="fragments",
        )


def scored(
    recipe: StageRecipe, partitions: Sequence[Partition], versions: Versions, *, meta: pd.DataFrame
) -> DaskFrame:
    """Return the scored rows as a lazy Dask DataFrame, one Dask partition per plan partition, in source order.

    :param meta: empty frame with the columns and dtypes of the output.
    """
    with override_config(_CONFIG):
        return fragments(partitions, versions).map_partitions(  # type: ignore[no-any-return]
            score_frame, recipe, meta=meta, enforce_metadata=False
        )


def from_files(read: Callable[[str], pd.DataFrame], files: Sequence[str], *, meta: pd.DataFrame) -> DaskFrame:
    """Return the rows of files as a lazy Dask DataFrame, one Dask partition per file.

    :param read: called with the path or URL of each file, on a worker.
    :param meta: empty frame with the columns and dtypes of the files.
    """
    with override_config(_CONFIG):
        frame: DaskFrame = (
            dd.from_map(read, list(files), meta=meta, enforce_metadata=False, label="published")
            if files
            else dd.from_pandas(meta, npartitions=1)
        )
    return frame
