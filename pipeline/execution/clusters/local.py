"""Dask worker processes on this machine, with one nanny each, forked from one process if possible.

Dask is imported when workers are started: a plan needs only their number and memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.common import forkserver as forks
from pipeline.common.cores import core_count
from pipeline.common.forkserver import chosen_shape, thread_environment
from pipeline.common.units import format_seconds, parse_bytes
from pipeline.errors import NoWorkers, SpecError
from pipeline.execution.clusters import DASK_CONFIG, workers_text
from pipeline.execution.clusters.devices import check_this_machine
from pipeline.execution.clusters.security import LOOPBACK, Certificates, certificates_in, check_dashboard, is_loopback
from pipeline.execution.dask_config import override_config
from pipeline.jobs.cancellation import wait_in_slices
from pipeline.plan.plan import Limits
from pipeline.settings import Settings

if TYPE_CHECKING:
    from distributed import Client

NEVER = "1000 hours"
WORKER_SETUP = "pipeline.execution.clusters.worker_setup"
"""Module that every worker imports before its first task."""
ALL_WORKERS_SECONDS = 60.0
"""Seconds to wait for the last worker when other workers have started."""


@dataclass(frozen=True)
class LocalProcesses:
    """``type: local``."""

    owns_workers: ClassVar[bool] = True
    device_blocker: ClassVar[str] = "workers of the cluster type local use GPUs only with device: cuda"
    settings: Settings
    workers: int | str = "auto"
    threads: int | str = "auto"
    memory_limit: int | str = "auto"
    """Bytes per worker, such as ``4 GiB``."""
    host: str = LOOPBACK
    """Address to listen on. An address other than loopback lets workers of other machines join, with TLS."""

    def limits(self) -> Limits:
        """Return workers, threads and memory from the settings, the file, else the machine."""
        workers, threads = self._shape()
        limit = self.settings.memory_limit or self.memory_limit
        return Limits(workers=workers, threads=threads, memory=memory_of(limit, share=1 / workers))

    def describe_start(self) -> str:
        """Return the number of workers, and the longest wait for one."""
        return f"{workers_text(self.limits())}, at most {format_seconds(self.settings.no_workers_timeout)}"

    def check_device(self) -> None:
        """Check that this machine has a GPU; the workers share the first one that they see.

        :raises NoDevice: when there is none.
        """
        check_this_machine()

    def preload(self, *, has_steps: bool) -> None:
        """Start the process from which workers are forked, so that its imports run while the job is planned."""
        forks.start(self._environment(), has_steps=has_steps)

    def _environment(self) -> dict[str, str]:
        """Return the variables that a worker needs before its start."""
        limits = self.limits()
        return thread_environment(core_count(), limits.workers * limits.threads)

    def _shape(self) -> tuple[int, int]:
        workers, threads = (None if value == "auto" else int(value) for value in (self.workers, self.threads))
        return chosen_shape(
            core_count(),
            memory_limit(),
            workers=self.settings.workers or workers,
            threads=self.settings.threads or threads,
        )

    @contextmanager
    def open(self, *, directory: str = "") -> Iterator[Client]:
        """Start the workers and yield a client; stop all workers on leaving.

        :param directory: the job directory; certificates are stored there.
        :raises RefusedForSafety: when the dashboard would listen on an address other than loopback; or when scheduler
            and workers would, and TLS is impossible.
        """
        check_dashboard(self.settings.dashboard)
        certificates = certificates_for(self.host, self.settings, directory=directory)
        with certificates as given, self._start(given) as client:
            yield client

    @contextmanager
    def _start(self, certificates: Certificates | None) -> Iterator[Client]:
        import distributed.utils

        environment = self._environment()
        with forks.restored(environment), forks.in_use(environment) as is_forked:
            method = "forkserver" if is_forked else "spawn"
            if is_forked:
                # Else Dask gives the server a list of imports of its own, and imports all of them here, pandas too.
                distributed.utils._forkserver_preload_set = True
            with self._workers(certificates, environment, method=method) as client:
                yield client

    @contextmanager
    def _workers(
        self, certificates: Certificates | None, environment: Mapping[str, str], *, method: str
    ) -> Iterator[Client]:
        from distributed import LocalCluster

        limits = self.limits()
        with override_config(process_config(self.settings, environment, method=method)):
            cluster = LocalCluster(
                n_workers=limits.workers,
                threads_per_worker=limits.threads,
                memory_limit=limits.memory,
                processes=True,
                env=forks.handed_over(environment),
                **server_options(self.host, self.settings, certificates),
            )
            with connected(cluster, workers=limits.workers, timeout=self.settings.no_workers_timeout) as client:
                yield client


@cache
def memory_limit() -> int:
    """Return the memory of this machine in bytes as Dask counts it: what the control groups and limits leave of it."""
    dask = find_spec("distributed")
    # The module alone: with its package it takes half a second.
    spec = dask and dask.origin and spec_from_file_location("_", Path(dask.origin).with_name("system.py"))
    if not spec or not spec.loader:
        from distributed.system import MEMORY_LIMIT

        return int(MEMORY_LIMIT)
    system: Any = module_from_spec(spec)
    spec.loader.exec_module(system)
    return int(system.MEMORY_LIMIT)


def memory_of(limit: int | str, *, share: float) -> int:
    """Return the bytes of a worker's memory limit.

    :param limit: a size, or ``auto``: ``share`` of nine tenths of the memory of this machine.
    :raises SpecError: when it is neither.
    """
    try:
        return int(memory_limit() * 0.9 * share) if limit == "auto" else parse_bytes(limit)
    except SpecError as error:
        raise SpecError(
            "invalid memory limit",
            where="memory_limit",
            found=error.found,
            expected="a size such as 4 GiB, or auto",
        ) from error


def certificates_for(host: str, settings: Settings, *, directory: str) -> AbstractContextManager[Certificates | None]:
    """Return the certificates of a cluster that listens on ``host``; None where TLS is not needed.

    :param directory: the job directory; certificates are stored there.
    """
    if settings.tls or not (is_loopback(host) or settings.insecure_network):
        return certificates_in(directory)
    return nullcontext()


def process_config(settings: Settings, environment: Mapping[str, str], *, method: str) -> dict[str, Any]:
    """Return Dask's configuration for worker processes of this machine.

    :param environment: variables that a worker needs before its start.
    :param method: ``forkserver`` or ``spawn``.
    """
    return {
        **DASK_CONFIG,
        "distributed.nanny.pre-spawn-environ": dict(environment),
        "distributed.worker.multiprocessing-method": method,
        "distributed.scheduler.no-workers-timeout": settings.no_workers_timeout,
        "distributed.worker.preload": [WORKER_SETUP],
        # After this timeout Dask closes a nanny whose worker is not back, and the worker is not restarted.
        "distributed.deploy.lost-worker-timeout": NEVER,
    }


def server_options(host: str, settings: Settings, certificates: Certificates | None) -> dict[str, Any]:
    """Return the arguments of a `LocalCluster` that say where its servers listen."""
    return {
        "host": host,
        "dashboard_address": settings.dashboard,
        "scheduler_kwargs": {"dashboard": False},
        # By default the worker dashboard listens on the host; it has no TLS.
        "worker_dashboard_address": None if is_loopback(host) else f"{LOOPBACK}:0",
        "security": certificates.security() if certificates else None,
        "silence_logs": logging.ERROR,
    }


@contextmanager
def connected(cluster: Any, *, workers: int, timeout: float) -> Iterator[Client]:
    """Yield a client of ``cluster`` once its workers have started; close the cluster on leaving."""
    from distributed import Client

    from pipeline.execution.clusters.lazy_dashboard import add_dashboard

    try:
        add_dashboard(cluster.scheduler)
        with Client(cluster, set_as_default=False) as client:
            _await_workers(client, workers, timeout)
            yield client
    finally:
        cluster.close(timeout=20)


def _await_workers(client: Any, workers: int, timeout: float) -> None:
    """Wait for all workers; continue with at least one after the timeout."""

    def wait(count: int, seconds: float) -> None:
        wait_in_slices(lambda piece: client.wait_for_workers(count, timeout=piece), timeout=seconds)

    with suppress(TimeoutError):
        wait(workers, min(timeout, ALL_WORKERS_SECONDS))
    try:
        wait(1, timeout)
    except TimeoutError as error:
        raise NoWorkers(
            "no worker started",
            found=f"0 of {workers} after {timeout:.0f} s",
            next_step="check the worker logs, then resume",
        ) from error
