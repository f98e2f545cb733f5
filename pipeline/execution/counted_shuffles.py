"""Count the rows of p2p shuffles, so that a lost row is an error and never a smaller result.

A shuffle of Dask DataFrame sends rows between workers past the scheduler. Each task that sends rows returns the number
of its run; here this number also carries the rows sent, by output partition. The barrier adds them up, and the task
that takes an output partition compares. The functions that are wrapped are internal to distributed: `uncounted_reason`
says what is missing in another version of it, and then nothing is wrapped.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Sequence
from functools import cache, wraps
from importlib import import_module
from importlib.metadata import version
from typing import Any

import dask
import numpy as np
from dask.utils import parse_bytes
from distributed.diagnostics.plugin import WorkerPlugin

from pipeline.common.units import plural
from pipeline.errors import ReconciliationFailed

logger = logging.getLogger("pipeline")

PLUGIN = "pipeline-counted-shuffles"
"""Name of the plugin on workers: registering it again changes nothing."""

_INTERNALS = {
    "distributed.shuffle._shuffle.DataFrameShuffleRun.add_partition": ("self", "data", "partition_id"),
    "distributed.shuffle._shuffle.DataFrameShuffleSpec.create_run_on_worker": (
        *("self", "run_id", "span_id", "worker_for", "plugin"),
    ),
    "distributed.shuffle._worker_plugin.ShuffleWorkerPlugin.barrier": ("self", "shuffle_id", "run_ids"),
    "distributed.shuffle._worker_plugin.ShuffleWorkerPlugin.get_output_partition": (
        *("self", "shuffle_id", "run_id", "partition_id", "meta"),
    ),
}
"""Parameters of the functions that are wrapped."""


class CountedRun(int):
    """Number of a run of a shuffle, with the rows that were sent."""

    rows: np.ndarray
    """Rows by output partition: int64."""

    def __new__(cls, run_id: int, rows: np.ndarray) -> CountedRun:
        """Make a number that carries ``rows``."""
        made = super().__new__(cls, run_id)
        made.rows = rows
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return CountedRun, (int(self), self.rows)


def uncounted_reason() -> str:
    """Return why the rows of shuffles cannot be counted with this version of distributed; empty if they can."""
    missing = [name for name, parameters in _INTERNALS.items() if _parameters(name) != parameters]
    if not missing:
        return ""
    return f"distributed {version('distributed')} has no {missing[0]}({', '.join(_INTERNALS[missing[0]])})"


def _parameters(name: str) -> tuple[str, ...] | None:
    path, owner, function = name.rsplit(".", 2)
    try:
        found = getattr(getattr(import_module(path), owner), function)
    except (ImportError, AttributeError):
        return None
    return tuple(inspect.signature(found).parameters)


class CountShuffles(WorkerPlugin):
    """Counts rows in the worker's process."""

    name = PLUGIN
    idempotent = True

    async def setup(self, worker: Any) -> None:
        """Wrap the functions of shuffles; Dask calls this. Not a coroutine, it would freeze the worker."""
        count_shuffles()
        limit_buffers(worker)


_registered: weakref.WeakSet[Any] = weakref.WeakSet()
_warned: set[str] = set()


def count_on_workers(client: Any) -> str:
    """Count the rows of shuffles on all workers of a client, and on those that join later.

    :returns: why this is not possible, which is logged once; empty if rows are counted.
    """
    if client in _registered:
        return ""
    reason = uncounted_reason()
    if not reason:
        try:
            client.register_plugin(CountShuffles())
            _registered.add(client)
        except Exception as error:  # of any kind: workers without this package, or of a user's own plugins
            reason = f"{type(error).__name__}: {error}"
    if reason and reason not in _warned:
        _warned.add(reason)
        logger.warning("rows of shuffles are not counted: %s", reason)
    return reason


@cache
def count_shuffles() -> None:
    """Wrap the functions of shuffles in this process, once. Log why, if they are others."""
    reason = uncounted_reason()
    if reason:
        logger.warning("rows of shuffles are not counted: %s", reason)
        return
    from distributed.shuffle._shuffle import DataFrameShuffleRun, DataFrameShuffleSpec
    from distributed.shuffle._worker_plugin import ShuffleWorkerPlugin

    # These types have no usable stubs.
    run: Any = DataFrameShuffleRun
    spec: Any = DataFrameShuffleSpec
    plugin: Any = ShuffleWorkerPlugin
    run.add_partition = _counting(run.add_partition)
    spec.create_run_on_worker = _with_partitions(spec.create_run_on_worker)
    plugin.barrier = _adding(plugin.barrier)
    plugin.get_output_partition = _comparing(plugin.get_output_partition)


_BUFFERS = {
    # Attribute of the plugin, key of the configuration, Dask's default, share of the worker's memory limit.
    "memory_limiter_comms": ("distributed.p2p.comm.buffer", "1 GiB", 0.05),
    "memory_limiter_disk": ("distributed.p2p.storage.buffer", "100 MiB", 0.03),
}


def limit_buffers(worker: Any) -> None:
    """Limit the buffers of shuffles to a share of the worker's memory, unless a site has configured them.

    Dask's own limit for rows to send is 1 GiB, whatever memory a worker has.
    """
    from distributed.shuffle._limiter import ResourceLimiter

    plugin, memory = worker.plugins.get("shuffle"), worker.memory_manager.memory_limit
    if plugin is None or not memory:
        return
    for name, (key, default, share) in _BUFFERS.items():
        configured, most = parse_bytes(str(dask.config.get(key, default))), int(share * memory)
        limiter = getattr(plugin, name, None)
        if limiter is not None and configured == parse_bytes(default) and most < configured:
            setattr(plugin, name, ResourceLimiter(most, metrics_label=limiter.metrics_label))


def _with_partitions(create: Any) -> Any:
    @wraps(create)
    def create_run_on_worker(self: Any, *args: Any, **options: Any) -> Any:
        run = create(self, *args, **options)
        run.pipeline_partitions = int(self.npartitions)
        return run

    return create_run_on_worker


def _counting(add: Any) -> Any:
    @wraps(add)
    def add_partition(self: Any, data: Any, partition_id: int) -> int:
        partitions = getattr(self, "pipeline_partitions", None)
        if partitions is None:  # the run is older than the wrapper
            return int(add(self, data, partition_id))
        rows = rows_sent(np.asarray(data[self.column]), partitions, shuffle=self.id)
        return CountedRun(add(self, data, partition_id), rows)

    return add_partition


def _adding(wait: Any) -> Any:
    @wraps(wait)
    def barrier(self: Any, shuffle_id: str, run_ids: Sequence[int]) -> int:
        run_id: int = wait(self, shuffle_id, run_ids)
        # An input whose worker does not count leaves nothing to compare.
        if not all(isinstance(one, CountedRun) for one in run_ids):
            return run_id
        return CountedRun(run_id, sum((one.rows for one in run_ids), np.zeros(1, np.int64)))  # type: ignore[attr-defined]

    return barrier


def _comparing(take: Any) -> Any:
    @wraps(take)
    def get_output_partition(self: Any, shuffle_id: str, run_id: int, partition_id: int, meta: Any = None) -> Any:
        part = take(self, shuffle_id, run_id, partition_id, meta)
        if isinstance(run_id, CountedRun):
            check_rows(len(part), run_id, partition_id, shuffle=shuffle_id)
        return part

    return get_output_partition


def rows_sent(targets: np.ndarray, partitions: int, *, shuffle: str) -> np.ndarray:
    """Return the rows for each output partition.

    :param targets: output partition of each row.
    :param partitions: number of output partitions.
    :raises ReconciliationFailed: for a row with another target: Dask would drop it without a word.
    """
    outside = np.flatnonzero(~((targets >= 0) & (targets < partitions)))
    if len(outside):
        raise ReconciliationFailed(
            "a shuffle would lose rows",
            where=f"shuffle {shuffle}",
            found=f"{plural(len(outside), 'row')} for output partition {targets[outside[0]]}",
            expected=f"output partitions 0 to {partitions - 1}",
            next_step="update dask and distributed, then run again: finished partitions are kept",
        )
    return np.bincount(targets.astype(np.int64), minlength=partitions)


def check_rows(rows: int, run: CountedRun, partition: int, *, shuffle: str) -> None:
    """Compare the rows of an output partition with those that were sent to it.

    :raises ReconciliationFailed: if they are not as many.
    """
    sent = int(run.rows[partition])
    if rows != sent:
        raise ReconciliationFailed(
            "a shuffle lost rows" if rows < sent else "a shuffle doubled rows",
            where=f"output partition {partition} of shuffle {shuffle}",
            found=f"{plural(rows, 'row')} came out",
            expected=f"{plural(sent, 'row')}, as went in",
            next_step="run again: finished partitions are kept; if it happens again, report it to Dask",
        )


def lost_rows(error: BaseException) -> ReconciliationFailed | None:
    """Return the error of a shuffle that lost rows, which Dask wraps in others; None if ``error`` is another."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ReconciliationFailed):
            return seen
        seen = seen.__cause__
    return None
