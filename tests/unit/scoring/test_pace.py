from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scoring.batching import FIRST_ROWS, GROWTH, LEAST_ROWS, SECONDS, TimedBatchSizer


def play(cost: Callable[[int, int], float], *, rows: int, ceiling: int = 65_536) -> list[tuple[int, float]]:
    """Rows and seconds of the batches of so many rows; ``cost(start, stop)`` is what they take."""
    pace, start, found = TimedBatchSizer.start(ceiling, is_known=False), 0, []
    while start < rows:
        stop = min(rows, start + pace.rows)
        seconds = cost(start, stop)
        found.append((stop - start, seconds))
        pace, start = pace.after(stop - start, seconds), stop
    return found


def test_where_only_a_model_scores_the_first_batch_is_whole() -> None:
    assert TimedBatchSizer.start(65_536, is_known=True).rows == 65_536
    assert TimedBatchSizer.start(65_536, is_known=False).rows == FIRST_ROWS
    assert TimedBatchSizer.start(100, is_known=False).rows == 100


def test_cheap_rows_grow_to_whole_batches_at_once() -> None:
    sizes = [rows for rows, _ in play(lambda start, stop: (stop - start) * 1e-6, rows=500_000)]
    assert sizes[:5] == [256, 1024, 4096, 16_384, 65_536]
    assert set(sizes[4:-1]) == {65_536}


def test_dear_rows_end_soon() -> None:
    found = play(lambda start, stop: (stop - start) * 0.005, rows=5000)
    assert found[0][1] == pytest.approx(1.28)
    assert all(seconds <= SECONDS for _, seconds in found[1:])


def test_rows_that_become_dear_are_seen_after_one_batch_and_those_that_become_cheap_too() -> None:
    def cost(start: int, stop: int) -> float:
        return sum(0.005 if 20_000 <= row < 24_000 else 1e-6 for row in range(start, stop))

    found = play(cost, rows=200_000)
    late = [seconds for _, seconds in found if seconds > 1.1 * SECONDS]
    assert len(late) <= 2, "the one that met them, and the next, whose size follows from it"
    assert found[-2][0] == 65_536


def test_what_is_paid_for_each_call_is_not_paid_more_often() -> None:
    found = play(lambda start, stop: 2.0 + (stop - start) * 1e-6, rows=1_000_000)
    assert len(found) <= 4 + 1_000_000 / 65_536 + 2
    assert {rows for rows, _ in found[7:-1]} == {65_536}


def test_a_call_may_take_a_quarter_of_the_time() -> None:
    found = play(lambda start, stop: 0.4 + (stop - start) * 0.001, rows=50_000)
    rows, seconds = found[-2]
    assert 0.4 / seconds == pytest.approx(0.25, abs=0.03)
    assert rows == pytest.approx(1200, rel=0.1)


def test_a_remainder_says_little_unless_it_was_slow() -> None:
    pace = TimedBatchSizer(65_536, 65_536).after(65_536, 0.1)
    assert pace.after(100, 0.01).rows == 65_536
    assert pace.after(100, 5.0).rows == LEAST_ROWS
    assert pace.after(0, 0.0) == pace


@given(st.lists(st.tuples(st.integers(1, 70_000), st.floats(0, 1000)), max_size=20), st.integers(1, 65_536))
def test_it_stays_within_its_bounds(measured: list[tuple[int, float]], ceiling: int) -> None:
    pace = TimedBatchSizer.start(ceiling, is_known=False)
    for rows, seconds in measured:
        before, pace = pace, pace.after(min(rows, pace.rows), seconds)
        assert 1 <= pace.rows <= ceiling
        assert pace.rows <= GROWTH * before.rows
