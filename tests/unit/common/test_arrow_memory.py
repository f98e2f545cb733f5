from __future__ import annotations

import subprocess
import sys

import pyarrow as pa
import pytest

from pipeline.common import arrow_memory
from pipeline.common.arrow_memory import WIDE_COLUMNS, keep_freed_pages


@pytest.mark.parametrize(
    ("backend", "columns", "calls"),
    [("jemalloc", WIDE_COLUMNS, 1), ("jemalloc", WIDE_COLUMNS - 1, 0), ("mimalloc", WIDE_COLUMNS, 0)],
)
def test_pages_are_kept_for_wide_tables_and_set_once(monkeypatch, backend, columns, calls):
    class Pool:
        backend_name = backend

    seen = []
    monkeypatch.setattr(pa, "default_memory_pool", Pool)
    monkeypatch.setattr(pa, "jemalloc_set_decay_ms", seen.append)
    arrow_memory._keep.cache_clear()
    try:
        keep_freed_pages(columns)
        keep_freed_pages(columns)
    finally:
        arrow_memory._keep.cache_clear()
    assert seen == [10_000] * calls


@pytest.mark.skipif("jemalloc" not in pa.supported_memory_backends(), reason="this Arrow has no jemalloc")
def test_arrow_accepts_it():
    code = f"from pipeline.common.arrow_memory import *; keep_freed_pages({WIDE_COLUMNS})"
    subprocess.run([sys.executable, "-c", code], env={"ARROW_DEFAULT_MEMORY_POOL": "jemalloc"}, check=True)
