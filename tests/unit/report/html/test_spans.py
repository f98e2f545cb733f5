from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.html.spans import Span, Spans


def span(start: float, stop: float, *, worker: str = "w", partition: str = "0", rejected: int = 0) -> Span:
    return Span(partition, worker, start, stop, 100, rejected, 10**8)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9), st.sampled_from("ab")), min_size=1, max_size=40))
def test_spans_of_a_lane_follow_each_other(times):
    parts = sorted(
        (span(start, start + length, worker=worker) for start, length, worker in times), key=lambda p: p.start
    )
    lanes = Spans(tuple(parts)).lanes()
    assert sorted((p.start, p.stop, p.worker) for _, lane in lanes for p in lane) == sorted(
        (p.start, p.stop, p.worker) for p in parts
    )
    for worker, lane in lanes:
        assert {part.worker for part in lane} == {worker}
        assert all(before.stop <= after.start for before, after in itertools.pairwise(lane))
    # As many lanes as partitions ran at once.
    for worker in {part.worker for part in parts}:
        at_once = max(sum(p.start <= moment < p.stop for p in parts if p.worker == worker) for moment in range(60))
        assert sum(name == worker for name, _ in lanes) == at_once
