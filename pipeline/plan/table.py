"""Convert a plan to an Arrow table and back: one row per file, with its row groups and the ranges of partitions."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.arrow_arrays import booleans, int64s, lists, strings
from pipeline.common.rows import Fragment, InputFile, QuarantinedFile, RowGroup
from pipeline.common.step_code import StepCode
from pipeline.errors import PipelineError, StateCorrupt
from pipeline.models.record import model_from_record, model_to_record
from pipeline.plan.dask_recipe import DaskWork
from pipeline.plan.incremental import IncrementalState
from pipeline.plan.memory import MOST_GROUP_BYTES
from pipeline.plan.plan import ChildPlan, Partition, Plan
from pipeline.plan.stages import PlannedStage, StageRole
from pipeline.plan.step_record import rule_from_record, step_from_record, step_to_record
from pipeline.spec.job_spec import JobSpec
from pipeline.storage.store import Store

SCHEMA_VERSION = 3
_METADATA = b"pipeline.plan"
_KEY = pa.struct([("name", pa.string()), ("value", pa.string())])
_GROUP = pa.struct([("rows", pa.int64()), ("bytes", pa.int64()), ("compressed", pa.int64()), ("selected", pa.bool_())])
_LINES = pa.field("lines", pa.int64())
"""Further field of a row group, in formats that are read by byte ranges."""
_RANGE = pa.struct(
    [
        ("ordinal", pa.int64()),
        ("partition", pa.string()),
        ("row_start", pa.int64()),
        ("row_stop", pa.int64()),
        ("group_start", pa.int64()),
        ("group_stop", pa.int64()),
        ("bytes", pa.int64()),
        ("rejected_from", pa.string()),
    ]
)
_PLAIN = (
    "source_columns",
    "features",
    "keep",
    "outputs",
    "batch_rows",
    "pruned_rows",
    "task_memory",
    "row_bytes_out",
    "row_group_rows",
)


_PlacedRange = tuple[int, str, Fragment]
"""Ordinal, id of the partition, and rows."""


def plan_to_table(plan: Plan) -> pa.Table:
    """Return all of ``plan`` as a table.

    Files have the columns path, size, version, hive_keys, row_groups and ranges. The ordinal of a range is its place
    among the ranges of all partitions, in the order of the plan. The rest is JSON in the schema's metadata.
    """
    ranges: dict[str, list[_PlacedRange]] = {file.path: [] for file in plan.files}
    placed = ((partition.id, fragment) for partition in plan.partitions for fragment in partition.fragments)
    for ordinal, (partition, fragment) in enumerate(placed):
        ranges[fragment.path].append((ordinal, partition, fragment))
    files = plan.files
    table = pa.table(
        {
            "path": strings([file.path for file in files]),
            "size": int64s(file.size for file in files),
            "version": strings([file.version for file in files]),
            "hive_keys": _keys_array(files),
            "row_groups": _groups_array(files),
            "ranges": _ranges_array([ranges[file.path] for file in files]),
            **_incremental_columns(plan),
        }
    )
    return table.replace_schema_metadata({_METADATA: json.dumps(_record(plan)).encode()})


def _incremental_columns(plan: Plan) -> dict[str, pa.Array]:
    if not plan.progress.work:
        return {}
    return {
        "published_row_groups": int64s(file.published_row_groups for file in plan.files),
        "footer_digest": strings([file.footer_digest for file in plan.files]),
        "reason": strings([file.reason for file in plan.files]),
    }


def plan_from_table(table: pa.Table) -> Plan:
    """Inverse of `plan_to_table`.

    :raises StateCorrupt: if the table is not a valid plan.
    """
    try:
        record = json.loads((table.schema.metadata or {})[_METADATA])
        if record["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {record['schema_version']}")
        files = _files(table)
        partitions = _partitions(table, files)
        dask = DaskWork.from_record(record["dask"]) if "dask" in record else None
        if dask is not None:
            partitions = tuple(Partition(name, ()) for name in dask.partition_ids)
        return Plan(
            spec=JobSpec.model_validate_json(json.dumps(record["spec"])),
            model=model_from_record(record["model"]),
            files=files,
            partitions=partitions,
            source_schema=bytes.fromhex(record["source_schema"]),
            output_schema=bytes.fromhex(record["output_schema"]),
            source_rules=tuple(rule_from_record(rule) for rule in record["source_rules"]),
            score_rules=tuple(rule_from_record(rule) for rule in record["score_rules"]),
            batch_bytes=record.get("batch_bytes", 0),
            device_batch_rows=record.get("device_batch_rows", 0),
            row_group_bytes=record.get("row_group_bytes", MOST_GROUP_BYTES),
            workers=record.get("workers", 1),
            can_use_tree_engine=record.get("can_use_tree_engine", False),
            quarantined_files=tuple(QuarantinedFile.from_dict(file) for file in record.get("quarantined_files", ())),
            children=tuple(ChildPlan(**child) for child in record.get("children", ())),
            progress=IncrementalState.from_record(record.get("progress") or {}),
            code=tuple(StepCode.from_record(step) for step in record.get("code", ())),
            never_null=tuple(record.get("never_null", ())),
            frame_schemas=tuple(bytes.fromhex(schema) for schema in record.get("frame_schemas", ())),
            model_bytes=record.get("model_bytes", 0),
            chain=tuple(step_from_record(step) for step in record.get("chain", ())),
            stages=tuple(PlannedStage.from_record(stage) for stage in record.get("stages", ())),
            dask=dask,
            role=StageRole.from_record(record["role"]) if "role" in record else None,
            **{name: _as_tuple(record[name]) for name in _PLAIN},
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise StateCorrupt(
            "a stored plan is damaged",
            found=f"{type(error).__name__}: {error}",
            expected=f"the table a plan was stored as, schema_version {SCHEMA_VERSION}",
            next_step="run the job spec as a new job",
        ) from error


def _record(plan: Plan) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "digest": plan.digest,
        "spec": plan.spec.to_dict(),
        "model": model_to_record(plan.model),
        "source_schema": plan.source_schema.hex(),
        "output_schema": plan.output_schema.hex(),
        "source_rules": [asdict(rule) for rule in plan.source_rules],
        "score_rules": [asdict(rule) for rule in plan.score_rules],
        "batch_bytes": plan.batch_bytes,
        "device_batch_rows": plan.device_batch_rows,
        "row_group_bytes": plan.row_group_bytes,
        "workers": plan.workers,
        "can_use_tree_engine": plan.can_use_tree_engine,
        "quarantined_files": [asdict(file) for file in plan.quarantined_files],
        **({"children": [child.to_dict() for child in plan.children]} if plan.children else {}),
        "progress": asdict(plan.progress) if plan.progress.work else None,
        "code": [step.to_record() for step in plan.code],
        "never_null": plan.never_null,
        "frame_schemas": [schema.hex() for schema in plan.frame_schemas],
        **({"model_bytes": plan.model_bytes} if plan.model_bytes else {}),
        **({"chain": [step_to_record(step) for step in plan.chain]} if plan.chain else {}),
        **({"stages": [stage.to_record() for stage in plan.stages]} if plan.stages else {}),
        **({"role": plan.role.to_record()} if plan.role else {}),
        **({"dask": plan.dask.to_record()} if plan.dask else {}),
        **{name: getattr(plan, name) for name in _PLAIN},
    }


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _keys_array(files: Sequence[InputFile]) -> pa.ListArray:
    keys = [key for file in files for key in file.hive_keys]
    columns = [strings([name for name, _ in keys]), strings([value for _, value in keys])]
    return lists([len(file.hive_keys) for file in files], pa.StructArray.from_arrays(columns, fields=list(_KEY)))


def _groups_array(files: Sequence[InputFile]) -> pa.ListArray:
    groups = [group for file in files for group in file.row_groups]
    columns = [
        int64s(group.rows for group in groups),
        int64s(group.bytes for group in groups),
        int64s(group.compressed for group in groups),
        booleans(group.selected for group in groups),
    ]
    fields = list(_GROUP)
    if any(group.lines for group in groups):
        columns, fields = [*columns, int64s(group.lines for group in groups)], [*fields, _LINES]
    return lists([len(file.row_groups) for file in files], pa.StructArray.from_arrays(columns, fields=fields))


def _ranges_array(ranges: Sequence[Sequence[_PlacedRange]]) -> pa.ListArray:
    flat = [placed for of_file in ranges for placed in of_file]
    fragments = [fragment for _, _, fragment in flat]
    columns = [
        int64s(ordinal for ordinal, _, _ in flat),
        strings([partition for _, partition, _ in flat]),
        int64s(fragment.row_start for fragment in fragments),
        int64s(fragment.row_stop for fragment in fragments),
        int64s(fragment.group_start for fragment in fragments),
        int64s(fragment.group_stop for fragment in fragments),
        int64s(fragment.bytes for fragment in fragments),
        strings([fragment.rejected_from for fragment in fragments]),
    ]
    return lists([len(of_file) for of_file in ranges], pa.StructArray.from_arrays(columns, fields=list(_RANGE)))


def _columns(table: pa.Table, name: str) -> tuple[list[int], list[list[Any]]]:
    """Return the lengths of the lists of a list column, and their values field by field."""
    array = table.column(name).combine_chunks()
    lists = array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)
    return lists.value_lengths().to_pylist(), [field.to_pylist() for field in lists.flatten().flatten()]


def _files(table: pa.Table) -> tuple[InputFile, ...]:
    lengths, fields = _columns(table, "row_groups")
    groups = map(RowGroup, *fields)
    keys = [tuple((key["name"], key["value"]) for key in of_file) for of_file in table.column("hive_keys").to_pylist()]
    rows = zip(*(table.column(name).to_pylist() for name in ("path", "size", "version")), lengths, keys, strict=True)
    files = tuple(
        InputFile(path, size, version, tuple(next(groups) for _ in range(length)), key)
        for path, size, version, length, key in rows
    )
    if "footer_digest" not in table.column_names:
        return files
    more = zip(
        *(table.column(name).to_pylist() for name in ("published_row_groups", "footer_digest", "reason")), strict=True
    )
    return tuple(
        replace(file, published_row_groups=done, footer_digest=digest, reason=reason)
        for file, (done, digest, reason) in zip(files, more, strict=True)
    )


def _partitions(table: pa.Table, files: Sequence[InputFile]) -> tuple[Partition, ...]:
    lengths, (ordinals, ids, *fields) = _columns(table, "ranges")
    if sorted(ordinals) != list(range(len(ordinals))):
        raise ValueError("the ordinals of the ranges are not 0, 1, 2, …")
    owners = (file for file, length in zip(files, lengths, strict=True) for _ in range(length))
    in_order: list[tuple[str, Fragment] | None] = [None] * len(ordinals)
    for ordinal, partition, file, start, stop, first, last, size, rejected_from in zip(
        ordinals, ids, owners, *fields, strict=True
    ):
        in_order[ordinal] = (
            partition,
            Fragment(
                file.path, start, stop, first, last, size, file.hive_keys, rejected_from, span=file.span(first, last)
            ),
        )
    by_partition: dict[str, list[Fragment]] = {}
    for partition, fragment in filter(None, in_order):
        by_partition.setdefault(partition, []).append(fragment)
    return tuple(Partition(partition, tuple(fragments)) for partition, fragments in by_partition.items())


PLAN_FILE = "plan.parquet"


def plan_bytes(plan: Plan) -> bytes:
    """Return the content of ``plan.parquet``, which `read_plan` reads back to the same plan.

    :raises PipelineError: for a plan that would be read back as another one. Such a plan must not be stored.
    """
    sink = io.BytesIO()
    pq.write_table(plan_to_table(plan), sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue()
    restored = plan_from_table(_read_table(data))
    if restored.digest != plan.digest:
        raise PipelineError(
            "a plan cannot be stored: it would be read back as another plan",
            found=restored.digest,
            expected=plan.digest,
            next_step="this is a defect of this package, not of your data: report it with the job spec",
        )
    return data


def _read_table(data: bytes) -> pa.Table:
    # Without Arrow's threads: they must not call Python while it shuts down (apache/arrow#50482), which would
    # abort a command that has finished its work.
    # A ParquetFile, not read_table, which imports pyarrow.dataset and pandas.
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        return file.read(use_threads=False)


def read_plan(store: Store, *, name: str = PLAN_FILE) -> Plan:
    """Read a stored plan.

    :raises StateCorrupt: if the plan cannot be read.
    """
    try:
        return plan_from_table(_read_table(store.read(name)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateCorrupt(
            "the stored plan cannot be read",
            where=store.url(name),
            found=f"{type(error).__name__}: {error}",
            expected="the plan that was stored when the job was made",
            next_step="restore the file, or run the job spec again as a new job",
        ) from error
