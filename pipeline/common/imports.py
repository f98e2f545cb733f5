"""Exclude imports in our own processes from garbage collection: they live as long as the process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_imports() -> Iterator[None]:
    """Disable garbage collection inside the block, and exclude all objects that exist at its end from later runs.

    Imports make hundreds of thousands of objects and hardly any garbage. The collector would visit all of them during
    the imports, later, and in each forked process, where a visit writes to their memory.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
