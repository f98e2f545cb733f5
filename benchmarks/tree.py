"""Sample CPU time and peak memory of a process and its descendants from ``/proc``."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class ProcessTree:
    """Samples of a process (default: this process) and its descendants, taken until closed.

    The usage of a process still counts after its end. ``peak`` is the largest sum of memory seen at one time: anonymous
    and shared memory, without mapped files. Memory that several processes share counts once.
    """

    root: int = field(default_factory=os.getpid)
    interval: float = 0.1
    memory_interval: float = 0.4
    """Seconds between two readings of memory, which take longer."""
    peak: int = 0
    _cpu: dict[int, float] = field(default_factory=dict)
    _peak: dict[int, int] = field(default_factory=dict)
    _looked: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sample(self) -> float:
        """Return the CPU seconds of the tree so far."""
        parents: dict[int, list[int]] = {}
        seconds: dict[int, float] = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            stat = _read(f"/proc/{name}/stat")
            if stat:
                # The command, in parentheses, may contain any character: parse the text after the last parenthesis.
                fields = stat.rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(name))
                seconds[int(name)] = (int(fields[11]) + int(fields[12])) / TICKS
        looks = time.monotonic() - self._looked >= self.memory_interval
        memory = 0
        for pid in _family(self.root, parents):
            if pid in seconds:
                self._cpu[pid] = max(seconds[pid], self._cpu.get(pid, 0.0))
                self._peak[pid] = max(peak_bytes(pid), self._peak.get(pid, 0))
                memory += _share_bytes(pid) if looks else 0
        self.peak = max(self.peak, memory)
        self._looked = time.monotonic() if looks else self._looked
        return sum(self._cpu.values())

    def peaks(self) -> dict[int, int]:
        """Return the peak resident bytes per process id."""
        return dict(self._peak)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self.sample()


def _family(root: int, parents: dict[int, list[int]]) -> list[int]:
    found = [root]
    for pid in found:
        found += parents.get(pid, [])
    return found


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def peak_bytes(pid: int) -> int:
    """Return the peak resident bytes of a process; 0 if it has ended."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _share_bytes(pid: int) -> int:
    """Return the resident bytes without mapped files, each divided by the number of processes that share it."""
    parts = [line.split() for line in _read(f"/proc/{pid}/smaps_rollup").splitlines()]
    return sum(int(part[1]) * 1024 for part in parts if part[0] in ("Pss_Anon:", "Pss_Shmem:"))
