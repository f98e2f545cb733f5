"""Python is parsed in several threads at once."""

from __future__ import annotations

import ast
import gc
import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.common.syntax import parse_expression, parse_module


@pytest.fixture
def switching_collector() -> Iterator[None]:
    """A garbage collector that runs all the time, and lets other threads run while it does."""

    def switch(*_: object) -> None:
        time.sleep(0)

    threshold = gc.get_threshold()
    gc.callbacks.append(switch)
    gc.set_threshold(10)
    yield
    gc.set_threshold(*threshold)
    gc.callbacks.remove(switch)


def test_threads_parse_while_the_collector_runs(switching_collector: None) -> None:
    source = b"x = 1 + 2 * 3\n" * 20
    errors: list[BaseException] = []

    def parse() -> None:
        try:
            for _ in range(20):
                parse_module(source)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=parse) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_an_expression() -> None:
    assert ast.unparse(parse_expression("a > 1")) == "a > 1"
    with pytest.raises(SyntaxError):
        parse_expression("a = 1")
