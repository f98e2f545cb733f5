"""Check the versions of all workers before the first partition, and share one cluster among several jobs."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from distributed import Client

from pipeline.common.imports import import_library
from pipeline.common.secrets import mask_logs
from pipeline.errors import EnvMismatch
from pipeline.execution.worker_events import SharedClusterState
from pipeline.models.flavors import find_flavor
from pipeline.storage.urls import unique_name

logger = logging.getLogger(__name__)
PACKAGES = ("dask-batch-pipeline", "dask", "distributed", "pyarrow", "pandas", "numpy", "xgboost", "xgboost-cpu")
"""Distributions whose versions must match on driver and workers: this package, and packages that process rows."""


def warm_up(flavor: str) -> dict[str, str]:
    """Import the modules of a task with a model of ``flavor``, mask secrets in logs from now on; return `versions`."""
    mask_logs()
    found = find_flavor(flavor)
    for library in found.libraries:
        with suppress(ImportError):
            # Ignore the error: loading the model reports a missing package and how to install the package.
            import_library(library, without=found.unneeded)
    return versions()


def versions() -> dict[str, str]:
    """Return the versions of installed packages in this process, by package."""
    installed = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def shake_hands(client: Any, *, flavor: str, timeout: float) -> int:
    """Let all current workers import and compare their versions. Return the number of workers that answered.

    :param timeout: seconds to wait for an answer; a slower worker imports with its first task.
    :raises EnvMismatch: when a worker runs other versions than this process.
    """
    own = versions()
    addresses = list(client.scheduler_info(n_workers=-1)["workers"])
    futures = {
        address: client.submit(
            warm_up, flavor, workers=[address], allow_other_workers=False, key=f"handshake-{unique_name()}"
        )
        for address in addresses
    }
    answers = _gather(futures, deadline=time.monotonic() + timeout)
    for address, workers in answers.items():
        _compare(own, workers, address)
    return len(answers)


def _gather(futures: Mapping[str, Any], *, deadline: float) -> dict[str, dict[str, str]]:
    answers: dict[str, dict[str, str]] = {}
    for address, future in futures.items():
        try:
            answers[address] = future.result(timeout=max(0.01, deadline - time.monotonic()))
        except (ImportError, RuntimeError) as error:
            # The scheduler unpickles a task first, and its import error has another text than a worker's.
            if isinstance(error, RuntimeError) and "deserialization" not in str(error):
                raise
            cause = error.__cause__ or error
            raise EnvMismatch(
                "scheduler or workers cannot import what this job needs",
                where=f"worker {address}",
                found=f"{type(cause).__name__}: {cause}",
                expected="this package and all that it imports, in the versions of the driver",
                next_step="install the same packages for all of them, then resume",
            ) from error
        except TimeoutError:
            logger.warning("worker %s did not answer in time; it imports with its first task", address)
    return answers


def _compare(own: Mapping[str, str], workers: Mapping[str, str], address: str) -> None:
    differing = [name for name in sorted({*own, *workers}) if own.get(name) != workers.get(name)]
    if differing:
        raise EnvMismatch(
            "driver and workers run different versions",
            where=f"worker {address}",
            found=", ".join(f"{name} {workers.get(name, 'missing')}" for name in differing),
            expected=", ".join(f"{name} {own.get(name, 'missing')}" for name in differing),
            next_step="install the same versions for both, then resume",
        )


class SharedCluster:
    """A cluster shared by several jobs. Each job has its own client: a client has only one subscriber per topic."""

    def __init__(self, client: Any, *, timeout: float) -> None:
        self.shared_state = SharedClusterState()
        self._client = client
        self._timeout = timeout
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def client(self, flavor: str) -> Iterator[Any]:
        """Yield a client of the cluster, and close it on leaving.

        :param flavor: model flavor that workers must be able to import.
        :raises EnvMismatch: when workers run other versions than this process.
        """
        with self._lock:
            if flavor not in self._checked:
                shake_hands(self._client, flavor=flavor, timeout=self._timeout)
                self._checked.add(flavor)
        address, security = self._client.scheduler.address, self._client.security
        with Client(address, security=security, set_as_default=False, timeout=self._timeout) as client:
            yield client
