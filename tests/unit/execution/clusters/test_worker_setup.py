"""The set-up of worker processes, in a process of its own: it changes standard output, logs and signals."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import logging
logging.basicConfig()
import pipeline.execution.clusters.worker_setup
logger = logging.getLogger("distributed.worker")
logger.error("Compute Failed: a task")
logger.error("Failed to communicate with scheduler during heartbeat.")
logger.error("an error that nobody else reports")
print("a step prints")
"""


def test_records_of_what_the_driver_reports_are_hidden() -> None:
    """Failed tasks and lost heartbeats are demoted; other errors and the output of steps go to standard error."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line for line in lines if "heartbeat" in line or "Compute" in line] == []
    assert any("an error that nobody else reports" in line for line in lines)
    assert "a step prints" in lines
