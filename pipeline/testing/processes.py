"""A scheduler, workers and drivers as processes of their own, to which a test can send signals.

    with ProcessCluster(folder, workers=2) as cluster:
        driver = start_command(folder, "run", "job.yaml", "--cluster", cluster.address)
        os.kill(cluster.worker_pids()[0], signal.SIGKILL)

Nothing is left behind: every process dies with the one that started it.
"""

from __future__ import annotations

import json
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

from pipeline.execution.clusters import DASK_CONFIG
from pipeline.scoring.isolated_process import die_with_parent

ROOT = Path(__file__).parents[2]
"""From where the package is imported."""


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


def python_path(folders: Sequence[str | os.PathLike[str]] = ()) -> str:
    """``PYTHONPATH`` of a child: this package, ``folders``, and what there is already."""
    paths = [str(ROOT), *(os.fspath(folder) for folder in folders), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)


def start_command(
    folder: Path,
    *arguments: str,
    program: Sequence[str] = ("-m", "pipeline"),
    environment: Mapping[str, str] | None = None,
    import_paths: Sequence[str] = (),
    umask: int = -1,
) -> subprocess.Popen[str]:
    """``python -m pipeline ARGUMENTS`` in ``folder``, in a process group of its own as under a terminal.

    :param program: what Python runs in place of ``-m pipeline``.
    :param environment: variables beside those of this process.
    """
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": python_path(import_paths), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        umask=umask,
        start_new_session=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509
    )


def send(number: signal.Signals, *pids: int | None) -> None:
    """Send a signal to processes; one that has ended meanwhile is passed over."""
    for pid in pids:
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


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
        import_paths: Sequence[str] = (),
        umask: int = -1,
    ) -> None:
        """Start it.

        :param folder: for logs and local files; it is made.
        :param memory: bytes per worker.
        :param config: keys of Dask's configuration beside those that a cluster of this package has.
        :param options: of ``dask worker``.
        :param import_paths: folders in which workers find modules.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._memory = memory
        self._options = tuple(options)
        self._umask = umask
        settings = {**DASK_CONFIG, **(config or {})}
        names = {_variable(key): str(value) for key, value in settings.items()}
        path = python_path(import_paths)
        self._environment = {**os.environ, **names, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self._file = folder / "scheduler.json"
        self.scheduler = self._spawn("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        self.nannies = [self.add_worker() for _ in range(workers)]
        self._wanted = workers

    @property
    def address(self) -> str:
        """Of the scheduler."""
        address: str = json.loads(self._file.read_text())["address"]
        return address

    def __enter__(self) -> ProcessCluster:
        self.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait(self) -> None:
        """Until the scheduler and all workers are there.

        :raises TimeoutError: when they are not.
        """
        try:
            wait_until(lambda: self._file.exists() or self.scheduler.poll() is not None, what="no scheduler")
            wait_until(lambda: self._registered() >= self._wanted, seconds=120, what="no workers")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process of it, also those that are stopped."""
        processes = [*self.nannies, self.scheduler]
        pids = [*self.worker_pids(), *(one.pid for one in processes if one.poll() is None)]
        for number in (signal.SIGKILL, signal.SIGCONT):
            send(number, *pids)
        for process in processes:
            process.wait(20)

    def add_worker(self) -> subprocess.Popen[bytes]:
        """One more worker with its nanny."""
        fixed = ("--nworkers", "1", "--nthreads", "1", "--memory-limit", self._memory, "--no-dashboard")
        preload = ("--preload", "pipeline.execution.clusters.worker_setup", "--local-directory", str(self.folder))
        return self._spawn("worker", *fixed, *preload, *self._options)

    def mend(self) -> None:
        """Start a worker in the place of every nanny that is gone, as a batch system does."""
        self.nannies = [nanny if nanny.poll() is None else self.add_worker() for nanny in self.nannies]

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
                umask=self._umask,
                start_new_session=True,
                # So that nothing is left when the tests themselves are killed.
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )


def _variable(key: str) -> str:
    """The environment variable that sets ``key`` of Dask's configuration."""
    return "DASK_" + key.upper().replace(".", "__").replace("-", "_")
