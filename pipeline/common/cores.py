"""Count the processor cores that this process may use, without importing Dask, which takes a tenth of a second."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

_QUOTAS_V1 = ("cpuacct,cpu", "cpu,cpuacct")
"""Names of the folder of cgroup v1 on different distributions."""


@cache
def core_count() -> int:
    """Return the number of cores, as `dask.system.cpu_count` counts them when this process starts.

    It is the smallest of: the cores of the machine, those that the process is bound to, and the quota of its cgroup.
    """
    is_linux = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    quota = _quota()
    return max(1, min(count, math.ceil(quota))) if quota > 0 else count


def _quota(root: Path = Path("/")) -> float:
    """Return the cores that the cgroup of this process may use at a time; 0 if unlimited or unknown.

    :param root: folder that holds ``sys`` and ``proc``.
    """
    groups = root / "sys/fs/cgroup"
    for name in _QUOTAS_V1:
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (int((groups / name / f"cpu.cfs_{part}_us").read_text()) for part in ("quota", "period"))
            return max(0.0, quota / period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        group = (root / "proc/self/cgroup").read_text().strip().rpartition(":")[2]
        quota, period = map(int, (groups / group.strip("/") / "cpu.max").read_text().split())
        return max(0.0, quota / period)
    return 0.0
