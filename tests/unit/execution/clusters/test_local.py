"""The memory and number of local workers, which a plan needs without Dask."""

from __future__ import annotations

import subprocess
import sys

from distributed.system import MEMORY_LIMIT

from pipeline.testing.processes import ROOT

LIMITS = """
import sys
from pipeline.execution.clusters.local import LocalProcesses
from pipeline.settings import Settings
limits = LocalProcesses(Settings(workers=2, threads=1)).limits()
print(limits.memory, "distributed" in sys.modules)
"""


def test_limits_are_those_of_dask_and_known_without_it() -> None:
    """A plan is half a second earlier: no command but those that start or reach workers imports distributed."""
    done = subprocess.run([sys.executable, "-c", LIMITS], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split() == [str(int(MEMORY_LIMIT * 0.9 * (1 / 2))), "False"], done.stderr
