"""Cutting and packing: every selected row once, in source order, within bounds, evenly."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.rows import InputFile, RowGroup
from pipeline.plan.packing import OVERSIZE, PARTITIONS_PER_THREAD, SMALLEST_ROWS, TARGET_BYTES, pack


def files(*sizes: int | list[int], width: int = 10) -> tuple[InputFile, ...]:
    """Files with these row groups; an int stands for a single one."""
    groups = [[size] if isinstance(size, int) else size for size in sizes]
    return tuple(
        InputFile(
            f"/in/{number:04d}.parquet", 1, f"mtime:{number}",
            tuple(RowGroup(rows, rows * width, rows * width // 2) for rows in of_file), (("k", str(number)),),
        )
        for number, of_file in enumerate(groups)
    )  # fmt: skip


def ranges(fragments) -> list[tuple[str, int, int]]:
    return [(one.path, one.row_start, one.row_stop) for one in fragments]


lakes = st.lists(
    st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 400), st.booleans()), max_size=5), min_size=1, max_size=12
)


def lake(drawn) -> tuple[InputFile, ...]:
    return tuple(
        InputFile(f"/in/{n:03d}", 1, "v", tuple(RowGroup(r, r * w, r, selected=wanted) for r, w, wanted in groups))
        for n, groups in enumerate(drawn)
    )


@settings(max_examples=150, deadline=None)
@given(drawn=lakes, threads=st.integers(1, 32), target=st.integers(20_000, 20_000_000))
def test_every_wanted_row_is_in_exactly_one_partition_in_source_order(drawn, threads, target):
    found = lake(drawn)
    packed = pack(found, threads=threads, target_bytes=target)
    covered = [row for partition in packed for row in ranges(partition)]
    wanted = []
    for file in found:
        start = 0
        for group in file.row_groups:
            if group.selected and group.rows:
                wanted.append((file.path, start, start + group.rows))
            start += group.rows
    assert merged(covered) == merged(wanted)
    assert all(partition for partition in packed)
    assert sum(one.bytes for partition in packed for one in partition) == sum(
        group.bytes for file in found for group in file.row_groups if group.selected
    )


def merged(pieces: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Neighbouring ranges joined; ranges that overlap or go backwards stay as they are, and are then not equal."""
    joined: list[tuple[str, int, int]] = []
    for path, start, stop in pieces:
        if joined and joined[-1][0] == path and joined[-1][2] == start:
            joined[-1] = (path, joined[-1][1], stop)
        else:
            joined.append((path, start, stop))
    return joined


@settings(max_examples=150, deadline=None)
@given(drawn=lakes, threads=st.integers(1, 32), target=st.integers(20_000, 20_000_000))
def test_bounds_are_respected(drawn, threads, target):
    found = lake(drawn)
    packed = pack(found, threads=threads, target_bytes=target)
    rows = [sum(one.rows for one in partition) for partition in packed]
    for partition, count in zip(packed, rows, strict=True):
        assert count == 1 or sum(one.bytes for one in partition) <= OVERSIZE * target + 1
        for one in partition:
            starts = [0]
            for group in next(file for file in found if file.path == one.path).row_groups:
                starts.append(starts[-1] + group.rows)
            assert starts[one.group_start] <= one.row_start < starts[one.group_start + 1]
            assert starts[one.group_stop - 1] < one.row_stop <= starts[one.group_stop]
    total_bytes = sum(one.bytes for partition in packed for one in partition)
    if total_bytes <= target and rows:
        assert len(packed) <= max(1, min(PARTITIONS_PER_THREAD * threads, sum(rows) // SMALLEST_ROWS))


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 200_000), min_size=1, max_size=6), min_size=1, max_size=12),
    threads=st.integers(1, 2),
)
def test_partitions_are_balanced_however_skewed_the_files_are(sizes, threads):
    """With at most eight partitions no limit on pieces holds back cutting."""
    packed = pack(files(*sizes), threads=threads, target_bytes=1 << 40)
    rows = [sum(one.rows for one in partition) for partition in packed]
    assert max(rows) * len(rows) / sum(rows) <= 1 + OVERSIZE


def test_file_with_half_the_rows_is_split_and_even_files_are_not():
    skewed = pack(files(500_000, *[50_000] * 10), threads=2)
    rows = [sum(one.rows for one in partition) for partition in skewed]
    assert (len(rows), max(rows) / (sum(rows) / len(rows))) == (8, pytest.approx(1.0, abs=0.25))
    even = pack(files(*[125_000] * 8), threads=2)
    assert [ranges(partition) for partition in even] == [[(f"/in/{n:04d}.parquet", 0, 125_000)] for n in range(8)]


def test_many_small_files_are_packed_together():
    packed = pack(files(*[500] * 2000), threads=2)
    assert [len(partition) for partition in packed] == [250] * 8


def test_whole_row_groups_are_preferred():
    packed = pack(files([60_000] * 20), threads=2)
    assert all(one.row_start % 60_000 == 0 and one.row_stop % 60_000 == 0 for part in packed for one in part)
    assert sum(len(part) for part in packed) == len(packed) == 7


def test_a_huge_row_group_is_cut_for_bytes_but_not_into_confetti_for_balance():
    assert len(pack(files(1_000_000, width=1), threads=4)) == 8
    assert len(pack(files(1_000_000, width=1), threads=16)) == 16
    assert len(pack(files(20_000_000, width=1000), threads=1)) == math.ceil(20_000_000_000 / TARGET_BYTES)


def test_few_rows_are_one_partition_and_none_is_none():
    assert len(pack(files(4000, 4000), threads=64)) == 1
    assert pack(files(0, []), threads=4) == ()


def test_gaps_of_unwanted_row_groups_divide_fragments():
    groups = tuple(RowGroup(10, 10, 1, selected=wanted) for wanted in (False, True, True, False, True))
    ((first, second),) = pack((InputFile("/a", 1, "v", groups),), threads=1)
    assert (first.row_start, first.row_stop, first.group_start, first.group_stop) == (10, 30, 1, 3)
    assert (second.row_start, second.row_stop, second.group_start, second.group_stop) == (40, 50, 4, 5)
