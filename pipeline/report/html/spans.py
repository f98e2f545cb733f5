"""`Spans`: when and where the partitions of a job were scored, from their receipts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush

import numpy as np

from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.stages import stage_states


@dataclass(frozen=True, slots=True)
class Span:
    """The attempt that scored a partition."""

    partition: str
    worker: str
    start: float
    """Seconds since the epoch, by the worker's clock."""
    stop: float
    rows: int
    """Input rows."""
    rejected: int
    peak_memory: int
    """Peak resident bytes of the worker process until then."""

    @staticmethod
    def of(receipt: Receipt) -> Span | None:
        """Return the span of a receipt; None for receipts of earlier versions, which have no time."""
        if not receipt.ended:
            return None
        return Span(
            receipt.partition,
            receipt.worker,
            receipt.ended - receipt.seconds.total,
            receipt.ended,
            receipt.rows.input,
            receipt.rows.rejected,
            receipt.peak_memory,
        )


@dataclass(frozen=True)
class Spans:
    """The spans of all partitions whose time is known, in the order of their starts."""

    parts: tuple[Span, ...]

    @staticmethod
    def of(parts: Iterable[Span]) -> Spans:
        """Return ``parts`` in the order of their starts."""
        return Spans(tuple(sorted(parts, key=lambda part: part.start)))

    @cached_property
    def starts(self) -> np.ndarray:
        """float64 [partitions]: seconds since the epoch."""
        return np.array([part.start for part in self.parts])

    @cached_property
    def stops(self) -> np.ndarray:
        """float64 [partitions]: seconds since the epoch."""
        return np.array([part.stop for part in self.parts])

    @cached_property
    def rows(self) -> np.ndarray:
        """int64 [partitions]: input rows."""
        return np.array([part.rows for part in self.parts], np.int64)

    @property
    def begin(self) -> float:
        """Start of the first partition."""
        return float(self.starts.min())

    @property
    def end(self) -> float:
        """End of the last partition; a millisecond after `begin` at the least."""
        return max(float(self.stops.max()), self.begin + 1e-3)

    def lanes(self) -> list[tuple[str, list[Span]]]:
        """Return worker and spans of each thread: no two spans of a lane overlap by more than clocks may differ."""
        workers: dict[str, list[Span]] = {}
        for part in self.parts:
            workers.setdefault(part.worker, []).append(part)
        return [(worker, lane) for worker, parts in sorted(workers.items()) for lane in _lanes(parts)]


def _lanes(parts: Sequence[Span]) -> list[list[Span]]:
    lanes: list[list[Span]] = []
    free: list[tuple[float, int]] = []
    for part in parts:
        if free and free[0][0] <= part.start + 0.005:
            _, number = heappop(free)
        else:
            number = len(lanes)
            lanes.append([])
        lanes[number].append(part)
        heappush(free, (part.stop, number))
    return lanes


def receipts_of(job: JobDirectory, ledger: Ledger | None = None) -> Iterator[Receipt]:
    """Yield the receipts that count: of a fan-out those of its children, of a job of stages those of all of them.

    :param ledger: ledger of a job without children, if already read.
    """
    if job.record.children:
        for child in job.children():
            yield from child.ledger().done
    elif job.record.stages:
        for state in stage_states(job):
            if state.job is not None:
                yield from state.job.ledger().done
    else:
        yield from (ledger or job.ledger()).done
