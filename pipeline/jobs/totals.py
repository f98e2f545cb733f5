"""`Totals`: what the receipts of a job say together, found in one pass over them. Pure."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.common.rows import RowCounts
from pipeline.jobs.receipt import Receipt, Seconds
from pipeline.models.engines import EngineUse


@dataclass(frozen=True)
class Totals:
    """Sums over receipts. There may be very many, each made anew from a file when it is looked at: one look will do."""

    rows: RowCounts
    again: int
    """Rows in that earlier rounds had rejected."""
    reasons: Counter[str]
    """Rows rejected less those that an earlier round had rejected, per reason."""
    seconds: Seconds
    durations: array[float]
    """Seconds that each partition took, in the order of the receipts."""
    smallest_batch: int | None
    """Fewest rows a batch of any partition ended with; None where none tells."""
    engine: EngineUse | None
    """None where no receipt tells."""
    output_bytes: int

    @staticmethod
    def of(receipts: Iterable[Receipt]) -> Totals:
        """Those of ``receipts``."""
        rows_in = out = rejected = filtered = again = output_bytes = 0
        seconds, durations = Seconds(), array("d")
        reasons: Counter[str] = Counter()
        smallest: int | None = None
        engine: EngineUse | None = None
        for receipt in receipts:
            rows = receipt.rows
            rows_in, out = rows_in + rows.rows_in, out + rows.out
            rejected, filtered = rejected + rows.rejected, filtered + rows.filtered
            if receipt.reasons or receipt.before:
                reasons.update(receipt.reasons)
                reasons.subtract(receipt.before)
                again += sum(receipt.before.values())
            seconds += receipt.seconds
            durations.append(receipt.seconds.total)
            if receipt.batch_rows:
                smallest = min(smallest or receipt.batch_rows, receipt.batch_rows)
            if receipt.engine is not None:
                engine = receipt.engine if engine is None else engine + receipt.engine
            output_bytes += receipt.data.bytes if receipt.data else 0
        whole = RowCounts(rows_in, out, rejected, filtered)
        return Totals(whole, again, reasons, seconds, durations, smallest, engine, output_bytes)
