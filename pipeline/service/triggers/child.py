"""Run a function in a process of its own, for work that may end its process: planning, and reading unknown files.

A library may abort the process over a damaged file, a step may call ``os._exit``, and a module that was imported once
stays as it was. None of that may happen to a server.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.common.secrets import mask_logs, mask_streams
from pipeline.errors import InfrastructureError, PipelineError
from pipeline.sources import find_source

CHILD_SECONDS = 3600.0
"""Seconds after which a child process is killed: planning of a very large input takes minutes."""
_PACKAGE = str(Path(__file__).parents[3])


class ChildDied(PipelineError):
    """A child process ended without a result."""


def run_in_child(target: str, *arguments: Any, seconds: float = CHILD_SECONDS) -> Any:
    """Return the result of a function that runs in a process of its own.

    :param target: ``module:function`` of this package; arguments and result are pickled.
    :raises ChildDied: when the process ended without a result, by a signal or an exit.
    :raises InfrastructureError: when no process can be started, or it did not end in time.
    :raises PipelineError: as the function raised it; any other exception is wrapped.
    """
    receive, send = os.pipe()
    command = [sys.executable, "-m", "pipeline.service.triggers.child", str(send)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([_PACKAGE, os.environ.get("PYTHONPATH", "")])}
    with os.fdopen(receive, "rb") as results:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, pass_fds=[send]
            )
        except OSError as error:
            raise InfrastructureError(
                "a child process cannot be started",
                where=target,
                found=str(error),
                next_step="free processes or memory",
            ) from error
        finally:
            os.close(send)
        return _result_of(process, pickle.dumps((target, arguments)), results, target=target, seconds=seconds)


def _result_of(process: subprocess.Popen[bytes], given: bytes, results: Any, *, target: str, seconds: float) -> Any:
    timer_fired = False

    def kill() -> None:
        nonlocal timer_fired
        timer_fired = True
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as stream:
            stream.write(given)
        data = results.read()
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
    if timer_fired:
        raise InfrastructureError("a child process did not end in time", where=target, found=f"{seconds:.0f} s")
    if code != 0 or not data:
        raise ChildDied("a child process ended without a result", where=target, found=_ending(code))
    is_error, result = pickle.loads(data)
    if is_error:
        raise result
    return result


def _ending(code: int) -> str:
    with suppress(ValueError):
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return f"exit status {code}"


def count_rows_in_child(paths: Iterable[str]) -> Mapping[str, int | PipelineError]:
    """Return the number of rows of each Parquet file by its footer, or the reason why a footer cannot be read.

    A file that ends the process that reads it is such a reason; the other files are read by another process.
    """
    waiting, counts = list(paths), dict[str, int | PipelineError]()
    while waiting:
        try:
            counts |= run_in_child(f"{__name__}:count_rows", waiting)
            break
        except ChildDied as error:
            # Halves find the file in few processes.
            if len(waiting) == 1:
                counts[waiting[0]] = error
                break
            middle = len(waiting) // 2
            counts |= count_rows_in_child(waiting[:middle])
            waiting = waiting[middle:]
    return counts


def count_rows(paths: Iterable[str]) -> dict[str, int | PipelineError]:
    """Return the number of rows of each Parquet file, or the error of its footer."""
    counts: dict[str, int | PipelineError] = {}
    for path in paths:
        try:
            counts[path] = find_source("parquet").count_rows(path)
        except Exception as error:
            counts[path] = PipelineError.of(error)
    return counts


def main(descriptor: int) -> int:
    """Run the function that is named on stdin, and write its result to ``descriptor``."""
    mask_streams()
    mask_logs()
    target, arguments = pickle.loads(sys.stdin.buffer.read())
    module, _, name = target.partition(":")
    try:
        answer: tuple[bool, Any] = False, getattr(importlib.import_module(module), name)(*arguments)
    except Exception as error:
        answer = True, PipelineError.of(error)
    with os.fdopen(descriptor, "wb") as results:
        pickle.dump(answer, results)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
