"""Build the frame of a ``dask`` step: its tables as lazy Dask DataFrames of pinned files, and the function on them.

Tables are read with ``from_map`` over ranges of rows that the plan has fixed. ``dask.dataframe.read_parquet`` would
merge and renumber partitions, and read whatever the files are by then. Columns have Arrow's types: integers with nulls,
decimals and dates pass joins and shuffles unchanged.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import dask
import dask.dataframe
import pandas as pd
import pyarrow as pa

from pipeline.common.digest import digest_json
from pipeline.common.rows import Fragment
from pipeline.errors import PipelineError, ReconciliationFailed, SchemaDrift, StepFailed
from pipeline.execution.dask_config import override_config
from pipeline.execution.tasks import without_secrets
from pipeline.plan.dask_recipe import DaskTable, DaskWork
from pipeline.plan.recipe import REJECT_FILE, REJECT_ROW
from pipeline.sources import read_batches
from pipeline.storage.urls import own_storage_options, use_storage_options

# Dask has no usable types.
dd: Any = dask.dataframe
DaskFrame = dask.dataframe.DataFrame
Function = Callable[..., Any]

_READ_ROWS = 1 << 18
"""Rows of a batch that is read for a partition."""
_OTHERS = (os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""Folders of Python and of this package: code in them is not the user's."""
_LIBRARIES = ("dask", "distributed", "pandas", "pyarrow")
"""Distributions that decide which rows are in which partition."""


@dataclass(frozen=True)
class RowRange:
    """The rows of one partition of a table."""

    fragments: tuple[Fragment, ...]
    versions: Mapping[str, tuple[int, str]]
    """Planned size and version of each file by path."""

    @property
    def rows(self) -> int:
        """Number of rows, including those that a filter drops."""
        return sum(fragment.rows for fragment in self.fragments)

    def __dask_tokenize__(self) -> str:
        ranges = [[one.path, one.row_start, one.row_stop, one.hive_keys] for one in self.fragments]
        return digest_json({"ranges": ranges, "versions": dict(sorted(self.versions.items()))})


def table_frame(
    table: DaskTable,
    ranges: Sequence[tuple[Fragment, ...]],
    *,
    origin: bool = False,
    storage: Mapping[str, Mapping[str, Any]] | None = None,
    label: str = "table",
) -> DaskFrame:
    """Return a table as a lazy Dask DataFrame, one partition for each of ``ranges``, with Arrow's types.

    :param origin: add the columns ``_file`` and ``_row``: file of a row, and its number in it from 0.
    """
    versions = table.versions
    parts = [RowRange(part, {one.path: versions[one.path] for one in part}) for part in ranges]
    options = {name: dict(values) for name, values in (storage or {}).items()}
    frame: DaskFrame = dd.from_map(
        read_rows,
        parts,
        schema=table.schema,
        physical=table.columns,
        condition=table.filter,
        format=table.format,
        origin=origin,
        storage=options,
        meta=empty_arrow_frame(table.arrow, origin=origin),
        enforce_metadata=False,
        label=label,
    )
    return frame


def arrow_frame(table: pa.Table) -> pd.DataFrame:
    """Return a table as a frame with Arrow's types. Dictionaries are decoded."""
    schema = _decoded(table.schema)
    frame: pd.DataFrame = table.cast(schema).to_pandas(types_mapper=pd.ArrowDtype, ignore_metadata=True)
    return frame


def empty_arrow_frame(schema: pa.Schema, *, origin: bool = False) -> pd.DataFrame:
    """Return a frame without rows, with Arrow's types.

    :param origin: see `table_frame`.
    """
    if origin:
        schema = schema.append(pa.field(REJECT_FILE, pa.string())).append(pa.field(REJECT_ROW, pa.int64()))
    return arrow_frame(schema.empty_table())


@own_storage_options()
def read_rows(
    part: RowRange,
    *,
    schema: bytes,
    physical: Sequence[str],
    condition: str | None,
    format: str,
    origin: bool,
    storage: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return the rows of a partition of a table.

    :param columns: columns to read. Default: all.
    :raises PipelineError: if a file has changed since planning, or cannot be read.
    :raises ReconciliationFailed: if it gives other rows than planned.
    """
    use_storage_options(storage)
    whole = pa.ipc.read_schema(pa.py_buffer(schema))
    names = [name for name in whole.names if columns is None or name in columns]
    wanted = pa.schema([whole.field(name) for name in names])
    tables, seen = [], 0
    batches = read_batches(
        part.fragments,
        columns=[name for name in names if name in physical],
        schema=wanted,
        filter=condition,
        batch_rows=_READ_ROWS,
        versions=part.versions,
        format=format,
    )
    try:
        for batch in batches if part.fragments else ():
            seen += batch.table.num_rows + int(batch.filtered.sum())
            tables.append(_with_origin(batch, part.fragments) if origin else batch.table)
    except Exception as error:
        raise without_secrets(error) from None
    if seen != part.rows:
        raise ReconciliationFailed(
            "a partition of a table has other rows than planned",
            where=", ".join(sorted({one.path for one in part.fragments})),
            found=f"{seen:,} rows",
            expected=f"{part.rows:,} rows, as the footers say",
            next_step="check the files, and run the job spec as a new job",
        )
    template = empty_arrow_frame(wanted, origin=origin)
    made = arrow_frame(pa.concat_tables(tables)) if tables else template
    return made if columns is None else made.loc[:, list(columns)]


def _with_origin(batch: Any, fragments: Sequence[Fragment]) -> pa.Table:
    paths = pa.array([one.path for one in fragments], pa.string())
    table: pa.Table = batch.table.append_column(REJECT_FILE, paths.take(pa.array(batch.fragment)))
    return table.append_column(REJECT_ROW, pa.array(batch.row, pa.int64()))


def step_config(shuffle: str) -> dict[str, Any]:
    """Return the configuration with which the frame of a step is built, lowered and computed."""
    # The default method depends on whether the process has a client.
    return {"dataframe.convert-string": False, "dataframe.shuffle.method": shuffle}


def build_frame(
    work: DaskWork, function: Function, *, storage: Mapping[str, Mapping[str, Any]] | None = None
) -> DaskFrame:
    """Return the lazy result of a step over its pinned tables.

    :raises StepFailed: if the function raises, computes something, or returns no frame that can be kept.
    """
    packed, recipe = work.packed(), work.recipe
    with override_config(step_config(recipe.shuffle)):
        # The stage before may have kept the origin of its rows: in the source.
        origin = recipe.origin and REJECT_FILE not in work.main.arrow.names
        frame = table_frame(work.main, packed[""], origin=origin, storage=storage, label="stage")
        named = {name: table_frame(table, packed[name], storage=storage, label=name) for name, table in recipe.inputs}
        result = apply_step(function, frame, named, where=recipe.name)
        return result[list(work.columns)] if work.columns else result


def empty_frame(schema: pa.Schema, *, origin: bool = False) -> DaskFrame:
    """Return a frame without rows, on which a step is planned before its input exists."""
    empty = empty_arrow_frame(schema, origin=origin)
    with override_config({"dataframe.convert-string": False}):
        # Two partitions: with one, no operation of Dask needs a shuffle.
        frame: DaskFrame = dd.from_map(_no_rows, [0, 1], empty=empty, meta=empty, enforce_metadata=False, label="empty")
    return frame


def _no_rows(_: int, *, empty: pd.DataFrame) -> pd.DataFrame:
    return empty


def _decoded(schema: pa.Schema) -> pa.Schema:
    return pa.schema(
        [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in schema]
    ).remove_metadata()


class _Eager(BaseException):
    """Signal that a step computes something. Not an Exception, so that no code of the step hides it."""


def _refuse(*_: Any, **__: Any) -> Any:
    raise _Eager


@contextmanager
def _lazy(where: str) -> Iterator[None]:
    """Refuse to compute anything in the block.

    :raises StepFailed: if the block does.
    """
    try:
        with override_config({"scheduler": _refuse}):
            yield
    except _Eager as error:
        at = _own_line(error)
        raise StepFailed(
            "a dask step must be lazy",
            where=f"{where}, {at}" if at else where,
            found="a call that computes rows, such as compute, persist, len, head, set_index or sort_values",
            expected="operations that only describe the result: it is computed, partition by partition, by the job",
            next_step="leave compute out; for an order within partitions use shuffle(...).map_partitions(...)",
        ) from None


def _own_line(error: BaseException) -> str:
    """Return the last line of the user's code in a traceback, as text; empty if there is none."""
    found, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        path = code.co_filename
        if not path.startswith(_OTHERS) and "site-packages" not in path and os.path.isabs(path):
            found = f"line {trace.tb_lineno} of {path}"
        elif path == "<dynamic-code>":  # a function that was sent by value has lost its file
            found = f"line {trace.tb_lineno}, in {code.co_name}"
        trace = trace.tb_next
    return found


def apply_step(
    function: Function, frame: DaskFrame, inputs: Mapping[str, DaskFrame], *, where: str, is_lowered: bool = True
) -> DaskFrame:
    """Call the function of a step, and check what it returns.

    :param where: name of the step, for messages.
    :param is_lowered: False: the method of its shuffles is chosen later. Dask keeps what it has lowered once.
    :raises StepFailed: if the function raises, computes something, or returns no frame that can be kept.
    """
    with _lazy(where):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                result = function(frame, **inputs)
        except PipelineError:
            raise
        except Exception as error:
            raise step_failed(error, where) from error
        if not isinstance(result, DaskFrame):
            raise StepFailed(
                "a dask step returned no Dask DataFrame",
                where=where,
                found=f"{type(result).__module__}.{type(result).__qualname__}",
                expected="a dask.dataframe.DataFrame",
                next_step="to_frame() makes one of a series; do not call compute()",
            )
        _check_index(result._meta, where)
        # What sorts computes the divisions of its result when it is lowered.
        if is_lowered:
            result.optimize(fuse=False)
    return result


def step_failed(error: Exception, where: str) -> StepFailed:
    """Return the error of a step that raised ``error``, with the last line of the user's code."""
    at = _own_line(error)
    return StepFailed(
        "a dask step failed",
        where=where,
        found=f"{type(error).__name__}: {error}" + (f" ({at})" if at else ""),
        expected="a function that takes Dask DataFrames, one for each name in inputs, and returns one",
        next_step="fix the function, then run the job again",
    )


def _check_index(meta: pd.DataFrame, where: str) -> None:
    names = [str(name) for name in meta.index.names if name is not None]
    if names or meta.index.nlevels > 1:
        raise StepFailed(
            "the result of a dask step has an index, which would be lost",
            where=where,
            found=f"index {', '.join(names) or 'of several levels'}",
            expected="values in columns only",
            next_step="end with .reset_index()",
        )
    if meta.columns.nlevels > 1 or not all(isinstance(name, str) for name in meta.columns):
        raise StepFailed(
            "the columns of the result of a dask step are not texts",
            where=where,
            found=", ".join(map(repr, meta.columns[:5])),
            expected="one text for each column",
            next_step="name them, such as agg(total=('price', 'sum'))",
        )


def frame_schema(meta: pd.DataFrame, *, where: str) -> pa.Schema:
    """Return the Arrow schema of a result from its empty frame.

    :raises StepFailed: for a column without a type.
    """
    fields: list[pa.Field] = []
    for name, dtype in meta.dtypes.items():
        try:
            kind = pa.Array.from_pandas(meta[name]).type if not _is_text(dtype) else pa.string()
        except (pa.ArrowException, TypeError):
            kind = pa.null()
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if (pa.types.is_null(kind) and str(dtype) == "object") or str(name) in [one.name for one in fields]:
            raise StepFailed(
                "a column of the result of a dask step has no type",
                where=where,
                found=f"column {name!r} of dtype {dtype}",
                expected="columns of one type each, with different names",
                next_step="convert it, such as astype('string[pyarrow]'), or give map_partitions a meta with dtypes",
            )
        fields.append(pa.field(str(name), kind))
    return pa.schema(fields)


def key_columns(frame: DaskFrame, known: Sequence[str]) -> list[str]:
    """Return the columns by which a frame joins, groups or shuffles, as far as they are columns of its input."""
    found: list[str] = []
    for part in frame.expr.walk():
        for name in ("left_on", "right_on", "by", "partitioning_index"):
            value = getattr(part, name, None)
            values = value if isinstance(value, (list, tuple)) else [value]
            found += [str(getattr(one, "name", one)) for one in values if isinstance(one, str) or hasattr(one, "name")]
    return [name for name in dict.fromkeys(found) if name in known]


def _is_text(dtype: Any) -> bool:
    return isinstance(dtype, pd.StringDtype)


def fingerprint(frame: DaskFrame, schema: pa.Schema, *, shuffle: str) -> tuple[str, int]:
    """Return the fingerprint of a result, and its number of partitions.

    Results with the same fingerprint have the same rows in the same partitions. It is equal in every process.

    :param frame: result of `build_frame`.
    """
    with override_config(step_config(shuffle)), _lazy("planning"):
        # Names of fused expressions depend on the order of sets, so on the process.
        lowered = frame.optimize(fuse=False)
    record = {
        # The name of an expression is a hash of its operations, functions and inputs.
        "expression": str(frame.expr._name),
        "lowered": str(lowered.expr._name),
        "partitions": int(lowered.npartitions),
        "schema": schema.serialize().to_pybytes().hex(),
        "shuffle": shuffle,
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    return digest_json(record), int(lowered.npartitions)


def partition_table(part: pd.DataFrame, schema: pa.Schema, *, where: str) -> pa.Table:
    """Return a computed partition as a table of the planned schema. Its index is dropped.

    :raises SchemaDrift: if it has other columns, or values that do not fit.
    """
    if list(map(str, part.columns)) != schema.names:
        raise SchemaDrift(
            "a dask step returned other columns than planned",
            where=where,
            found=", ".join(map(str, part.columns)),
            expected=", ".join(schema.names),
            next_step="give map_partitions the meta of what it returns",
        )
    try:
        return pa.Table.from_pandas(part, schema=schema, preserve_index=False).replace_schema_metadata(None)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise SchemaDrift(
            "a dask step returned values of another type than planned",
            where=where,
            found=str(error),
            expected=", ".join(f"{field.name}: {field.type}" for field in schema),
            next_step="give map_partitions the meta of what it returns, or convert the column with astype",
        ) from error
