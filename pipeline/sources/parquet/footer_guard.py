"""Try footers of unknown files in a child process before this process reads them.

Some calls of pyarrow end the process on a damaged footer: encrypted columns, statistics of a wrong length, more
columns than the schema has. The child receives the bytes of the footer, not the path: storage is read once.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq

from pipeline.common import forkserver
from pipeline.sources.parquet import footer_child
from pipeline.sources.parquet.opening import damaged_footer, footer_bytes, open_source, parse_footer
from pipeline.storage.urls import is_local_path

logger = logging.getLogger(__name__)

SECONDS = 60.0
"""Time limit for one footer. A footer takes about a millisecond."""


class _Child(Protocol):
    """A process with a connection to it."""

    @property
    def pid(self) -> int:
        """Id of the process."""

    def end(self) -> int:
        """End the process, and return its exit status; negative: the signal."""


class _Forked:
    """A fork of the fork server, which has pyarrow imported."""

    def __init__(self, connection: Connection) -> None:
        self._process = get_context("forkserver").Process(target=footer_child.serve, args=(connection,), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def end(self) -> int:
        self._process.join(1)
        self._process.kill()
        self._process.join()
        return self._process.exitcode or 0


class _Started:
    """A new Python process."""

    def __init__(self, connection: Connection) -> None:
        number = connection.fileno()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(footer_child.__file__)), str(number)],
            pass_fds=(number,), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> int:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(1)
        self._process.kill()
        return self._process.wait()


class _Shared:
    """The child of this process: started with the first footer, and again after each that ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._child: _Child | None = None

    def ask(self, *request: object) -> dict[str, Any]:
        """Return the answer to a request: its ``result`` or ``error``; neither if there is no child to ask.

        :param request: the name of a function of `pipeline.sources.parquet.footer_child`, and its arguments.
        """
        with self._lock:
            # Something else may have ended the process: only the second ending is the fault of the footer.
            data = pickle.dumps(request)
            answer = self._ask(data, is_last=False)
            return self._ask(data, is_last=True) or {} if answer is None else answer

    def _ask(self, request: bytes, *, is_last: bool) -> dict[str, Any] | None:
        """Return the answer; None if the child ended and another attempt is left."""
        try:
            connection = self._connection or self._start()
        except (OSError, RuntimeError):
            logger.warning("no process that tries footers could be started", exc_info=True)
            return {}
        try:
            connection.send_bytes(request)
            if not connection.poll(SECONDS):
                self._close()
                return {"error": f"reading it takes more than {SECONDS:.0f} s"}
            answer: dict[str, Any] = json.loads(connection.recv_bytes())
            return answer
        except (EOFError, OSError):
            code = self._close()
        if not is_last:
            return None
        if code >= 0:
            logger.warning("the process that tries footers ends with exit status %d", code)
            return {}
        return {"error": f"it ends the process that reads it: {_signal_name(-code)}"}

    def _start(self) -> Connection:
        ours, theirs = (Connection(end.detach()) for end in socket.socketpair())
        with theirs:
            self._child = _Forked(theirs) if forkserver.is_running() else _Started(theirs)
        self._connection = ours
        return ours

    def forget(self) -> None:
        """Forget the child without ending it: in a fork, requests of parent and child would mix."""
        self._lock, self._connection, self._child = threading.Lock(), None, None

    def close(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            self._close()

    def _close(self) -> int:
        connection, child, self._connection, self._child = self._connection, self._child, None, None
        if connection is not None:
            connection.close()
        return child.end() if child is not None else 0


_shared = _Shared()
atexit.register(_shared.close)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shared.forget)


@dataclass(frozen=True)
class FooterGuard:
    """The calls that planning will make on footers, made in the child process of this process first.

    Starting the child takes 0.4 s of a core (0.02 s with a fork server), a footer 0.2 ms (measured). A child without
    requests ends after `pipeline.sources.parquet.footer_child.IDLE_SECONDS`.
    """

    columns: tuple[str, ...] = ()
    """Arrow columns whose statistics will be read."""
    is_digested: bool = False
    """True if the metadata of all row groups will be read."""

    def check(self, path: str, footer: bytes) -> None:
        """Try a footer; see `pipeline.sources.parquet.footer_child.exercise`.

        Without a child, because none starts here, nothing is checked.

        :param path: path of the file, for errors.
        :param footer: result of `pipeline.sources.parquet.opening.footer_bytes`.
        :raises CorruptInput: if the footer cannot be read, or ends or blocks the process that reads it.
        """
        answer = _shared.ask("exercise", footer, self.columns, self.is_digested)
        if "error" in answer:
            raise damaged_footer(path, answer["error"])


def decoded_widths(path: str, group: int, columns: Sequence[str]) -> list[float]:
    """Return the mean bytes per row of each of ``columns``, decoded; see `footer_child.decoded_widths`.

    A local file is read by the child process, since damaged pages may end it.

    :returns: zeros if the rows cannot be read; the job that reads them reports the error.
    """
    if is_local_path(path):
        answer = _shared.ask("decoded_widths", path.removeprefix("file://"), group, tuple(columns))
        widths: list[float] = answer.get("result", [0.0] * len(columns))
        return widths
    try:
        with open_source(path) as source:
            return footer_child.decoded_widths(source, group, columns)
    except Exception:
        logger.debug("no sample of row group %d of %s", group, path, exc_info=True)
        return [0.0] * len(columns)


def read_unknown_footer(path: str, guard: FooterGuard) -> pq.FileMetaData:
    """Return the footer of a file, after ``guard`` has tried it.

    :raises CorruptInput: if the file is not a Parquet file, truncated, damaged or encrypted.
    :raises FileNotFoundError: if the file does not exist.
    """
    footer = footer_bytes(path)
    metadata = parse_footer(path, footer)
    guard.check(path, footer)
    return metadata


def _signal_name(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"signal {number}"
