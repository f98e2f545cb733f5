"""A map step that fails on purpose: what happens is written in a table, by row and by attempt.

A test makes a module for the workers with a table in it, and names that as a step::

    # my_faults.py
    from pipeline.testing.faults import Fault, FaultTable

    step = FaultTable("/tmp/attempts", (
        Fault("segfault", ids=range(5000, 5001)),
        Fault("raise", ids=range(7000, 7100), times=2),
    ))

    # job.yaml
    steps:
      - map: my_faults:step

Rows are told by a column of integers, ``id`` unless another one is named. A plan runs the steps on the first thousand
rows of the first file, in the driver: keep faults away from these.
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
"""``ok`` does nothing, but is counted; ``nap`` sleeps in short pieces, so that a process that is stopped is late;
``loop`` never ends; ``freeze`` holds
the interpreter lock for ``seconds``; ``memory`` takes ``bytes`` and gives them back, ``leak`` takes more until
the process has ``bytes``, and keeps it; ``exit`` ends the process with status 3."""

_CHUNK = 16 << 20
_NAP = 0.005
_leaked: list[bytearray] = []


class FaultError(Exception):
    """What the action ``raise`` raises."""


@dataclass(frozen=True)
class Fault:
    """What happens to a batch that has one of these rows."""

    action: Action
    ids: range
    """Values of the column that tells rows; an empty range means every row."""
    times: int | None = None
    """How many times it happens, over all processes; None: each time."""
    seconds: float = 0.0
    """For ``sleep``, ``nap`` and ``freeze``."""
    bytes: int = 0
    """For ``memory`` and ``leak``."""
    above_rows: int = 0
    """It happens only to batches with more rows than that."""


class FaultTable:
    """A map step that does what the table says, then returns the frame as it came."""

    def __init__(self, folder: str | os.PathLike[str], faults: Sequence[Fault], *, column: str = "id") -> None:
        self.folder = Path(folder)
        """Where attempts are counted: one empty file each."""
        self.faults = tuple(faults)
        self.column = column
        """Integers that tell rows."""

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Carry the faults out that ``frame`` has rows of."""
        for number, fault in enumerate(self.faults):
            if self._concerns(fault, frame) and self._count(number, fault):
                act(fault)
        return frame

    def counted(self, number: int) -> int:
        """How many times the fault with that number has happened so far."""
        return len(list(self.folder.glob(f"{number}-*")))

    def _concerns(self, fault: Fault, frame: pd.DataFrame) -> bool:
        if len(frame) <= fault.above_rows:
            return False
        ids = frame[self.column]
        return not len(fault.ids) or bool(((ids >= fault.ids.start) & (ids < fault.ids.stop)).any())

    def _count(self, number: int, fault: Fault) -> bool:
        """Take the next number of the fault's, exclusively; False when there is none left."""
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
    """Carry one fault out."""
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
            # So that whoever watches the memory has a chance to.
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
