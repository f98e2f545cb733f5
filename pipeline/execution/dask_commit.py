"""Keep a computed partition of a ``dask`` step: a checkpoint file and a receipt, as for scored partitions."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa

from pipeline.common.content import Content, content_of
from pipeline.common.rows import RowCounts
from pipeline.execution.dask_step import partition_table
from pipeline.execution.frame_run import Kept
from pipeline.execution.tasks import without_secrets
from pipeline.jobs import layout
from pipeline.jobs.receipts import Receipt, Timings
from pipeline.plan.memory import MOST_GROUP_BYTES
from pipeline.scoring.checkpoint import CheckpointWriter
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import own_storage_options, unique_name, use_storage_options

GROUP_ROWS = 1 << 20
"""Most rows of a row group: the next stage cuts partitions between row groups, or within one at some cost."""


@dataclass(frozen=True)
class Keeper:
    """Keeps partitions in a round of a job directory. Called on workers."""

    job: str
    plan: str
    """Digest of the plan of the round."""
    directory: str
    """Root of the job directory, path or URL."""
    round: int
    schema: bytes
    """Arrow schema (IPC) of the rows."""
    entrypoint: str
    compression: str = "snappy"
    fsync: bool = True
    width: int = 5
    """Digits of the id of a partition."""
    storage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Folder of the round's files."""
        return f"{self.directory}/{layout.round_folder(self.round)}"

    def partition_id(self, number: int) -> str:
        """Return the id of a partition."""
        return f"{number:0{self.width}d}"

    def table(self, part: pd.DataFrame) -> pa.Table:
        """Return a partition as it is written."""
        return partition_table(part, pa.ipc.read_schema(pa.py_buffer(self.schema)), where=self.entrypoint)


@own_storage_options()
def keep_rows(part: pd.DataFrame, number: int, keeper: Keeper) -> Kept:
    """Write a partition and its receipt. If another attempt was faster, return the receipt of that one.

    :raises SchemaDrift: if it has other columns than planned.
    """
    use_storage_options(keeper.storage)
    try:
        store = open_store(keeper.folder, private=True, fsync=keeper.fsync)
        receipt = _read(store, keeper, number) or _write(store, keeper, number, part)
    except Exception as error:
        raise without_secrets(error) from None
    return Kept(number, Content.from_dict(receipt.content) if receipt.content else None, receipt)


def rows_content(part: pd.DataFrame, keeper: Keeper) -> Content:
    """Return the content of a partition that is not kept."""
    return content_of(keeper.table(part))


def _read(store: Store, keeper: Keeper, number: int) -> Receipt | None:
    name = layout.receipt_name(keeper.partition_id(number))
    try:
        return Receipt.from_json(store.read(name), where=store.url(name))
    except FileNotFoundError:
        return None


def _write(store: Store, keeper: Keeper, number: int, part: pd.DataFrame) -> Receipt:
    started, partition, attempt = time.monotonic(), keeper.partition_id(number), unique_name()
    table = keeper.table(part)
    writer = CheckpointWriter(
        store,
        layout.data_name(partition, attempt),
        schema=table.schema,
        metadata={"pipeline.job": keeper.job, "pipeline.step": keeper.entrypoint},
        compression=keeper.compression,
        row_group_rows=GROUP_ROWS,
        row_group_bytes=MOST_GROUP_BYTES,
    )
    try:
        step = max(1, min(GROUP_ROWS, GROUP_ROWS * MOST_GROUP_BYTES // max(1, table.nbytes)))
        for start in range(0, table.num_rows, step):
            writer.add(table.slice(start, step))
        data = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    receipt = Receipt(
        partition=partition,
        plan=keeper.plan,
        model="",
        attempt=attempt,
        data=data,
        rejects=None,
        rows=RowCounts(output=table.num_rows, made=table.num_rows),
        files=(),
        seconds=Timings(write=writer.watch.seconds, total=time.monotonic() - started),
        worker=f"{socket.gethostname()}:{os.getpid()}",
        round=keeper.round,
        made=True,
        content=content_of(table).to_dict(),
        ended=time.time(),
    )
    # From here on, an error may hide a receipt that was written: the file stays then.
    name = layout.receipt_name(partition)
    if store.put_if_absent(name, receipt.to_json_bytes()):
        return receipt
    winner = _read(store, keeper, number)
    if winner is not None and winner.attempt != attempt:
        writer.abandon()
    return winner or receipt
