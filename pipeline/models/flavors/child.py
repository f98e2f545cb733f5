"""Run a question about a model file in a new process with limits, and read its answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.devices.inventory import VISIBLE
from pipeline.models.flavors.limits import Limits


def ask_child(code: str, question: bytes, *, limits: Limits) -> dict[str, Any] | str:
    """Return the answer of a new process; if the process fails, return the exit status or signal as text.

    :param code: Python that sets ``sys.path`` to the JSON list in ``sys.argv[1]``, reads the question from standard
        input, applies its limits, and writes the answer as the last line of standard output, in JSON.
    :raises TimeoutError: when the process takes longer than the limit.
    """
    # Replace the child's sys.path: the folder of this package, then the parent's path, without the current directory.
    paths = [str(Path(__file__).resolve().parents[3]), *(path for path in sys.path if path)]
    command = [sys.executable, "-c", code, json.dumps(paths)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", VISIBLE: ""}
    try:
        child = subprocess.run(
            command, input=question, capture_output=True, timeout=limits.seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error
    if child.returncode != 0:
        return how_it_ended(child.returncode, child.stderr)
    answer: dict[str, Any] = json.loads(child.stdout.decode().splitlines()[-1])
    return answer


def how_it_ended(code: int, stderr: bytes) -> str:
    """Return the signal or the exit status of a process, with the last line that it printed."""
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    lines = stderr.decode(errors="replace").strip().splitlines()
    return f"exit status {code}: {lines[-1] if lines else ''}"
