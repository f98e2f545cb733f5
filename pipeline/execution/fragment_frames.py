"""Partitions as frames of their fragments, and the function that scores such a frame (`pipeline.execution.graph`)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pandas as pd

from pipeline.common.rows import Fragment
from pipeline.execution.tasks import Versions, without_secrets
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import StageRecipe
from pipeline.scoring.frames import score_to_frame

FRAGMENTS_META = pd.DataFrame(
    {
        "partition": pd.Series([], dtype="str"),
        "path": pd.Series([], dtype="str"),
        "size": pd.Series([], dtype="int64"),
        "version": pd.Series([], dtype="str"),
        "row_start": pd.Series([], dtype="int64"),
        "row_stop": pd.Series([], dtype="int64"),
        "group_start": pd.Series([], dtype="int64"),
        "group_stop": pd.Series([], dtype="int64"),
        "bytes": pd.Series([], dtype="int64"),
        "hive_keys": pd.Series([], dtype="object"),
        "rejected_from": pd.Series([], dtype="str"),
        "span": pd.Series([], dtype="object"),
    }
)

_FRAGMENT_FIELDS = tuple(field.name for field in fields(Fragment))


def fragment_frame(partition: Partition, versions: Versions) -> pd.DataFrame:
    """Return the fragments of a partition, with the planned sizes and versions of their files."""
    rows = [
        (
            *(partition.id, f.path, *versions[f.path]),
            *(f.row_start, f.row_stop, f.group_start, f.group_stop, f.bytes, f.hive_keys, f.rejected_from, f.span),
        )
        for f in partition.fragments
    ]
    return pd.DataFrame(rows, columns=list(FRAGMENTS_META.columns))


def read_fragments(frame: pd.DataFrame) -> tuple[Partition, Versions]:
    """Inverse of `fragment_frame`: the partition, and the planned sizes and versions of its files."""
    rows: Any = frame.to_dict("records")
    fragments = tuple(Fragment(**{name: row[name] for name in _FRAGMENT_FIELDS}) for row in rows)
    return Partition(rows[0]["partition"], fragments), {row["path"]: (row["size"], row["version"]) for row in rows}


def score_frame(frame: pd.DataFrame, recipe: StageRecipe) -> pd.DataFrame:
    """Score the partition of these fragments."""
    partition, versions = read_fragments(frame)
    try:
        return score_to_frame(recipe, partition, versions=versions)
    except Exception as error:
        raise without_secrets(error) from None
