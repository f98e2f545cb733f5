"""A live display on a terminal: lines of other processes and of logs come above it, whole."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

CODE = """
import logging, subprocess, sys
from pipeline.cli import options
from pipeline.cli.terminal import relay_if_shown
import click
with click.Context(click.Command("run")):
    options._set_up_logging(0)
    with relay_if_shown() as relay:
        relay.print_with(lambda line: print(f"<{line}>", file=sys.stderr))
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'from a worker')"], check=True)
        logging.getLogger("pipeline.x").warning("from the driver")
    print("afterwards", file=sys.stderr)
"""


def test_lines_of_workers_and_logs_are_printed_by_the_display() -> None:
    leader, follower = pty.openpty()
    done = subprocess.run([sys.executable, "-c", CODE], stderr=follower, check=False, timeout=60)
    os.close(follower)
    shown = b""
    while chunk := _read(leader):
        shown += chunk
    os.close(leader)
    lines = re.split(r"\r?\n", shown.decode())
    assert done.returncode == 0, lines
    assert sorted(lines[:2]) == ["<WARNING pipeline.x: from the driver>", "<from a worker>"]
    assert lines[2:] == ["afterwards", ""]


def _read(file: int) -> bytes:
    try:
        return os.read(file, 65536)
    except OSError:
        return b""
