"""`checkpoint`: compute a Dask DataFrame once, and keep its partitions as Parquet."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipeline.errors import SpecError
from pipeline.spec.load import absolute_path

if TYPE_CHECKING:
    from pipeline.execution.graph import DaskFrame


def checkpoint(frame: DaskFrame, path: str | os.PathLike[str]) -> DaskFrame:
    """Checkpoint: compute each partition of a Dask DataFrame once, and return the frame as read from Parquet.

    The partitions are computed now, on the current ``distributed.Client`` if there is one, and each is kept as soon as
    it is finished. If a worker, the scheduler or this process dies, the next call for the same expression computes what
    is missing; if nothing is missing, it only opens the files. Index, divisions, order and dtypes are those of
    ``frame``. Several processes may call this for the same path at the same time.

    An expression is the same if it was built from the same operations, functions, inputs and versions of Dask, pandas
    and pyarrow; another one is computed anew in a folder of its own beside it, and nothing is removed. Partitions must
    not depend on when they are computed: ``sample`` needs a ``random_state``. One finished partition is therefore
    computed again when others are missing, and when a worker was lost; if its rows are others, all partitions are
    computed anew in one run, and ``differs.json`` in the folder says which one differed.

    With a client, the rows of p2p shuffles are counted on its workers from then on: a shuffle that loses rows is an
    error. If this is not possible, it is logged once.

    Parameters
    ----------
    frame : dask.dataframe.DataFrame
        Any expression: joins, groupbys and shuffles too.
    path : str or PathLike
        Folder or URL, which workers can write to.

    Returns
    -------
    dask.dataframe.DataFrame
        The same rows, read from the files. Columns that are not used are not read.

    Raises
    ------
    SpecError
        If ``frame`` is not a Dask DataFrame.
    SchemaDrift
        If Parquet has no type for a column.
    ReconciliationFailed
        If a shuffle lost rows, or an expression that is not deterministic could not be computed in one run.
    InsufficientMemory
        If workers were killed for their memory at a partition.
    CorruptInput
        When computed: if a kept file was changed or removed.

    Examples
    --------
    >>> scored = pipeline.Job.load("job.yaml").to_dask()
    >>> kept = pipeline.checkpoint(scored[scored["churn"] > 0.5], "checkpoints/likely/")
    >>> bool((kept["churn"] > 0.5).all().compute())
    True

    See Also
    --------
    Job : Scores files with receipts, rejects and a report.
    """
    from pipeline.execution import frame_checkpoint
    from pipeline.execution.graph import DaskFrame

    if not isinstance(frame, DaskFrame):
        raise SpecError(
            "only a Dask DataFrame has a checkpoint",
            found=f"{type(frame).__module__}.{type(frame).__qualname__}",
            expected="a dask.dataframe.DataFrame",
            next_step="dask.dataframe.from_pandas(frame, npartitions=...) makes one of a pandas DataFrame; "
            "series.to_frame() of a series",
        )
    return frame_checkpoint.checkpoint(frame, absolute_path(os.fspath(path)))
