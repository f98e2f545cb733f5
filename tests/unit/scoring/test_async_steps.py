"""``async def`` steps: bounded calls at a time, results in the order of the rows, and errors as of any step."""

from __future__ import annotations

import asyncio
import random

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from pipeline.errors import StepFailed
from pipeline.plan.recipe import ErrorRule
from pipeline.scoring.async_steps import CONCURRENCY, ROWS_PER_CALL, AsyncFunction, is_async
from pipeline.scoring.rows import Rows
from pipeline.scoring.step_frames import map_rows
from pipeline.scoring.steps import Step

TABLE = pa.table({"a": list(range(50))})


class Service:
    """A service that answers in any order, and knows how many calls wait at a time."""

    def __init__(self, *, fails_at: int = -1) -> None:
        self.fails_at = fails_at
        self.waiting = self.most = self.calls = 0
        self.loops: set[object] = set()

    async def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        self.loops.add(asyncio.get_running_loop())
        self.calls += 1
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        for _ in range(random.Random(self.calls).randrange(5)):
            await asyncio.sleep(0)
        self.waiting -= 1
        if (frame["a"] == self.fails_at).any():
            raise ConnectionResetError("busy")
        return frame.assign(b=frame["a"] * 2)


def run(function: AsyncFunction, *rules: ErrorRule) -> tuple[list[int], list[str]]:
    parts, failures = map_rows([Step("m:f", function, on_error=rules)], Rows.from_table(TABLE))
    return [b for part in parts for b in part.table["b"].to_pylist()], list(failures.reasons)


def test_calls_are_bounded_and_results_in_order() -> None:
    service = Service()
    assert run(AsyncFunction(service, concurrency=4, rows_per_call=3))[0] == [2 * a for a in range(50)]
    assert (service.calls, service.most, service.waiting) == (17, 4, 0)
    assert len(service.loops) == 1


def test_all_batches_of_a_thread_have_one_loop() -> None:
    service = Service()
    function = AsyncFunction(service)
    run(function)
    run(function)
    assert len(service.loops) == 1
    assert (function.concurrency, function.rows_per_call) == (CONCURRENCY, ROWS_PER_CALL)


def test_an_error_of_a_call_is_that_of_the_step() -> None:
    function = AsyncFunction(Service(fails_at=20), rows_per_call=8)
    with pytest.raises(ConnectionResetError):
        run(function)
    found, reasons = run(function, ErrorRule("ConnectionError", "reject"))
    assert found == [2 * a for a in range(50) if a != 20]
    assert reasons == ["step:m:f:ConnectionResetError"]
    with pytest.raises(StepFailed):
        run(function, ErrorRule("ConnectionError", "fail"))


def test_no_rows_are_one_call() -> None:
    service = Service()
    assert list(AsyncFunction(service)(pd.DataFrame({"a": pd.Series([], dtype="int64")})).columns) == ["a", "b"]
    assert service.calls == 1


def test_tables_and_polars_frames() -> None:
    async def same(frame: object) -> object:
        return frame

    function = AsyncFunction(same, rows_per_call=7)
    assert function(TABLE).equals(TABLE)
    frame = pl.from_arrow(TABLE)
    assert isinstance(frame, pl.DataFrame)
    assert function(frame).equals(frame)


def test_results_that_are_no_frames_are_refused_and_never_dropped() -> None:
    async def texts(frame: pd.DataFrame) -> str:
        return "no frame"

    with pytest.raises(StepFailed, match="must return a DataFrame"):
        run(AsyncFunction(texts, rows_per_call=9))  # type: ignore[arg-type]


def test_in_a_thread_whose_loop_runs_already() -> None:
    async def notebook() -> pd.DataFrame:
        made: pd.DataFrame = AsyncFunction(Service(), rows_per_call=9)(TABLE.to_pandas())
        return made

    assert asyncio.run(notebook())["b"].tolist() == [2 * a for a in range(50)]


def test_what_is_async() -> None:
    assert is_async(Service())
    assert is_async(Service.__call__)
    assert not is_async(len)
    assert not is_async(Service)
