"""Run the command line in a process that kills itself at the moment of a fan-out named by the variable STOP_AT."""

from __future__ import annotations

import os
import signal
from typing import Any

from pipeline.cli import main as command_line
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status


def main() -> None:
    """Run the command line until that moment."""
    moment, set_status = os.environ["STOP_AT"], JobDirectory.set_status

    def noted(self: JobDirectory, after: Status, **options: Any) -> Any:
        if moment == "all are scored" and self.record.children and after is Status.PUBLISHING:
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "all are published" and self.record.children and after.is_success:
            os.kill(os.getpid(), signal.SIGKILL)
        event = set_status(self, after, **options)
        is_of_child = self.record.parent
        if is_of_child and moment == "a child is scored" and after is Status.SCORED:
            os.kill(os.getpid(), signal.SIGKILL)
        if is_of_child and moment == "a child is published" and after.is_success:
            os.kill(os.getpid(), signal.SIGKILL)
        return event

    JobDirectory.set_status = noted  # type: ignore[method-assign]
    command_line()
