"""Files whose bytes go to the disk while more are written, so that fsync at their end has little left to wait for."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable
from functools import cache

STRIDE = 8 << 20
"""Bytes after which the kernel is told to begin with them."""
_WRITE = 2
"""SYNC_FILE_RANGE_WRITE of sync_file_range(2): begin to write out dirty pages, and do not wait."""


@cache
def starter() -> Callable[[int, int, int], int] | None:
    """Begins to write out a range (offset, bytes) of an open file; None where the system has no call for that."""
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def start(descriptor: int, offset: int, count: int) -> int:
        # A hint: what it cannot do here, fsync does.
        found: int = call(descriptor, offset, count, _WRITE)
        return found

    return start


class EarlyFile(io.FileIO):
    """A file that is written from its start to its end, without seeking."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w")
        self._end = self._started = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        """Write, and have the kernel begin with what has come together."""
        count = super().write(data)
        self._end += count
        start = starter()
        if start is not None and self._end - self._started >= STRIDE:
            start(self.fileno(), self._started, self._end - self._started)
            self._started = self._end
        return count
