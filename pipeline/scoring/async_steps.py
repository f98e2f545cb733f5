"""Call ``async def`` steps: a batch is cut into groups of rows, and a limited number of calls waits at a time."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

CONCURRENCY = 16
"""Calls that wait at a time, if the spec does not say."""
ROWS_PER_CALL = 100
"""Rows of a call, if the spec does not say."""
_of_thread = threading.local()


def is_async(function: Callable[..., Any]) -> bool:
    """Return True for an ``async def`` function, or an object whose ``__call__`` is one."""
    if inspect.isclass(function):
        return False
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class AsyncFunction:
    """An ``async def`` step as a plain function. Results are in the order of the rows, whichever call ends first."""

    def __init__(
        self, function: Callable[[Any], Awaitable[Any]], *, concurrency: int = 0, rows_per_call: int = 0
    ) -> None:
        """:param concurrency: most calls that wait at a time; 0: `CONCURRENCY`.

        :param rows_per_call: most rows of a call; 0: `ROWS_PER_CALL`.
        """
        self.function = function
        self.concurrency = concurrency or CONCURRENCY
        self.rows_per_call = rows_per_call or ROWS_PER_CALL

    def __call__(self, frame: Any) -> Any:
        """Return the joined results for ``frame``: a DataFrame of pandas or Polars, or an Arrow table.

        The first error of a call ends the others.
        """
        groups = [_slice(frame, start, self.rows_per_call) for start in range(0, len(frame), self.rows_per_call)]
        results = run(self._call_all(groups or [frame]))
        return results[0] if len(results) == 1 else _joined(results)

    async def _call_all(self, groups: list[Any]) -> list[Any]:
        limit, results = asyncio.Semaphore(self.concurrency), [None] * len(groups)

        async def call(number: int) -> None:
            async with limit:
                results[number] = await self.function(groups[number])

        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(len(groups)):
                    tasks.create_task(call(number))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        return results


def run(coroutine: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """Run a coroutine in the event loop of this thread, which clients of services may keep for all batches.

    In a thread whose loop runs already, as in a notebook, it runs in a loop of its own.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, coroutine).result()
    if not hasattr(_of_thread, "runner"):
        _of_thread.runner = asyncio.Runner()
    results: list[Any] = _of_thread.runner.run(coroutine)
    return results


def _slice(frame: Any, start: int, rows: int) -> Any:
    return frame.iloc[start : start + rows] if hasattr(frame, "iloc") else frame.slice(start, rows)


def _joined(results: list[Any]) -> Any:
    """Return the results as one; as they are, for the check that follows, if they are no frames of one kind."""
    first = type(results[0])
    if any(type(result) is not first for result in results):
        return next(result for result in results if type(result) is not first)
    package = first.__module__.partition(".")[0]
    if package == "pandas":
        import pandas as pd

        return pd.concat(results)
    if package == "polars":
        import polars as pl

        return pl.concat(results)
    return pa.concat_tables(results) if first is pa.Table else results
