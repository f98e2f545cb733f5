"""Imports in a process of our own, kept away from the garbage collector: they stay as long as it does."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_imports() -> Iterator[None]:
    """Nothing is collected inside, and nothing that is there at the end is ever looked at again.

    Imports make hundreds of thousands of objects and hardly any garbage. Collecting goes through all of them now and
    then: while they are made, later on, and in each process that is forked from this one, which writes to their memory.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
