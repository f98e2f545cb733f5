"""`PartitionLog`: what the code of the user printed while it scored a partition, as ``logs/partitions/…jsonl``.

No decision depends on it: a failed write ends the log, not the attempt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import IO

from pipeline.common.step_output import OutputLine
from pipeline.storage.local import LocalStore
from pipeline.storage.store import Store

REMOTE_SECONDS = 5.0
"""Shortest time between two writes to an object store, where each write is a new version of the object."""


class PartitionLog:
    """The lines of one attempt. The file is made with the first of them: most partitions have none."""

    def __init__(
        self, open_job: Callable[[], Store], name: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """:param open_job: returns the store of the job directory.

        :param name: path of the log in it.
        """
        self._open_job = open_job
        self._name = name
        self._clock = clock
        self._store: Store | None = None
        self._file: IO[str] | None = None
        self._lines: list[str] = []
        self._written = 0
        """Lines that the object has."""
        self._time = clock()
        self._is_broken = False

    def write(self, line: OutputLine) -> None:
        """Add a line. On a file system it is there at once, also if the worker is killed next."""
        self._add({name: value for name, value in asdict(line).items() if value})

    def flush(self) -> None:
        """Write lines that an object store does not have yet, if some time has passed."""
        if self._clock() - self._time >= REMOTE_SECONDS:
            self._upload()

    def close(self, *, left_out: int = 0) -> None:
        """Write the remaining lines.

        :param left_out: lines beyond the size of a log.
        """
        if left_out:
            self._add({"text": f"{left_out:,} further lines were left out"})
        self._upload()
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                self._is_broken = True

    def _add(self, record: dict[str, str]) -> None:
        if self._is_broken:
            return
        line = json.dumps(record)
        try:
            if self._store is None:
                self._store = self._open_job()
                self._open(self._store)
            if self._file is None:
                self._lines.append(line)
            else:
                self._file.write(line + "\n")
        except Exception:  # a full disk, or a store that is gone: whoever writes results tells
            self._is_broken = True

    def _open(self, store: Store) -> None:
        if isinstance(store, LocalStore):
            # The store makes the file, so that folder and file get its modes.
            store.replace(self._name, b"")
            self._file = open(store.path(self._name), "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def _upload(self) -> None:
        self._time = self._clock()
        if self._store is None or self._file is not None or self._is_broken or self._written == len(self._lines):
            return
        try:
            self._store.replace(self._name, "".join(f"{line}\n" for line in self._lines).encode())
            self._written = len(self._lines)
        except Exception:
            self._is_broken = True
