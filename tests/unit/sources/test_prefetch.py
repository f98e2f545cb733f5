"""Reading ahead: order, bounds, errors, and no thread left behind."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from pipeline.sources import read_ahead


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    assert threads() == []


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_items_come_in_order(depth):
    assert list(read_ahead(iter(range(100)), depth=depth)) == list(range(100))
    assert list(read_ahead([], depth=depth)) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_is_never_more_than_depth_ahead(depth):
    made, ahead, taken = [], [], 0

    def source():
        for number in range(50):
            ahead.append(number - taken)
            made.append(number)
            yield number

    for _ in read_ahead(source(), depth=depth):
        taken += 1
    assert len(made) == 50
    # `taken` counts an item only after it was handed over, so that one more may be begun in between.
    assert max(ahead) <= depth + 1


def test_the_next_item_is_made_while_one_is_used():
    second = threading.Event()

    def source():
        yield 1
        second.set()
        yield 2

    items = read_ahead(source())
    assert next(items) == 1
    assert second.wait(10)
    assert list(items) == [2]


def test_an_error_comes_after_the_items_before_it():
    def source():
        yield 1
        yield 2
        raise ValueError("broken")

    items = read_ahead(source(), depth=5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_memory_error_and_exits_are_not_swallowed():
    for error in (MemoryError, SystemExit, KeyboardInterrupt):

        def source(error=error):
            yield 1
            raise error

        with pytest.raises(error):
            list(read_ahead(source()))


def test_closing_early_ends_the_thread_and_closes_the_source():
    closed = threading.Event()

    def source():
        try:
            number = 0
            while True:
                yield (number := number + 1)
        finally:
            closed.set()

    items = read_ahead(source(), depth=2)
    assert next(items) == 1
    items.close()
    assert closed.is_set()
    assert threads() == []


def test_a_consumer_that_raises_or_forgets_it_ends_the_thread():
    def consume():
        for item in read_ahead(iter(range(1000))):
            raise RuntimeError(item)

    with pytest.raises(RuntimeError):
        consume()
    items = read_ahead(iter(range(1000)))
    next(items)
    del items
    gc.collect()
    assert threads() == []


def test_prefetch_starts_with_the_first_item():
    items = read_ahead(iter(range(3)))
    assert threads() == []
    items.close()


def test_items_are_let_go_as_soon_as_they_are_used():
    class Item:
        pass

    references = []

    def source():
        for _ in range(4):
            item = Item()
            references.append(weakref.ref(item))
            yield item
            del item

    items = read_ahead(source())
    first = next(items)
    del first
    for _ in items:
        assert references[0]() is None


def test_depth_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        next(read_ahead([], depth=0))
