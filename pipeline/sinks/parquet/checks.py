"""Check that the content of a sink allows a job to publish Parquet files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.units import plural
from pipeline.errors import OutputConflict, OutputExists, RefusedForSafety, StateCorrupt
from pipeline.sinks import PublishedFile
from pipeline.sinks.parquet import layout
from pipeline.storage.store import Store

logger = logging.getLogger(__name__)
_SHOWN_COLUMNS = 5


def check_content(
    store: Store, state: layout.SinkState | None, *, mode: str, job: str, schema: pa.Schema | None
) -> None:
    """Raise unless ``mode`` allows publishing to ``store`` with its current content; see `pipeline.sinks.check`."""
    names = layout.data_names(store, job=job)
    if mode == "error" and names:
        raise output_exists(store, names)
    if mode == "overwrite":
        layout.check_replaceable(store)
    if mode == "append" and names:
        layout.check_flat(store)
        if schema is not None:
            _check_schema(store, state, names, schema)


def check_folder(store: Store) -> None:
    """Refuse a path that is a file.

    :raises RefusedForSafety: when the path is a file.
    """
    if store.is_local and os.path.lexists(store.root) and not os.path.isdir(store.root):
        raise RefusedForSafety(
            "the output is a folder, and there is a file",
            where=f"sink.path: {store.root}",
            expected="a folder, or nothing",
            next_step="choose another sink.path",
        )


def check_is_same(published: layout.Publication, *, plan: str, path: str) -> None:
    """Refuse a publication of another job with the same id.

    :param published: publication in the sink under this job's id.
    :param plan: digest of this job's plan; empty if unknown.
    :raises OutputConflict: when the publication was made from another plan.
    """
    if published.plan and plan and published.plan != plan:
        raise OutputConflict(
            "another job with the same id has published there",
            where=f"sink.path: {path}",
            found=f"job {published.job} with plan {published.plan[:12]}",
            expected=f"plan {plan[:12]}, or a job with another id",
            next_step="run it under another id (--job), or choose another sink.path",
        )


def _schema_of(state: layout.SinkState, *, where: str) -> pa.Schema:
    """Return the schema of a sink's manifest.

    :raises StateCorrupt: when it is not a schema.
    """
    try:
        return pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(state.schema)))
    except (ValueError, TypeError, OSError, pa.ArrowException) as error:
        raise StateCorrupt(
            "the output's manifest is damaged",
            where=where,
            found=f"schema: {type(error).__name__}: {error}",
            expected="the schema that a job published",
            next_step="restore it, or publish to another sink.path",
        ) from error


def _check_schema(store: Store, state: layout.SinkState | None, names: list[str], schema: pa.Schema) -> None:
    first = next((name for name in layout.uncounted(names, None) if not layout.tag_of(name)), None)
    if state and state.schema:
        columns_there, where = _schema_of(state, where=store.url(layout.MANIFEST)), layout.MANIFEST
    elif first:
        columns_there, where = _columns(store, first), first
    else:
        return
    old, new = ({field.name: str(field.type) for field in columns} for columns in (columns_there, schema))
    changed = [
        f"{name}: {old.get(name, 'missing')} -> {new.get(name, 'missing')}"
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]
    if not changed and [*old] == [*new]:
        return
    changed = changed or [f"columns in the order {', '.join(old)}"]
    more = f" and {len(changed) - _SHOWN_COLUMNS} more" if len(changed) > _SHOWN_COLUMNS else ""
    raise OutputConflict(
        "the existing output has other columns than the rows to append",
        where=f"sink.path: {store.url(where)}",
        found="; ".join(changed[:_SHOWN_COLUMNS]) + more,
        expected="the same columns with the same types in the same order",
        next_step="choose another sink.path, or sink.mode overwrite, or change score.keep and score.output",
    )


def adopted(store: Store, *, job: str) -> layout.SinkState | None:
    """Return a state that lists the Parquet files from before any job published; None if the sink has none.

    Without this state, appending would hide these files from readers of the manifest. Files that a job wrote are left
    out: without a manifest they were never published, and resuming their job publishes their rows.
    """
    parquet = layout.uncounted(store.list(), None)
    unpublished = [name for name in parquet if layout.tag_of(name) and not layout.is_file_of(name, job)]
    if unpublished:
        logger.warning(
            "%s contains %s of jobs that have not published, such as %s: not part of the output",
            store.root,
            plural(len(unpublished), "file"),
            unpublished[0],
        )
    names = [name for name in parquet if not layout.tag_of(name)]
    if not names:
        return None
    files = tuple(PublishedFile(name, _footer(store, name).num_rows, store.size(name), "") for name in names)
    return layout.SinkState((layout.Publication("", 0, "", files),))


def _columns(store: Store, name: str) -> pa.Schema:
    """Return the columns of a file as readers of the folder get them: narrow indices and 12-byte timestamps count."""
    return _footer(store, name, read=pq.read_schema)


def _footer(store: Store, name: str, *, read: Callable[[Any], Any] = pq.read_metadata) -> Any:
    try:
        with store.open_input(name) as file:
            return read(file)
    except pa.ArrowInvalid as error:
        raise OutputConflict(
            "a file in the sink cannot be read as Parquet",
            where=store.url(name),
            found=str(error),
            next_step="remove it, or choose another sink.path",
        ) from error


def output_exists(store: Store, names: list[str]) -> OutputExists:
    """Make the error for a sink that contains data when the mode is ``error``."""
    found = f"{len(names):,} files, such as {names[0]}" if len(names) > 1 else names[0]
    return OutputExists(
        "there is data in the sink already",
        where=f"sink.path: {store.root}",
        found=found,
        expected="no data, since sink.mode is error",
        next_step="choose another sink.path, or --set sink.mode=overwrite (replaces it in one step), "
        "or --set sink.mode=append (adds to it)",
    )
