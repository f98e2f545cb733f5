"""Projected memory and batch sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan.memory import (
    BATCH_SHARE,
    CEILING_ROWS,
    ENGINE_BYTES,
    ENGINE_FACTOR,
    GROW_AFTER,
    MIN_BATCH_ROWS,
    MODEL_FACTOR,
    MOST_BATCH_BYTES,
    PAGE_BYTES,
    PROCESS_BYTES,
    batch_bytes,
    next_batch_rows,
    projected_memory,
    row_memory,
    shared_memory,
    starting_batch_rows,
    task_memory,
    written_group_bytes,
    written_group_rows,
)

GIB = 1 << 30


def test_the_formulas_are_those_that_are_documented():
    per_row = row_memory(row_bytes_in=100, row_bytes_out=120, features=25)
    assert per_row == 3 * 100 + 8 * 25 + 2 * 120
    assert row_memory(row_bytes_in=100, row_bytes_out=120, features=25, maps=True) == per_row + 4 * 100
    task = task_memory(
        batch_rows=1000, row_memory=per_row, columns=10, largest_group=10**9, row_bytes_out=120, row_group_rows=5000
    )
    assert task == 1000 * per_row + 10 * PAGE_BYTES + 5000 * 120
    assert shared_memory(10**6) == PROCESS_BYTES + MODEL_FACTOR * 10**6
    assert shared_memory(1, engine=True) == shared_memory(1) + ENGINE_BYTES + ENGINE_FACTOR
    assert projected_memory(task=task, model_bytes=10**6, threads=3) == shared_memory(10**6) + 3 * task


def test_pages_of_small_row_groups_take_no_more_than_the_group():
    task = task_memory(batch_rows=0, row_memory=0, columns=2000, largest_group=1000, row_bytes_out=0, row_group_rows=0)
    assert task == 2000


@given(per_row=st.integers(1, 10**6), memory=st.integers(1, 64 * GIB), threads=st.integers(1, 64))
def test_a_batch_is_a_power_of_two_and_a_modest_part_of_memory(per_row, memory, threads):
    rows = starting_batch_rows(row_memory=per_row, memory=memory, threads=threads)
    assert MIN_BATCH_ROWS <= rows <= CEILING_ROWS
    assert rows & (rows - 1) == 0
    room = BATCH_SHARE * memory / threads
    assert rows == MIN_BATCH_ROWS or rows * per_row <= room
    assert rows == CEILING_ROWS or 2 * rows * per_row > room


def test_wide_tables_get_smaller_batches():
    narrow = row_memory(row_bytes_in=112, row_bytes_out=116, features=28)
    wide = row_memory(row_bytes_in=16_000, row_bytes_out=16_004, features=2000)
    assert starting_batch_rows(row_memory=narrow, memory=2 * GIB, threads=1) == CEILING_ROWS
    assert starting_batch_rows(row_memory=wide, memory=4 * GIB, threads=1) == MIN_BATCH_ROWS
    assert starting_batch_rows(row_memory=wide, memory=16 * GIB, threads=1) == 4 * MIN_BATCH_ROWS


@given(
    row_in=st.integers(0, 10**6),
    row_out=st.integers(0, 10**6),
    memory=st.integers(1, 64 * GIB),
    threads=st.integers(1, 64),
)
def test_bytes_of_a_batch_are_a_modest_part_of_memory_or_those_planned(row_in, row_out, memory, threads):
    per_row = row_memory(row_bytes_in=row_in, row_bytes_out=row_out, features=1)
    rows = starting_batch_rows(row_memory=per_row, memory=memory, threads=threads)
    most = batch_bytes(batch_rows=rows, row_bytes_in=row_in, row_memory=per_row, memory=memory, threads=threads)
    planned = rows * row_in
    assert most >= planned
    assert most <= max(1, 1.25 * planned) or most / row_in * per_row <= BATCH_SHARE * memory / threads
    assert most <= max(MOST_BATCH_BYTES, 1.25 * planned)


def test_without_a_limit_there_is_a_default():
    assert batch_bytes(batch_rows=10, row_bytes_in=1, row_memory=3, memory=0, threads=1) == MOST_BATCH_BYTES
    assert starting_batch_rows(row_memory=10**9, memory=0, threads=1) == 65_536
    assert starting_batch_rows(row_memory=1, memory=0, threads=1, ceiling=8192) == 8192


def test_a_written_row_group_is_a_batch_at_least_and_a_million_rows_at_most():
    assert written_group_rows(row_bytes_out=1, batch_rows=4096, group_bytes=32 << 20) == 1 << 20
    assert written_group_rows(row_bytes_out=10**6, batch_rows=4096, group_bytes=32 << 20) == 4096
    assert written_group_rows(row_bytes_out=1000, batch_rows=4096, group_bytes=32 << 20) == (32 << 20) // 1000


def test_a_written_row_group_is_larger_for_many_columns_and_smaller_for_little_memory():
    def most(columns: int, *, memory: int = 0, threads: int = 1) -> int:
        return written_group_bytes(columns=columns, memory=memory, threads=threads)

    assert [most(columns) for columns in (1, 28, 768, 5000)] == [16 << 20, 16 << 20, 48 << 20, 64 << 20]
    assert most(28, memory=64 * GIB) == 16 << 20
    assert most(28, memory=GIB // 8) == GIB // 80
    assert most(5000, memory=GIB, threads=2) == GIB // 20


def test_the_next_batch_is_half_after_running_out_of_memory():
    limits = {"floor": 1000, "ceiling": 8000}
    assert next_batch_rows(8000, outcome="out_of_memory", successes=99, **limits) == 4000
    assert next_batch_rows(1500, outcome="out_of_memory", successes=0, **limits) == 1000
    assert next_batch_rows(1000, outcome="out_of_memory", successes=0, **limits) == 1000


@pytest.mark.parametrize(
    ("current", "successes", "expected"),
    [(1000, GROW_AFTER - 1, 1000), (1000, GROW_AFTER, 2000), (5000, GROW_AFTER, 8000), (8000, GROW_AFTER, 8000)],
)
def test_batch_grows_back_only_after_several_that_fitted(current, successes, expected):
    assert next_batch_rows(current, outcome="fitted", floor=1000, ceiling=8000, successes=successes) == expected
