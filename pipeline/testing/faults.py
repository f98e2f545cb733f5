"""A map step that fails on purpose, as a table of faults per row and attempt says.

A test makes a module for the workers with a table in it, and names the table as a step::

    # my_faults.py
    from pipeline.testing.faults import Fault, FaultTable

    step = FaultTable("/tmp/attempts", (
        Fault("segfault", ids=range(5000, 5001)),
        Fault("raise", ids=range(7000, 7100), times=2),
    ))

    # job.yaml
    steps:
      - map: my_faults:step

Rows are identified by a column of integers, by default ``id``. A plan runs the steps on the first thousand
rows of the first file, in the driver: exclude these rows from faults.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from pipeline.scoring.isolation import resident_bytes

Action = Literal["ok", "sleep", "nap", "loop", "freeze", "raise", "memory", "leak", "exit", "segfault"]
"""Effect of a fault:

- ``ok``: none, but the attempt is counted
- ``sleep``: sleep for ``seconds``; ``nap``: in short pieces, so that a stopped process is late
- ``loop``: never end
- ``freeze``: hold the interpreter lock for ``seconds``
- ``memory``: allocate ``bytes`` and free them; ``leak``: allocate until the process has ``bytes``, and keep them
- ``raise``: raise `FaultError`
- ``exit``: end the process with status 3; ``segfault``: with SIGSEGV
"""

_CHUNK = 16 << 20
_NAP = 0.005
_leaked: list[bytearray] = []


class FaultError(Exception):
    """The error that the action ``raise`` raises."""


@dataclass(frozen=True)
class Fault:
    """A fault of each batch that contains one of these rows."""

    action: Action
    ids: range
    """Values of the column that identifies rows; an empty range means every row."""
    times: int | None = None
    """Number of times the fault happens, over all processes; None: each time."""
    seconds: float = 0.0
    """Duration of ``sleep``, ``nap`` and ``freeze``."""
    bytes: int = 0
    """Size for ``memory`` and ``leak``."""
    above_rows: int = 0
    """Rows that a batch must exceed for the fault to happen."""


class FaultTable:
    """A map step that carries out the faults of the table, then returns the frame unchanged."""

    def __init__(self, folder: str | os.PathLike[str], faults: Sequence[Fault], *, column: str = "id") -> None:
        self.folder = Path(folder)
        """Folder in which attempts are counted: one empty file each."""
        self.faults = tuple(faults)
        self.column = column
        """Column of integers that identify rows."""

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Carry out the faults that concern rows of ``frame``."""
        for number, fault in enumerate(self.faults):
            if self._concerns(fault, frame) and self._count(number, fault):
                act(fault)
        return frame

    def counted(self, number: int) -> int:
        """Return how many times the fault with this number has happened so far."""
        return len(list(self.folder.glob(f"{number}-*")))

    def _concerns(self, fault: Fault, frame: pd.DataFrame) -> bool:
        if len(frame) <= fault.above_rows:
            return False
        ids = frame[self.column]
        return not len(fault.ids) or bool(((ids >= fault.ids.start) & (ids < fault.ids.stop)).any())

    def _count(self, number: int, fault: Fault) -> bool:
        """Create the file of the fault's next attempt, exclusively; return False if no attempt is left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        attempt = 0
        while fault.times is None or attempt < fault.times:
            try:
                (self.folder / f"{number}-{attempt}").touch(exist_ok=False)
                return True
            except FileExistsError:
                attempt += 1
        return False


def act(fault: Fault) -> None:
    """Carry out one fault."""
    if fault.action in _PLAIN:
        _PLAIN[fault.action]()
    elif fault.action == "sleep":
        time.sleep(fault.seconds)
    elif fault.action == "nap":
        for _ in range(max(1, round(fault.seconds / _NAP))):
            time.sleep(_NAP)
    elif fault.action == "freeze":
        ctypes.PyDLL(None).usleep(int(fault.seconds * 1e6))
    elif fault.action == "leak":
        while resident_bytes(os.getpid()) < fault.bytes:
            _leaked.append(_chunk())
    elif fault.action == "memory":
        held: list[bytearray] = []
        for _ in range(0, fault.bytes, _CHUNK):
            held.append(_chunk())
            # So that an observer of the memory has time to see the growth.
            time.sleep(0.01)


def _chunk() -> bytearray:
    return bytearray(b"x") * _CHUNK


def _loop() -> None:
    while True:
        time.sleep(0)


def _raise() -> None:
    raise FaultError("on purpose")


_PLAIN: dict[Action, Callable[[], object]] = {
    "loop": _loop,
    "raise": _raise,
    "exit": lambda: os._exit(3),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
}
