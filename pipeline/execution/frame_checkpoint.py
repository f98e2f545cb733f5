"""Compute the partitions of a Dask DataFrame once, whatever dies, and keep them as Parquet.

A folder holds a checkpoint for each expression: ``<digest>/checkpoint.json``, ``receipts/<partition>.json`` and
``data/<partition>-<attempt>.parquet``. A partition is finished when its receipt exists, which is created in one step:
of several attempts one wins, and the file of the receipt is the partition from then on.

If a finished partition has other rows when it is computed again, pieces of several runs do not fit: ``differs.json``
records it, and from then on only a run from the first to the last partition without a lost worker counts. Such a run
has a folder ``whole-<name>`` of its own, which ``complete.json`` names.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import dask
import dask.dataframe
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.dataframe.utils import UNKNOWN_CATEGORIES

from pipeline.common.content import Content, content_of
from pipeline.common.digest import digest_json
from pipeline.common.units import plural, utc_now
from pipeline.errors import CorruptInput, InsufficientMemory, PipelineError, ReconciliationFailed, SchemaDrift
from pipeline.execution.counted_shuffles import count_on_workers
from pipeline.execution.dask_config import override_config
from pipeline.execution.frame_run import DiffersError, FrameRun, Kept, TooLittleMemoryError
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import unique_name

logger = logging.getLogger("pipeline")

# Dask has no usable types.
_dask: Any = dask
DaskFrame = dask.dataframe.DataFrame

SCHEMA_VERSION = 1
_ROW_GROUP_ROWS = 1 << 17
_DIFFERS = "differs.json"
_COMPLETE = "complete.json"
WHOLE_ATTEMPTS = 3
"""Runs in one piece until it is given up."""


@dataclass(frozen=True, slots=True)
class KeptPartition:
    """A finished partition, as its receipt has it."""

    partition: int
    file: str
    """Name in the folder of the checkpoint."""
    rows: int
    bytes: int
    """Size of the file."""
    content: dict[str, Any] | None = None
    """`Content` as JSON; None in receipts of earlier versions."""


@dataclass(frozen=True)
class KeptFrame:
    """All partitions of a frame, as a folder keeps them."""

    root: str
    """Folder that the files of the partitions are relative to."""
    partitions: tuple[KeptPartition, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """Path or URL of each file, in the order of the partitions."""
        return tuple(f"{self.root}/{one.file}" for one in self.partitions)


def checkpoint(frame: DaskFrame, path: str) -> DaskFrame:
    """Compute what is not yet kept of ``frame``, and return the kept frame; see `pipeline.checkpoint`."""
    kept = keep(frame, path)
    return _kept_frame(frame, kept.partitions, kept.root)


def keep(frame: DaskFrame, path: str) -> KeptFrame:
    """Compute what is not yet kept of ``frame``, and return where its partitions are; see `pipeline.checkpoint`."""
    identity = identity_of(frame)
    digest = digest_json(identity)
    store = open_store(path)
    if not store.exists(f"{digest[:16]}/checkpoint.json"):
        _tell_of_others(store, identity)
    folder = open_store(store.url(digest[:16]))
    if not folder.exists("checkpoint.json"):
        folder.check_conditional_writes()
        folder.put_if_absent("checkpoint.json", _json({**identity, "digest": digest, "created": str(utc_now())}))
    while not folder.exists(_DIFFERS):
        kept = _finished(folder)
        missing = [number for number in range(frame.npartitions) if number not in kept]
        if kept and missing:
            logger.info(
                "%s: %d of %d partitions are there, %d to do", folder.root, len(kept), frame.npartitions, len(missing)
            )
        try:
            for receipt in _compute(frame, missing, kept, folder.root):
                kept[receipt.partition] = receipt
        except DiffersError as error:
            record = {"partition": error.partition, "found": error.difference, "at": str(utc_now())}
            folder.put_if_absent(_DIFFERS, _json(record))
            logger.warning("%s: %s; all partitions are computed anew, in one piece", folder.root, error)
            break
        # Another process may have found a difference meanwhile.
        if not missing or not folder.exists(_DIFFERS):
            if missing:
                _remove_others(folder, kept)
            return KeptFrame(folder.root, tuple(kept[number] for number in range(frame.npartitions)))
    return _whole(frame, folder)


def _whole(frame: DaskFrame, folder: Store) -> KeptFrame:
    """Compute all partitions of a frame that is not deterministic in one run, unless such a run has ended.

    :raises ReconciliationFailed: if workers are lost in each attempt.
    """
    for _ in range(WHOLE_ATTEMPTS):
        if not folder.exists(_COMPLETE):
            name = f"whole-{unique_name()}"
            run = open_store(folder.url(name))
            if not _compute_whole(frame, run.root):
                continue
            folder.put_if_absent(_COMPLETE, _json({"folder": name, "at": str(utc_now())}))
        complete = open_store(folder.url(json.loads(folder.read(_COMPLETE))["folder"]))
        kept = _finished(complete)
        return KeptFrame(complete.root, tuple(kept[number] for number in range(frame.npartitions)))
    raise ReconciliationFailed(
        "a frame that is not deterministic cannot be put together from several runs",
        where=folder.root,
        found=f"workers were lost in each of {WHOLE_ATTEMPTS} runs, and {_DIFFERS} says what differed",
        expected="partitions with the same rows whenever they are computed, or no lost worker",
        next_step="give sample a random_state, and sort before head, cumsum or shift",
    )


def _compute_whole(frame: DaskFrame, root: str) -> bool:
    """Compute all partitions; return False if a worker was lost, so that two runs may be mixed."""
    runs: list[FrameRun] = []
    try:
        for _ in _compute(frame, range(frame.npartitions), {}, root, started=runs.append):
            pass
    except DiffersError as error:
        logger.warning("%s: %s", root, error)
        return False
    lost = sum(run.lost_workers for run in runs)
    if lost:
        logger.warning("%s: %s died, and a run in one piece starts over", root, plural(lost, "worker"))
    return not lost


def identity_of(frame: DaskFrame) -> dict[str, Any]:
    """Return what tells an expression from others: equal in every process that builds it from equal parts."""
    versions = {library.__name__: library.__version__ for library in (dask, pd, pa)}
    return {
        "schema_version": SCHEMA_VERSION,
        # The name of an expression is a hash of its operations, functions and inputs.
        "expression": str(frame.expr._name),
        "partitions": int(frame.npartitions),
        "columns": [[str(name), str(dtype)] for name, dtype in frame.dtypes.items()],
        "versions": versions,
    }


def _tell_of_others(store: Store, identity: Mapping[str, Any]) -> None:
    """Log why an expression is computed, if the folder has checkpoints of others."""
    for other in store.list_folders():
        try:
            found = json.loads(store.read(f"{other}/checkpoint.json"))
        except (FileNotFoundError, ValueError):
            continue
        names = [name for name in identity if found.get(name) != identity[name]]
        logger.info("%s: computed anew, %s is of another expression (%s)", store.root, other, ", ".join(names))


def _finished(folder: Store) -> dict[int, KeptPartition]:
    kept = {}
    for name in folder.list("receipts"):
        receipt = _read_receipt(folder, int(name.partition(".")[0]))
        if receipt is not None:
            kept[receipt.partition] = receipt
    return kept


def _read_receipt(folder: Store, partition: int) -> KeptPartition | None:
    with suppress(FileNotFoundError):
        return KeptPartition(**json.loads(folder.read(_receipt_name(partition))))
    return None


def _receipt_name(partition: int) -> str:
    return f"receipts/{partition:05d}.json"


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _compute(
    frame: DaskFrame,
    missing: Sequence[int],
    kept: Mapping[int, KeptPartition],
    folder: str,
    *,
    started: Callable[[FrameRun], None] | None = None,
) -> Iterator[KeptPartition]:
    """Compute partitions on the current client, or with Dask's local scheduler, and yield them as they are finished.

    :param kept: partitions that are finished, one of which is computed again and compared.
    :param started: is called with the run on a client.
    :raises DiffersError: if the finished one has other rows now.
    """
    if not missing:
        return
    finished = {number: Content.from_dict(one.content) for number, one in kept.items() if one.content}
    client = current_client()
    try:
        if client is None:
            yield from _compute_locally(frame, missing, finished, folder)
            return
        from distributed import Client

        count_on_workers(client)
        run_type = partial(
            FrameRun, frame=frame, keep=partial(_keep, root=folder), recall=frame_content, find=partial(_find, folder)
        )
        # A client has one subscriber for a topic of events: the caller's own may be in use.
        with Client(client.scheduler.address, security=client.security, set_as_default=False) as own:
            run = run_type(own)
            if started is not None:
                started(run)
            for one in run.run(missing, finished):
                yield one.receipt
    except TooLittleMemoryError as error:
        raise _too_large(error, folder) from error
    except DiffersError:
        raise
    except Exception as error:
        error.add_note(f"{folder}: finished partitions are kept; call again to compute the rest")
        raise


def _compute_locally(
    frame: DaskFrame, missing: Sequence[int], finished: Mapping[int, Content], folder: str
) -> Iterator[KeptPartition]:
    # Tasks of other partitions are culled by their keys: ``frame.partitions[…]`` of a shuffle moves rows elsewhere.
    parts = frame.to_delayed()
    keep, recall = _dask.delayed(_keep, pure=False), _dask.delayed(frame_content, pure=False)
    tasks = [keep(parts[number], number, root=folder) for number in missing]
    again = sorted(finished, key=lambda number: (finished[number].rows, number))[len(finished) // 2 :][:1]
    *done, content = _dask.compute(*tasks, recall(parts[again[0]]) if again else None)
    for number in again:
        if not content.agrees(finished[number]):
            raise DiffersError(number, content.difference(finished[number]))
    for one in done:
        yield one.receipt


def _too_large(error: TooLittleMemoryError, folder: str) -> InsufficientMemory:
    named = ", ".join(map(str, error.partitions))
    return InsufficientMemory(
        "workers do not have the memory for a partition",
        where=f"partition {named} of {folder}" if named else folder,
        found="workers were killed for their memory while they computed it",
        expected="partitions of which a worker can hold a few at a time",
        next_step="give the workers more memory, or repartition the frame; finished partitions are kept",
    )


def current_client() -> Any:
    """Return the client of this process that computes Dask collections; None without one."""
    if "distributed" not in sys.modules:
        return None
    from distributed import Client

    get = dask.base.get_scheduler()
    owner = getattr(get, "__self__", None)
    return owner if isinstance(owner, Client) else None


def _keep(part: pd.DataFrame, partition: int, root: str) -> Kept:
    kept = keep_partition(part, partition, root)
    return Kept(partition, Content.from_dict(kept.content) if kept.content else None, kept)


def _find(root: str, numbers: Sequence[int]) -> list[Kept]:
    folder = open_store(root)
    found = [receipt for number in numbers if (receipt := _read_receipt(folder, number)) is not None]
    return [Kept(one.partition, Content.from_dict(one.content) if one.content else None, one) for one in found]


def frame_content(part: pd.DataFrame) -> Content:
    """Return the content of a partition, with its index."""
    return content_of(pa.Table.from_pandas(part))


def keep_partition(part: pd.DataFrame, partition: int, root: str) -> KeptPartition:
    """Write a partition and its receipt. If another attempt was faster, return the receipt of that one.

    :raises SchemaDrift: if Parquet has no type for a column.
    """
    folder = open_store(root)
    receipt = _read_receipt(folder, partition)
    if receipt is not None:
        return receipt
    name = f"data/{partition:05d}-{unique_name()}.parquet"
    try:
        table = _table(part, partition)
        size = _write(folder, name, table)
        receipt = KeptPartition(partition, name, len(part), size, content_of(table).to_dict())
        if folder.put_if_absent(_receipt_name(partition), _json(asdict(receipt))):
            return receipt
    except Exception:
        # Another attempt that finished everything removes the files of those that did not.
        finished = _read_receipt(folder, partition)
        if finished is None:
            raise
        return finished
    folder.remove(name)
    winner = _read_receipt(folder, partition)
    assert winner is not None
    return winner


def _table(part: pd.DataFrame, partition: int) -> pa.Table:
    try:
        return pa.Table.from_pandas(part)
    except (pa.ArrowException, TypeError) as error:
        raise SchemaDrift(
            "a partition cannot be kept as Parquet",
            where=f"partition {partition} of a checkpoint",
            found=str(error),
            expected="columns that pyarrow can hold, of one type each",
            next_step="convert or drop the column before pipeline.checkpoint",
        ) from error


def _write(folder: Store, name: str, table: pa.Table) -> int:
    with folder.open_output(name) as file:
        pq.write_table(table, file, row_group_size=_ROW_GROUP_ROWS, write_page_checksum=True)
    return folder.size(name)


def _remove_others(folder: Store, kept: Mapping[int, KeptPartition]) -> None:
    """Remove files of attempts that were lost, when all partitions are finished."""
    own = {receipt.file for receipt in kept.values()}
    for name in folder.list("data"):
        if f"data/{name}" not in own:
            folder.remove(f"data/{name}")


def _kept_frame(frame: DaskFrame, kept: Sequence[KeptPartition], root: str) -> DaskFrame:
    # Strings have the type that they had: converting them again is a task more.
    with override_config({"dataframe.convert-string": False}):
        kept_frame: DaskFrame = _dask.dataframe.from_map(
            read_partition,
            [replace(one, content=None) for one in kept],
            root=root,
            template=frame._meta,
            meta=frame._meta,
            divisions=frame.divisions,
            enforce_metadata=False,
            label="checkpoint",
        )
    return kept_frame


def read_partition(
    kept: KeptPartition, *, root: str, template: pd.DataFrame, columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Return a kept partition, with the index and the dtypes that it had.

    :param template: empty frame with all columns.
    :param columns: columns to read. Default: all.
    :raises CorruptInput: if the file was changed, damaged or removed.
    """
    folder = open_store(root)
    try:
        with folder.open_input(kept.file) as file:
            table = pq.read_table(
                file,
                columns=None if columns is None else list(columns),
                # Reads the index, too.
                use_pandas_metadata=True,
                page_checksum_verification=True,
            )
    except (FileNotFoundError, pa.ArrowException, OSError) as error:
        raise _damaged(folder, kept, f"{type(error).__name__}: {error}") from error
    if table.num_rows != kept.rows:
        raise _damaged(folder, kept, f"{table.num_rows:,} rows")
    part: pd.DataFrame = table.to_pandas()
    wanted = template if columns is None else template[list(columns)]
    changed = {
        name: dtype for name, dtype in wanted.dtypes.items() if part[name].dtype != dtype and not _is_open(dtype)
    }
    part = part.astype(changed) if changed else part
    return part.loc[:, list(wanted.columns)]


def _is_open(dtype: Any) -> bool:
    """True for categories that Dask does not know before it has computed them: each partition has its own."""
    return isinstance(dtype, pd.CategoricalDtype) and UNKNOWN_CATEGORIES in dtype.categories


def _damaged(folder: Store, kept: KeptPartition, found: str) -> PipelineError:
    return CorruptInput(
        "a partition of a checkpoint cannot be read",
        where=folder.url(kept.file),
        found=found,
        expected=f"a Parquet file with {kept.rows:,} rows",
        next_step=f"remove {folder.url(_receipt_name(kept.partition))}, and call pipeline.checkpoint again",
    )
