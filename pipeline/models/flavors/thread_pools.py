"""Limit the threads of BLAS and OpenMP of this process, which several threads share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class PoolLimit:
    """A limit for all pools of this process. The first thread that enters sets it; the last that leaves lifts it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._controller: Any = None
        self._limit: Any = None

    @contextmanager
    def hold(self, threads: int) -> Iterator[None]:
        """Give each pool ``threads`` threads inside the block; if others hold the limit, it stays as they set it."""
        with self._lock:
            if not self._users:
                if self._controller is None:
                    from threadpoolctl import ThreadpoolController

                    # Finds the libraries that are loaded now: those of a model are, when it is called.
                    self._controller = ThreadpoolController()
                self._limit = self._controller.limit(limits=threads)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._limit.restore_original_limits()


POOLS = PoolLimit()
"""The limit of this process."""
