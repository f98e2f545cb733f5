"""Batches: row ranges, boundaries, and sizes that follow the measured time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.rows import Fragment
from pipeline.scoring.batching import FIRST_ROWS, GROWTH, MIN_ROWS, SECONDS, TimedBatchSizer, rebatch
from pipeline.sources import SourceBatch, read_batches
from pipeline.testing.recipes import make_partition

SIZES = (70, 0, 13, 1, 40)


@pytest.fixture(scope="module")
def fragments(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fragment, ...]:
    """Make fragments of files of these sizes; the first fragment begins and ends inside its file."""
    folder, paths, start = tmp_path_factory.mktemp("batches"), [], 0
    for number, rows in enumerate(SIZES):
        paths.append(folder / f"{number}.parquet")
        ids = np.arange(start, start + rows)
        pq.write_table(pa.table({"id": ids, "third": ids % 3}), paths[-1], row_group_size=16)
        start += rows
    first, *others = make_partition(*paths).fragments
    return (Fragment(first.path, 5, 60, first.group_start, first.group_stop, first.bytes), *others)


def read(fragments: tuple[Fragment, ...], *, keep: str | None, batch_rows: int) -> Iterator[SourceBatch]:
    schema = pa.schema([pa.field("id", pa.int64()), pa.field("third", pa.int64())])
    return read_batches(fragments, columns=schema.names, schema=schema, filter=keep, batch_rows=batch_rows)


@settings(deadline=None)
@given(
    st.sampled_from([None, "third == 0", "id < 8 or id > 62", "id > 1000", "id > 100", "id < 30"]),
    st.integers(1, 90),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
def test_each_batch_stands_for_a_range_of_rows(
    fragments: tuple[Fragment, ...], keep: str | None, batch_rows: int, sizes: list[int]
) -> None:
    whole = list(read(fragments, keep=keep, batch_rows=batch_rows))
    wanted = itertools.cycle(sizes)
    found = list(rebatch(iter(whole), fragments, lambda: next(wanted)))
    for part in ("fragment", "row", "filtered"):
        kept = [getattr(batch, part) for batch in found]
        if part != "filtered":
            assert np.concatenate([*kept, []]).tolist() == [
                value for batch in whole for value in getattr(batch, part).tolist()
            ]
    ids = [value for batch in found for value in batch.table.column("id").to_pylist()]
    assert ids == [value for batch in whole for value in batch.table.column("id").to_pylist()]
    starts = np.cumsum([0, *(fragment.rows for fragment in fragments)])
    done = np.zeros(len(fragments), np.int64)
    for batch in found:
        done += batch.filtered + np.bincount(batch.fragment, minlength=len(fragments))
        # What was told of so far are the first rows of the partition, fragment by fragment.
        assert done.tolist() == np.diff(np.minimum(starts, done.sum())).tolist()
    assert not whole or done.sum() == starts[-1]


def test_a_little_more_than_wanted_is_not_cut(fragments: tuple[Fragment, ...]) -> None:
    (whole,) = read(fragments, keep=None, batch_rows=1000)
    assert next(iter(rebatch([whole], fragments, lambda: 80))) is whole
    assert [batch.table.num_rows for batch in rebatch([whole], fragments, lambda: 50)] == [50, 59]


def play(cost: Callable[[int, int], float], *, rows: int, ceiling: int = 65_536) -> list[tuple[int, float]]:
    """Rows and seconds of each batch of a partition; ``cost(start, stop)`` is the time of those rows."""
    sizer, start, found = TimedBatchSizer.start(ceiling, is_known=False), 0, []
    while start < rows:
        stop = min(rows, start + sizer.rows)
        seconds = cost(start, stop)
        found.append((stop - start, seconds))
        sizer, start = sizer.after(stop - start, seconds), stop
    return found


class TestTimedBatchSizer:
    """A batch takes about half a second, and a fixed cost of each call stays a small part of it."""

    def test_first_batch_is_not_split_without_steps(self) -> None:
        assert TimedBatchSizer.start(65_536, is_known=True).rows == 65_536
        assert TimedBatchSizer.start(65_536, is_known=False).rows == FIRST_ROWS
        assert TimedBatchSizer.start(100, is_known=False).rows == 100

    def test_cheap_rows_grow_to_whole_batches_at_once(self) -> None:
        sizes = [rows for rows, _ in play(lambda start, stop: (stop - start) * 1e-6, rows=500_000)]
        assert sizes[:5] == [256, 1024, 4096, 16_384, 65_536]
        assert set(sizes[4:-1]) == {65_536}

    def test_expensive_rows_end_soon(self) -> None:
        found = play(lambda start, stop: (stop - start) * 0.005, rows=5000)
        assert found[0][1] == pytest.approx(1.28)
        assert all(seconds <= SECONDS for _, seconds in found[1:])

    def test_change_of_cost_is_seen_after_one_batch(self) -> None:
        def cost(start: int, stop: int) -> float:
            return sum(0.005 if 20_000 <= row < 24_000 else 1e-6 for row in range(start, stop))

        found = play(cost, rows=200_000)
        late = [seconds for _, seconds in found if seconds > 1.1 * SECONDS]
        assert len(late) <= 2, "the one that met them, and the next, whose size follows from it"
        assert found[-2][0] == 65_536

    def test_cost_per_call_is_not_paid_more_often(self) -> None:
        found = play(lambda start, stop: 2.0 + (stop - start) * 1e-6, rows=1_000_000)
        assert len(found) <= 4 + 1_000_000 / 65_536 + 2
        assert {rows for rows, _ in found[7:-1]} == {65_536}

    def test_a_call_may_take_a_quarter_of_the_time(self) -> None:
        found = play(lambda start, stop: 0.4 + (stop - start) * 0.001, rows=50_000)
        rows, seconds = found[-2]
        assert 0.4 / seconds == pytest.approx(0.25, abs=0.03)
        assert rows == pytest.approx(1200, rel=0.1)

    def test_remainder_counts_only_if_it_was_slow(self) -> None:
        sizer = TimedBatchSizer(65_536, 65_536).after(65_536, 0.1)
        assert sizer.after(100, 0.01).rows == 65_536
        assert sizer.after(100, 5.0).rows == MIN_ROWS
        assert sizer.after(0, 0.0) == sizer

    @given(st.lists(st.tuples(st.integers(1, 70_000), st.floats(0, 1000)), max_size=20), st.integers(1, 65_536))
    def test_batch_size_stays_within_its_bounds(self, measured: list[tuple[int, float]], ceiling: int) -> None:
        sizer = TimedBatchSizer.start(ceiling, is_known=False)
        for rows, seconds in measured:
            before, sizer = sizer, sizer.after(min(rows, sizer.rows), seconds)
            assert 1 <= sizer.rows <= ceiling
            assert sizer.rows <= GROWTH * before.rows
