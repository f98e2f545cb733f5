"""Run a scheduler, workers and drivers as separate processes to which a test can send signals.

    with ProcessCluster(folder, workers=2) as cluster:
        driver = start_command(folder, "run", "job.yaml", "--cluster", cluster.address)
        os.kill(cluster.worker_pids()[0], signal.SIGKILL)

No process remains: each dies with its parent.
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
"""Folder from which the package is imported."""


def wait_until(condition: Callable[[], Any], *, seconds: float = 60.0, what: str = "") -> Any:
    """Wait until ``condition`` returns a true value, and return the value.

    :raises TimeoutError: if ``condition`` is not true in time.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(what or "it did not come true")
        time.sleep(0.01)
    return found


def python_path(folders: Sequence[str | os.PathLike[str]] = ()) -> str:
    """Return ``PYTHONPATH`` for a child: this package, ``folders``, and the current value."""
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
    """Start ``python -m pipeline ARGUMENTS`` in ``folder``, in its own process group as under a terminal.

    :param program: arguments of Python in place of ``-m pipeline``.
    :param environment: variables added to those of this process.
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
    """Send a signal to processes; skip those that have exited."""
    for pid in pids:
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


class ProcessCluster:
    """``dask scheduler`` and ``dask worker``, with a nanny each, on the loopback; all are killed on exit."""

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
        is_shared: bool = False,
    ) -> None:
        """Start the scheduler and the workers.

        :param folder: folder for logs and local files; created.
        :param memory: memory per worker, with its unit.
        :param config: keys of Dask's configuration, added to those of this package's clusters.
        :param options: options of ``dask worker``.
        :param import_paths: folders in which workers find modules.
        :param is_shared: True: one process has the nannies of all workers, which takes two seconds less of a core for
            each worker but the first.
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
        self._each = workers if is_shared else 1
        self.nannies = [self.add_worker() for _ in range(0, workers, self._each)]
        self._wanted = workers

    @property
    def address(self) -> str:
        """Address of the scheduler."""
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
        """Wait until the scheduler and all workers are ready.

        :raises TimeoutError: if they are not ready in time.
        """
        try:
            wait_until(lambda: self._file.exists() or self.scheduler.poll() is not None, what="no scheduler")
            wait_until(lambda: self._registered() >= self._wanted, seconds=120, what="no workers")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill every process of the cluster, including stopped ones."""
        processes = [*self.nannies, self.scheduler]
        pids = [*self.worker_pids(), *(one.pid for one in processes if one.poll() is None)]
        for number in (signal.SIGKILL, signal.SIGCONT):
            send(number, *pids)
        for process in processes:
            process.wait(20)

    def add_worker(self) -> subprocess.Popen[bytes]:
        """Start another process with a nanny and its worker, or with those of the whole cluster."""
        fixed = ("--nworkers", str(self._each), "--nthreads", "1", "--memory-limit", self._memory, "--no-dashboard")
        preload = ("--preload", "pipeline.execution.clusters.worker_setup", "--local-directory", str(self.folder))
        forks = ("--preload-nanny", "pipeline.testing.forking_nanny")
        return self._spawn("worker", *fixed, *preload, *forks, *self._options)

    def replace_workers(self) -> None:
        """Start a worker for every nanny that has exited, as a batch system does."""
        self.nannies = [nanny if nanny.poll() is None else self.add_worker() for nanny in self.nannies]

    def worker_pid(self, nanny: subprocess.Popen[bytes]) -> int | None:
        """Return the process that runs the tasks of this nanny; None if there is none."""
        return max(_workers_of(nanny), default=None)

    def worker_pids(self) -> list[int]:
        """Return the processes of all current workers."""
        return [pid for nanny in self.nannies if nanny.poll() is None for pid in _workers_of(nanny)]

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
                # So that no process remains if the tests themselves are killed.
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )


def _workers_of(nanny: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes that were forked, or started, to run tasks of the nannies in this process."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    found: list[int] = []
    with suppress(psutil.Error):
        for child in psutil.Process(nanny.pid).children():
            with suppress(psutil.Error):
                command = " ".join(child.cmdline())
                if "forkserver" in command:
                    found += [one.pid for one in child.children() if one.status() != psutil.STATUS_ZOMBIE]
                elif "spawn_main" in command:
                    found.append(child.pid)
    return found


def _variable(key: str) -> str:
    """Return the environment variable that sets ``key`` of Dask's configuration."""
    return "DASK_" + key.upper().replace(".", "__").replace("-", "_")
