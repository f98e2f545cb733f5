"""Produce the next items of an iterable on a thread, while earlier items are processed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable
from typing import Generic, TypeVar

from pipeline.storage.urls import with_storage_options

T = TypeVar("T")


def read_ahead(iterable: Iterable[T], *, depth: int = 1) -> Generator[T, None, None]:
    """Yield the items of ``iterable``, produced on a separate thread, at most ``depth`` ahead of the consumer.

    An item is started only when there is room for it, so that at most ``depth`` + 1 items exist at a time. An error of
    ``iterable`` is raised here, after the items before it. Closing this generator, also by garbage collection, ends
    the thread after the current item. If ``iterable`` is a generator, it is closed too.
    """
    if depth < 1:
        raise ValueError("depth must be at least 1")
    channel: _Channel[T] = _Channel(depth)
    thread = threading.Thread(
        target=with_storage_options(_produce), args=(iterable, channel), name="read-ahead", daemon=True
    )
    thread.start()
    try:
        yield from channel
    finally:
        channel.stop()
        thread.join()


class _Channel(Generic[T]):
    """A bounded queue of items that ends when it is finished, failed or stopped."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_stopped = False
        self._is_finished = False
        self._error: BaseException | None = None

    def wait_for_room(self) -> bool:
        """Block until one more item may be produced. Return False if the consumer has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or len(self._items) < self._depth)
            return not self._is_stopped

    def put(self, item: T) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    def finish(self, error: BaseException | None) -> None:
        with self._changed:
            self._error = error
            self._is_finished = True
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Generator[T, None, None]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._items) or self._is_finished)
                if not self._items:
                    break
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
            # Release the item, which may be large, while the next one is produced.
            del item
        if self._error is not None:
            try:
                raise self._error
            finally:
                # The error's traceback refers to this frame: break the cycle, which would keep batches in memory.
                self._error = None


def _produce(iterable: Iterable[T], channel: _Channel[T]) -> None:
    error: BaseException | None = None
    iterator = iter(iterable)
    try:
        while channel.wait_for_room():
            try:
                item = next(iterator)
            except StopIteration:
                break
            channel.put(item)
            del item
    except BaseException as raised:
        error = raised
    finally:
        try:
            if isinstance(iterator, Generator):
                iterator.close()
        except BaseException as raised:
            error = error or raised
        channel.finish(error)
