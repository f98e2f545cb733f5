"""Stalls, measured in a real process that is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from pipeline.testing.processes import wait_until

PROGRAM = """
import sys
from pipeline.scoring.progress import progress_of, track_attempt
with track_attempt("score-00000-1", rows=10):
    print("started", flush=True)
    for line in sys.stdin:
        snapshot = progress_of("score-00000-1")
        print(snapshot.seconds, snapshot.stalled_seconds, flush=True)
"""


def test_stopped_process_reports_its_stall() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask() -> tuple[float, float]:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        seconds, stalled = process.stdout.readline().split()  # type: ignore[union-attr]
        return float(seconds), float(stalled)

    try:
        assert process.stdout.readline() == "started\n"
        _, before = ask()
        os.kill(process.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        wait_until(lambda: time.monotonic() - stopped > 1.0)
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: ask()[1] - before > 0.8)
        seconds, stalled = ask()
        assert stalled <= seconds
    finally:
        process.kill()
        process.communicate()
