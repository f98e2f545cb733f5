"""`MappedFrame`: the Dask DataFrame that `pipeline.map_partitions` returns. Importing it imports Dask DataFrame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa

from pipeline.execution.graph import DaskFrame
from pipeline.plan.recipe import REJECT_MESSAGE, REJECT_REASON
from pipeline.report.rejects import read_rejected
from pipeline.scoring.partition_step import PARTITION, FrameType

if TYPE_CHECKING:
    from pipeline.jobs.directory import JobDirectory
    from pipeline.report.report import Report


class MappedFrame(DaskFrame):
    """The result of `pipeline.map_partitions`: a Dask DataFrame that knows its rejects.

    What Dask makes of it, such as ``result[result["x"] > 1]``, is an ordinary Dask DataFrame.
    """

    def __init__(self, frame: DaskFrame, job: JobDirectory, given: FrameType) -> None:
        super().__init__(frame.expr)  # type: ignore[no-untyped-call]
        object.__setattr__(self, "_job", job)
        object.__setattr__(self, "_given", given)

    @property
    def report(self) -> Report:
        """Report of the job that computed the rows: counts, reasons, times."""
        from pipeline.report.build import make_report

        return make_report(object.__getattribute__(self, "_job"))

    @property
    def rejects(self) -> pd.DataFrame:
        """Rows that could not be computed: their index and columns, ``_partition``, ``_reason`` and ``_message``."""
        return rejected_rows(object.__getattribute__(self, "_job"), object.__getattribute__(self, "_given"))


def rejected_rows(job: JobDirectory, given: FrameType) -> pd.DataFrame:
    """Return the rejects of a job over partitions as a frame of the type of these.

    :param given: type of the partitions.
    """
    added: dict[str, Any] = {"_partition": PARTITION, REJECT_REASON: REJECT_REASON, REJECT_MESSAGE: REJECT_MESSAGE}
    batches = list(read_rejected(job))
    if not batches:
        return given.empty().assign(**{name: pd.Series([], dtype=object) for name in added})
    table = pa.Table.from_batches(batches)
    frame = given.frame(table)
    return frame.assign(**{name: table.column(column).to_pandas().to_numpy() for name, column in added.items()})
