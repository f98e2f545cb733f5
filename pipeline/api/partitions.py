"""`map_partitions`: apply a function or a model to a Dask DataFrame as a job, and keep the result."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.api.display import show_observers
from pipeline.api.frames import with_stored_models
from pipeline.api.tracebacks import interruptible
from pipeline.common.code_search import find_code
from pipeline.common.digest import digest_json
from pipeline.common.step_code import digests_of
from pipeline.errors import SpecError
from pipeline.events import Callback
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.load import absolute_path
from pipeline.spec.parts import Errors
from pipeline.spec.score import Score
from pipeline.storage.store import open_store

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.api.mapped_frame import MappedFrame
    from pipeline.execution.graph import DaskFrame
    from pipeline.scoring.partition_step import FrameType

_NAME = "map-partitions"
_MASKS = ("keep_columns", "hash_columns")
"""Fields of ``errors`` that would leave columns of rejects out."""


def _field(errors: Errors | Mapping[str, Any] | None, name: str) -> Any:
    return errors.get(name) if isinstance(errors, Mapping) else getattr(errors, name, None)


def map_partitions(
    frame: DaskFrame,
    function: Callable[[pd.DataFrame], pd.DataFrame] | Score,
    *,
    checkpoint: str | os.PathLike[str],
    meta: pd.DataFrame | None = None,
    errors: Errors | Mapping[str, Any] | None = None,
    on_error: Mapping[str, Any] | None = None,
    row_wise: str = "checked",
    timeout: float | str | None = None,
    row_timeout: float | str | None = None,
    settings: Settings | None = None,
    callbacks: Sequence[Callback] | None = None,
) -> MappedFrame:
    """Map: apply a function or a model to the rows of a Dask DataFrame, once, and return the result as kept on disk.

    It is Dask's ``map_partitions`` with the guarantees of a job. It computes now, on the current
    ``distributed.Client``, or on the cluster of the settings. What is finished is kept, whatever dies: the next call
    with the same expression, function and options computes what is missing, or only opens the files. Rows that fail are
    rejects, with the reason; a batch that does not fit in memory, or would kill its worker, is halved; slow partitions
    are shared with idle workers.

    The function gets rows of one partition, with their index and dtypes, but not always all of them. So its result for
    a row must not depend on the other rows; planning tries that on a sample. It may change and drop rows, and must keep
    the index. Partitions, order, index and divisions of the result are those of ``frame``.

    Parameters
    ----------
    frame : dask.dataframe.DataFrame
        Any expression. Its partitions are kept first, as by ``pipeline.checkpoint``.
    function : callable or Score
        pandas DataFrame -> pandas DataFrame; or a model, such as ``Score(model="churn.ubj", output="churn")``.
    checkpoint : str or PathLike
        Folder or URL, which workers can write to: ``input/`` has the partitions of ``frame``, ``jobs/`` the job
        directories, ``rows/`` the results.
    meta : pandas.DataFrame, optional
        Empty frame with the columns and dtypes that the function returns. Default: columns with the name and type of
        one of ``frame`` keep its dtype, others get that of their Parquet type.
    errors : Errors or dict, optional
        Limits for rejected rows. Default: no rejected row is allowed.
    on_error : dict, optional
        Action per class of an exception, as in a ``map`` step.
    row_wise : {"checked", "unchecked"}, default "checked"
        ``"unchecked"``: do not try the function on a sample in different batches.
    timeout, row_timeout : float or str, optional
        Longest time for a batch and for a row, such as ``"30 s"``; rows that take longer are rejected.
    settings : Settings, optional
        Default: ``Settings.load()``.
    callbacks : sequence of Callback, optional
        Observers to call instead of the progress display.

    Returns
    -------
    dask.dataframe.DataFrame
        The results, read from Parquet; columns that are not used are not read. Its ``rejects`` is a pandas DataFrame of
        the rows that failed, with their index, ``_partition``, ``_reason`` and ``_message``; its ``report`` is the
        ``Report`` of the job.

    Raises
    ------
    SpecError
        If ``frame`` is not a Dask DataFrame, or an option is invalid.
    StepFailed
        If the result for a row depends on others, rows are added, or the index is lost; and if the function rejected
        more rows than ``errors`` allows.
    TooManyRejects
        If a model rejected more rows than ``errors`` allows.
    JobLocked
        If another process computes the same at this time.

    Examples
    --------
    >>> rows = pipeline.Job.load("job.yaml").to_dask()
    >>> def monthly(part):
    ...     return part.assign(risk=part["churn"] * part["monthly_charges"])
    >>> risks = pipeline.map_partitions(rows, monthly, checkpoint="checkpoints/risks/", callbacks=[])
    >>> risks.npartitions == rows.npartitions, len(risks.rejects)
    (True, 0)

    See Also
    --------
    checkpoint : Keeps the partitions of an expression as they are.
    """
    from pipeline.execution.graph import DaskFrame

    if not isinstance(frame, DaskFrame):
        raise SpecError(
            "partitions are those of a Dask DataFrame",
            found=f"{type(frame).__module__}.{type(frame).__qualname__}",
            expected="a dask.dataframe.DataFrame",
            next_step="dask.dataframe.from_pandas(frame, npartitions=...) makes one of a pandas DataFrame",
        )
    options = {"on_error": on_error, "timeout": timeout, "row_timeout": row_timeout}
    options = {name: value for name, value in options.items() if value is not None}
    root = absolute_path(os.fspath(checkpoint)).rstrip("/")
    settings = replace(settings or Settings.load(), directory=f"{root}/jobs")
    work = _work_of(frame, function, meta, {**options, "row_wise": row_wise}, errors=errors, settings=settings)
    with interruptible("the partitions were computed"), show_observers(callbacks) as observers:
        return _mapped(frame, work, root=root, settings=settings, callbacks=observers)


@dataclass(frozen=True)
class _Work:
    """A function or model to apply, and how."""

    step: Any
    """Step, as in the fields of a job spec."""
    errors: Any
    given: FrameType
    made: FrameType | None


def _work_of(
    frame: DaskFrame,
    function: Any,
    meta: pd.DataFrame | None,
    options: Mapping[str, Any],
    *,
    errors: Errors | Mapping[str, Any] | None,
    settings: Settings,
) -> _Work:
    """Return the step that applies ``function`` to the rows of ``frame``.

    :raises SpecError: for columns or functions that cannot be used.
    """
    from pipeline.scoring.partition_step import FrameType, PartitionStep, is_async

    names = list(frame.columns)
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise SpecError(
            "the columns of the frame cannot be kept as Parquet",
            found=repr(names)[:200],
            expected="unique strings",
            next_step="rename the columns",
        )
    masked = [name for name in _MASKS if _field(errors, name)]
    if masked:
        raise SpecError(
            "rejects of partitions have all columns of the frame",
            where=f"errors.{masked[0]}",
            found="columns that are not stored, or stored as hashes",
            expected="no such option",
            next_step="drop the columns from the frame, or run a job",
        )
    given, made = FrameType.of(frame._meta), None if meta is None else FrameType.of(meta)
    if isinstance(function, Score):
        if function.keep is not None or len(options) > 1 or made is not None:
            raise SpecError(
                "a model has no such option here",
                found="score.keep" if function.keep is not None else "meta, on_error, timeout or row_timeout",
                expected="a Score, and errors",
                next_step="drop columns of the result; give options to a function",
            )
        return _Work(with_stored_models({"score": function}, settings), errors, given, None)
    if not callable(function) or is_async(function):
        raise SpecError(
            "not a function of partitions",
            found="an async function" if callable(function) else type(function).__name__,
            expected="a function, pandas DataFrame -> pandas DataFrame; or a Score",
            next_step="use an async function in a map step of a job" if callable(function) else "give a function",
        )
    step = PartitionStep(function, given, made)
    return _Work({"map": step, **options}, errors, given, made)


def _mapped(
    frame: DaskFrame, work: _Work, *, root: str, settings: Settings, callbacks: Sequence[Callback]
) -> MappedFrame:
    from pipeline.api.mapped_frame import MappedFrame
    from pipeline.execution.mapped_frames import keep_with_places, mapped_frame, published_files
    from pipeline.report.output import published_schema

    digest = _digest(frame, work, root=root, settings=settings)
    job = _finished_job(settings, digest)
    if job is None:
        kept = keep_with_places(frame, f"{root}/input")
        spec = _spec(work, sources=kept.files, sink=f"{root}/rows/{digest}")
        job = _run(spec, digest, settings=settings, callbacks=callbacks)
    schema, paths = published_schema(job)
    files, nullable = published_files(paths)
    kind = _result_type(schema, work, nullable=nullable)
    made = mapped_frame(files, kind, divisions=frame.divisions, storage=job.plan.spec.storage)
    return MappedFrame(made, job, work.given)


def _spec(work: _Work, *, sources: Sequence[str], sink: str) -> JobSpec:
    return JobSpec.build(
        name=_NAME,
        source={"path": sources},
        steps=[work.step],
        sink={"path": sink},
        **({"errors": work.errors} if work.errors is not None else {}),
    )


def _digest(frame: DaskFrame, work: _Work, *, root: str, settings: Settings) -> str:
    """Return what tells this work from others: its expression, its function with all code, and its options."""
    from pipeline.execution.frame_checkpoint import identity_of

    spec = _spec(work, sources=["input"], sink=f"{root}/rows")
    code = find_code(spec.entrypoints, import_paths=settings.import_paths)
    record = {"expression": identity_of(frame), "spec": spec.digest, "code": digests_of(code.steps)}
    return digest_json(record)[:16]


def _job_id(digest: str) -> str:
    return f"{_NAME}-{digest}"


def _finished_job(settings: Settings, digest: str) -> JobDirectory | None:
    """Return the job of this work, if it has succeeded."""
    store = open_store(f"{settings.directory}/{_job_id(digest)}", private=True)
    if not store.exists(layout.JOB_FILE):
        return None
    job = JobDirectory.open(store.root)
    return job if job.status().is_success else None


def _run(spec: JobSpec, digest: str, *, settings: Settings, callbacks: Sequence[Callback]) -> JobDirectory:
    from pipeline.api.clusters import on_client
    from pipeline.execution.frame_checkpoint import current_client
    from pipeline.runner import run

    report = run(spec, settings=on_client(settings, current_client()), job_id=_job_id(digest), callbacks=callbacks)
    return JobDirectory.open(report.directory)


def _result_type(schema: Any, work: _Work, *, nullable: frozenset[str]) -> FrameType:
    import pyarrow as pa

    from pipeline.scoring.partition_step import hidden_columns, result_type

    hidden = hidden_columns(len(work.given.index))
    visible = pa.schema([field for field in schema if field.name not in hidden])
    return result_type(visible, work.given, work.made, nullable=sorted(nullable))
