"""Facts about this process that a worker knows and models need: threads, memory, and a folder of its machine."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessFacts:
    """Facts about a worker process."""

    threads: int = 1
    """Threads that score at the same time."""
    folder: str = ""
    """Folder of this machine for model files that all its workers share; empty: none."""
    memory: int = 0
    """Memory limit of the process in bytes; 0: none is known."""


_known = {"facts": ProcessFacts()}


def process_facts() -> ProcessFacts:
    """Return the facts about this process; outside of a worker the defaults."""
    return _known["facts"]


def set_process_facts(facts: ProcessFacts) -> None:
    """Set the facts about this process."""
    _known["facts"] = facts


def threads_wanted() -> int:
    """Return the threads of one predict call: ``OMP_NUM_THREADS`` if set, else 1, because tasks run in parallel."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return max(1, int(text)) if text.isdigit() else 1
