"""Read the rows of a partition: from input files, or from files of rejects those that an earlier round rejected."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.plan.plan import Partition
from pipeline.plan.recipe import REJECT_REASON, REJECT_ROW, StageRecipe
from pipeline.sources import SourceBatch, read_batches

Versions = Mapping[str, tuple[int, str]]
"""Path of an input file -> its size in bytes and version, as planned."""

_ADDED = (pa.field(REJECT_ROW, pa.int64()), pa.field(REJECT_REASON, pa.string()))


def read_partition(
    recipe: StageRecipe,
    partition: Partition,
    *,
    versions: Versions | None = None,
) -> Generator[SourceBatch, None, None]:
    """The rows of ``partition`` that the filter keeps, at most a batch at a time; see `pipeline.sources.read_batches`.

    :param versions: of its files, as planned; None: not checked.
    """
    if partition.fragments and partition.fragments[0].origin:
        return read_rejects(recipe, partition)
    return read_batches(
        partition,
        columns=recipe.columns,
        schema=pa.ipc.read_schema(pa.py_buffer(recipe.schema)),
        filter=recipe.filter,
        batch_rows=recipe.batch_rows,
        versions=versions,
    )


def read_rejects(recipe: StageRecipe, partition: Partition) -> Generator[SourceBatch, None, None]:
    """The rows of a partition that is made of rejects. No filter is applied: it had kept them.

    :returns: batches with the source's columns, the number each row has in the input file it came from, and its reason.
    :raises CorruptInput: when a file of rejects is damaged.
    """
    schema = pa.ipc.read_schema(pa.py_buffer(recipe.schema))
    fragments = tuple(
        replace(fragment, path=f"{recipe.directory}/{fragment.path}", keys=()) for fragment in partition.fragments
    )
    batches = read_batches(
        fragments,
        columns=(*schema.names, *(field.name for field in _ADDED)),
        schema=pa.schema([*schema, *_ADDED]),
        batch_rows=recipe.batch_rows,
    )
    for batch in batches:
        row = np.asarray(batch.table.column(REJECT_ROW).to_numpy(), dtype=np.int64)
        reasons = tuple(batch.table.column(REJECT_REASON).to_pylist())
        yield replace(batch, table=batch.table.select(schema.names), row=row, reasons=reasons)
