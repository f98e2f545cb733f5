"""CPU time and peak memory of a process and its descendants, by sampling."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import psutil


@dataclass
class ProcessTree:
    """Samples this process and its descendants until it is closed; what a process had used when it ended counts on."""

    interval: float = 0.1
    _cpu: dict[int, float] = field(default_factory=dict)
    _peak: dict[int, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._me = psutil.Process()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sample(self) -> float:
        """CPU seconds of the tree so far."""
        for process in [self._me, *self._me.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self._cpu[process.pid] = times.user + times.system
                self._peak[process.pid] = _high_water(process.pid)
            except (psutil.Error, OSError):
                continue
        return sum(self._cpu.values())

    def peaks(self) -> dict[int, int]:
        """Peak resident bytes per process id."""
        return dict(self._peak)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self.sample()


def _high_water(pid: int) -> int:
    with open(f"/proc/{pid}/status") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
