"""Whether this process gets to run: it may be stopped, swapped out, or share its cores with too many others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BEAT = 0.05
"""Seconds."""


class Pulse:
    """A thread that sleeps for a beat and looks how late it wakes: what holds it up holds up the process.

    Code that keeps the interpreter to itself for long looks the same from here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.missed = 0.0
        """Seconds by which it woke late, where that was a beat or more."""
        self._clock = clock
        self._stopped: threading.Event | None = None

    def start(self) -> None:
        """Begin, unless it beats already."""
        if self._stopped is None:
            self._stopped = threading.Event()
            threading.Thread(target=self._run, args=(self._stopped,), name="pulse", daemon=True).start()

    def stop(self) -> None:
        """End with the next beat."""
        if self._stopped is not None:
            self._stopped.set()
            self._stopped = None

    def _run(self, stopped: threading.Event) -> None:
        before = self._clock()
        while not stopped.wait(BEAT):
            now = self._clock()
            late = now - before - BEAT
            before = now
            self.missed += late if late > BEAT else 0.0
