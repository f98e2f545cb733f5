"""Rows of a batch from free device memory, and what is learned when they do not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.devices.memory import (
    CONTEXT_BYTES,
    GROW_AFTER,
    MAX_BATCH_ROWS,
    MIN_BATCH_ROWS,
    DeviceBatchLimit,
    allowed_device_memory,
    device_batch_rows,
    device_model_bytes,
    device_row_bytes,
    projected_device_memory,
)
from pipeline.errors import SpecError

GIB = 1 << 30


def test_bytes_of_a_row() -> None:
    assert device_row_bytes(features=28, outputs=1) == 120
    assert device_row_bytes(features=28, outputs=10) == 192


def test_projection_counts_context_model_and_each_thread() -> None:
    model = device_model_bytes(nodes=1000, trees=10)
    assert model == 21_500
    assert projected_device_memory(batch_rows=1024, row_bytes=100, threads=4, model=model) == (
        CONTEXT_BYTES + model + 4 * 1024 * 100
    )
    assert projected_device_memory(batch_rows=1, row_bytes=1, threads=0, model=0) == CONTEXT_BYTES + 1


class TestAllowedMemory:
    @pytest.mark.parametrize(
        ("value", "allowed"),
        [(0.5, 50), ("0.5", 50), (1, 100), ("1", 100), ("80 B", 80), (80, 80), ("1 GiB", 100), (1.0, 100)],
    )
    def test_share_or_size(self, value: float | int | str, allowed: int) -> None:
        assert allowed_device_memory(value, free=100) == allowed

    @pytest.mark.parametrize("value", [0, 0.0, -1, "-0.5", 1.5, "much", "nan", float("nan")])
    def test_anything_else_is_refused(self, value: float | int | str) -> None:
        with pytest.raises(SpecError):
            allowed_device_memory(value, free=100)


class TestBatchRows:
    def test_large_card_takes_the_ceiling(self) -> None:
        assert device_batch_rows(allowed=100 * GIB, row_bytes=120, threads=16) == MAX_BATCH_ROWS

    def test_threads_share_the_memory(self) -> None:
        one, four = (device_batch_rows(allowed=GIB, row_bytes=8192, threads=threads) for threads in (1, 4))
        assert (one, four) == (131_072, 32_768)

    def test_small_card_takes_the_floor(self) -> None:
        assert device_batch_rows(allowed=0, row_bytes=120, threads=1) == MIN_BATCH_ROWS

    @given(
        allowed=st.integers(0, 1 << 40),
        row_bytes=st.integers(1, 1 << 20),
        threads=st.integers(0, 64),
    )
    def test_it_is_the_largest_power_of_two_that_fits(self, allowed: int, row_bytes: int, threads: int) -> None:
        rows = device_batch_rows(allowed=allowed, row_bytes=row_bytes, threads=threads)
        needed = max(threads, 1) * row_bytes
        assert rows & (rows - 1) == 0
        assert MIN_BATCH_ROWS <= rows <= MAX_BATCH_ROWS
        assert rows * needed <= allowed or rows == MIN_BATCH_ROWS
        assert 2 * rows * needed > allowed or rows == MAX_BATCH_ROWS


class TestLimit:
    LIMIT = DeviceBatchLimit(rows=8192, ceiling=8192)

    def test_it_halves_down_to_the_floor(self) -> None:
        limit, seen = self.LIMIT, []
        while not limit.is_smallest:
            limit = limit.after_out_of_memory(limit.rows)
            seen.append(limit.rows)
        assert seen == [4096, 2048, 1024]
        assert limit.after_out_of_memory(limit.rows).rows == 1024

    def test_two_threads_that_fail_together_halve_once(self) -> None:
        assert self.LIMIT.after_out_of_memory(8192).after_out_of_memory(8192).rows == 4096

    def test_it_doubles_after_many_full_batches(self) -> None:
        limit = self.LIMIT.after_out_of_memory(8192)
        for _ in range(GROW_AFTER - 1):
            limit = limit.after_fit(4096)
        assert limit.rows == 4096
        assert limit.after_fit(100).rows == 4096
        assert limit.after_fit(4096).rows == 8192
        assert self.LIMIT.after_fit(8192) is self.LIMIT

    def test_a_failure_starts_the_count_again(self) -> None:
        limit = self.LIMIT.after_out_of_memory(8192).after_fit(4096)
        assert limit.after_out_of_memory(4096).fitted == 0
