"""Choose how long Arrow keeps freed memory in a worker."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import pyarrow as pa

WIDE_COLUMNS = 1024
"""Columns from which a batch is made of thousands of buffers, which are freed and allocated anew with each batch."""
_DECAY_MS = 10_000
"""A second, Arrow's own value, is over before the next batch of a wide table: its pages were given back and faulted in
again (a sixth more page faults, a tenth more CPU)."""


def keep_freed_pages(columns: int) -> None:
    """Let jemalloc keep freed pages for ten seconds in this process, if batches have `WIDE_COLUMNS` or more.

    :param columns: number of columns that are read.
    """
    if columns >= WIDE_COLUMNS:
        _keep()


@cache
def _keep() -> None:
    if pa.default_memory_pool().backend_name == "jemalloc":
        with suppress(NotImplementedError):
            pa.jemalloc_set_decay_ms(_DECAY_MS)
