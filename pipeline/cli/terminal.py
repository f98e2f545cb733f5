"""The terminal while a live display is drawn: output of other processes is printed above it, line by line.

Worker processes and the libraries in them inherit file descriptor 2. What they write there while a bar is drawn would
tear it apart. Inside `relay_if_shown` the descriptor is a pipe, and a thread prints its lines where the bar allows it.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from pipeline.cli.options import is_quiet, print_lines_with
from pipeline.common.secrets import mask_streams

LAST_SECONDS = 0.5
"""Longest time to wait at the end for lines in the pipe."""
SETTLE_SECONDS = 0.05
"""Seconds for the last line to be printed."""


class StderrRelay:
    """Prints the lines that come through a pipe, until the pipe has no writer."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._print: Callable[[str], object] = self._write
        self._thread: threading.Thread | None = None
        self._source = -1

    def print_with(self, print_line: Callable[[str], object]) -> None:
        """Print lines with ``print_line`` from now on: that of a live display."""
        self._print = print_line
        print_lines_with(print_line)

    def start(self, source: int) -> None:
        """Print the lines of a file descriptor, in a thread."""
        self._source = source
        self._thread = threading.Thread(target=self._run, args=(source,), name="stderr-relay", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Wait for the lines that are in the pipe. Processes that have not ended keep it open."""
        deadline = time.monotonic() + LAST_SECONDS
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            if not select.select([self._source], [], [], 0)[0]:
                self._thread.join(SETTLE_SECONDS)
                break
            time.sleep(SETTLE_SECONDS / 10)
        self._print = self._write
        print_lines_with(None)

    def _write(self, line: str) -> None:
        with suppress(OSError, ValueError):
            self._terminal.write(line + "\n")
            self._terminal.flush()

    def _run(self, source: int) -> None:
        with suppress(OSError), open(source, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self._print(line.rstrip("\n"))


_active: StderrRelay | None = None


@contextmanager
def relay_if_shown() -> Iterator[StderrRelay]:
    """Relay what other processes write to stderr, if that is a terminal on which progress is shown.

    ``sys.stderr`` of this process keeps to the terminal itself. A nested block has the relay of the outer one.
    """
    global _active  # noqa: PLW0603 (there is one stderr)
    if _active is not None or is_quiet() or not _is_terminal():
        try:
            yield _active or StderrRelay(sys.stderr)
        finally:
            print_lines_with(None)
        return
    stream, kept = sys.stderr, os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    # Not closed: the thread may print the last lines of workers to it.
    sys.stderr = open(kept, "w", encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115
    mask_streams()
    _active = StderrRelay(sys.stderr)
    _active.start(source)
    try:
        yield _active
    finally:
        os.dup2(kept, 2)
        _active.stop()
        _active = None
        sys.stderr = stream


def _is_terminal() -> bool:
    try:
        return sys.stderr.fileno() == 2 and os.isatty(2)
    except (OSError, ValueError, AttributeError):
        return False
