"""Every transactional sink keeps its promises: crashes, two drivers, repairs, a lost lease.

A sample of the operations is tried, another for each mode; all of them in the long profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.testing.examples import IS_LONG, choose
from pipeline.testing.sink_contract import (
    SinkWorld,
    check_fenced,
    check_lost_rows,
    sweep_crashes,
    sweep_two_drivers,
    worlds,
)
from tests.contracts.sink_cases import DUCKDB, SQLITE

CASES = (SQLITE, DUCKDB)
# DuckDB takes long to open a file.
STEPS = {"sqlite": 4, "duckdb": 9}


def _sample(all_worlds: Sequence[SinkWorld], *, modes: Sequence[str]) -> Any:
    """Mark a test for worlds with rows in the target, or for all in the long profile; with a first operation each."""
    chosen = [world for world in all_worlds if IS_LONG or (world.mode in modes and world.exists)]
    pairs = [(world, choose(1 + number % STEPS[world.case.name], of=1)) for number, world in enumerate(chosen)]
    return pytest.mark.parametrize(("world", "first"), pairs, ids=[str(world) for world in chosen])


def _step(world: SinkWorld) -> int:
    return choose(STEPS[world.case.name], of=1)


@_sample(worlds(*CASES), modes=("append", "overwrite", "replace", "merge"))
def test_a_crash_at_each_operation(world: SinkWorld, first: int, tmp_path: Path) -> None:
    assert sweep_crashes(world, tmp_path, first=first, step=_step(world)) >= 8


@_sample(worlds(*(CASES if IS_LONG else [SQLITE]), repairs=True), modes=("append", "merge"))
def test_a_crash_at_each_operation_of_a_repair(world: SinkWorld, first: int, tmp_path: Path) -> None:
    assert sweep_crashes(world, tmp_path, first=first, step=_step(world)) >= 8


@_sample(worlds(*CASES), modes=("overwrite",))
def test_a_second_driver_at_each_operation(world: SinkWorld, first: int, tmp_path: Path) -> None:
    assert sweep_two_drivers(world, tmp_path, first=first, step=_step(world)) >= 8


@pytest.mark.parametrize("world", worlds(SQLITE)[:1], ids=str)
def test_a_lost_lease(world: SinkWorld, tmp_path: Path) -> None:
    check_fenced(world, tmp_path)


@pytest.mark.parametrize("world", worlds(SQLITE)[1:2], ids=str)
def test_rows_that_are_gone(world: SinkWorld, tmp_path: Path) -> None:
    check_lost_rows(world, tmp_path)
