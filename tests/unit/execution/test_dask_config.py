"""Overrides of ``dask.config`` by blocks that overlap in any order."""

from __future__ import annotations

import itertools
import random
import threading
from contextlib import AbstractContextManager

import dask.config
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.execution.dask_config import override_config

KEY, OTHER, NEW = "pipeline-test.key", "pipeline-test.other", "pipeline-test.new"


@pytest.fixture(autouse=True)
def original() -> object:
    with dask.config.set({KEY: "original", OTHER: "original"}):
        yield


def now() -> tuple[object, object, object]:
    return dask.config.get(KEY), dask.config.get(OTHER), dask.config.get(NEW, "missing")


class TestOverrideConfig:
    @pytest.mark.fault(117)
    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
    def test_blocks_may_leave_in_any_order(self, order: tuple[int, ...]) -> None:
        """Two jobs side by side in a notebook: the first to start is the first to end."""
        values = [{KEY: "one"}, {KEY: "two", NEW: 2}, {OTHER: "three", NEW: 3}]
        blocks: list[AbstractContextManager[None]] = [override_config(value) for value in values]
        for block in blocks:
            block.__enter__()
        assert now() == ("two", "three", 3)
        entered = set(range(3))
        for number in order:
            blocks[number].__exit__(None, None, None)
            entered.discard(number)
            left = {"key": "original", "other": "original", "new": "missing"}
            for remaining in sorted(entered):
                left |= {key.rpartition(".")[2]: value for key, value in values[remaining].items()}
            assert now() == tuple(left.values())

    def test_equal_blocks_are_told_apart(self) -> None:
        first, second = override_config({KEY: "same"}), override_config({KEY: "same"})
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert now()[0] == "same"
        second.__exit__(None, None, None)
        assert now()[0] == "original"

    def test_value_that_somebody_else_sets_is_left_alone(self) -> None:
        with override_config({KEY: "ours", OTHER: "ours"}):
            dask.config.set({KEY: "theirs"})
        assert now() == ("theirs", "original", "missing")

    def test_an_error_restores_too(self) -> None:
        with pytest.raises(ValueError, match="x"), override_config({KEY: "ours"}):
            raise ValueError("x")
        assert now()[0] == "original"

    @pytest.mark.fault(117)
    @given(st.integers(0, 2**32))
    def test_threads_leave_the_original(self, seed: int) -> None:
        chance = random.Random(seed)
        orders = [[chance.choice([KEY, OTHER, NEW]) for _ in range(5)] for _ in range(3)]

        def run(keys: list[str]) -> None:
            for key in keys:
                with override_config({key: threading.get_ident()}):
                    assert dask.config.get(key) != "original"

        threads = [threading.Thread(target=run, args=(keys,)) for keys in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert now() == ("original", "original", "missing")
