"""A scheduler and workers as processes of their own, whose ids a test can send signals to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.clusters import DASK_CONFIG
from pipeline.isolated import die_with_parent

ROOT = Path(__file__).parents[2]


def wait_until(condition: Callable[[], Any], *, seconds: float = 60.0, what: str = "") -> Any:
    """What ``condition`` gives once it is true.

    :raises TimeoutError: when it is not in time.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(what or "it did not come true")
        time.sleep(0.01)
    return found


def _variable(key: str) -> str:
    """The environment variable that sets ``key`` of Dask's configuration."""
    return "DASK_" + key.upper().replace(".", "__").replace("-", "_")


class ProcessCluster:
    """``dask scheduler`` and ``dask worker``, a nanny each, on the loopback; all are gone on leaving."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 2,
        memory: str = "1 GiB",
        config: Mapping[str, Any] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._memory = memory
        self._options = tuple(options)
        settings = {**DASK_CONFIG, **(config or {})}
        names = {_variable(key): str(value) for key, value in settings.items()}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._environment = {**os.environ, **names, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self._file = folder / "scheduler.json"
        self.scheduler = self._spawn("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        self.nannies = [self.add_worker() for _ in range(workers)]
        self._wanted = workers

    @property
    def address(self) -> str:
        """Of the scheduler."""
        import json

        address: str = json.loads(self._file.read_text())["address"]
        return address

    def __enter__(self) -> ProcessCluster:
        wait_until(lambda: self._file.exists() or self.scheduler.poll() is not None, what="no scheduler")
        wait_until(lambda: self._registered() >= self._wanted, what="no workers")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        processes = [*self.nannies, self.scheduler]
        for pid in [*self.worker_pids(), *(one.pid for one in processes)]:
            for number in (signal.SIGKILL, signal.SIGCONT):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        for process in processes:
            process.wait(20)

    def add_worker(self) -> subprocess.Popen[bytes]:
        """One more worker with its nanny."""
        fixed = ("--nworkers", "1", "--nthreads", "1", "--memory-limit", self._memory, "--no-dashboard")
        preload = ("--preload", "pipeline.clusters.worker_setup", "--local-directory", str(self.folder))
        return self._spawn("worker", *fixed, *preload, *self._options)

    def worker_pid(self, nanny: subprocess.Popen[bytes]) -> int | None:
        """The process that runs the tasks of that nanny; None while there is none."""
        import psutil  # type: ignore[import-untyped, unused-ignore]

        with suppress(psutil.Error):
            children = psutil.Process(nanny.pid).children()
            found = [one.pid for one in children if "spawn_main" in " ".join(one.cmdline())]
            return max(found) if found else None
        return None

    def worker_pids(self) -> list[int]:
        """Of all workers that are there now."""
        found = [self.worker_pid(nanny) for nanny in self.nannies if nanny.poll() is None]
        return [pid for pid in found if pid is not None]

    def _registered(self) -> int:
        return (self.folder / "log.txt").read_text(errors="replace").count("Registered to:")

    def _spawn(self, kind: str, *options: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--scheduler-file", str(self._file), *options],
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # So that nothing is left when the tests themselves are killed.
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )
