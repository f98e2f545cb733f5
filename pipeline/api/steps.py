"""`dask`: a step of a job that joins, groups or shuffles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pipeline.spec.fields import AnyPath
from pipeline.spec.parts import DaskInput, DaskStep


def dask(
    function: Callable[..., Any] | str,
    *,
    inputs: Mapping[str, AnyPath | DaskInput | Mapping[str, Any]] | None = None,
    partition_bytes: int | str | None = None,
    shuffle: Literal["p2p", "tasks"] = "p2p",
    origin: bool = False,
) -> DaskStep:
    """Make a step whose rows depend on other rows, for the ``steps`` of a `Job`.

    Parameters
    ----------
    function : callable or str
        Takes Dask DataFrames, and returns one without computing anything; ``"module:function"`` or a function, also of
        a notebook's cell.
    inputs : dict, optional
        Further tables by the name of the function's parameter: a path, or the fields of `DaskInput`.
    partition_bytes : int or str, optional
        Most uncompressed bytes of a partition of its tables. Default: 256 MiB.
    shuffle : {"p2p", "tasks"}, default "p2p"
        Method of Dask's shuffles.
    origin : bool, default False
        Add the columns ``_file`` and ``_row``, the origin of each row.

    Returns
    -------
    DaskStep

    Raises
    ------
    ValidationError
        For a function that cannot run on workers, or a name that is no parameter.

    Examples
    --------
    >>> def history(df, customers):
    ...     return df.merge(customers, on="customer_id")
    >>> pipeline.dask(history, inputs={"customers": "lake/customers/"}).inputs["customers"].path
    'lake/customers/'

    See Also
    --------
    checkpoint : The same guarantees for any Dask DataFrame, without a job.
    """
    tables = {
        name: value if isinstance(value, DaskInput) else {**value} if isinstance(value, Mapping) else {"path": value}
        for name, value in (inputs or {}).items()
    }
    return DaskStep.model_validate(
        {
            "dask": function,
            "inputs": tables,
            "partition_bytes": partition_bytes,
            "shuffle": shuffle,
            "origin": origin,
        }
    )
