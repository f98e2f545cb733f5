"""Before the first partition: every worker imports what it will need, and says which versions it runs.

One running cluster for several jobs at a time.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from distributed import Client

from pipeline.common.secrets import mask_logs
from pipeline.errors import EnvMismatch
from pipeline.execution.worker_events import SharedClusterState
from pipeline.models.flavors import find_flavor
from pipeline.storage.urls import unique_name

logger = logging.getLogger(__name__)
PACKAGES = ("dask-batch-pipeline", "dask", "distributed", "pyarrow", "pandas", "numpy", "xgboost", "xgboost-cpu")
"""Distributions whose versions must be the same on driver and workers: this one, and those that rows pass through."""


def warm_up(flavor: str) -> dict[str, str]:
    """Import what a task with a model of that flavor imports; then `versions`. From here on its logs are masked."""
    mask_logs()
    for library in find_flavor(flavor).libraries:
        with suppress(ImportError):
            # What is missing is told, with what to install, by the load of the model.
            import_module(library)
    return versions()


def versions() -> dict[str, str]:
    """Versions of this process by package, those that are not installed left out."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def shake_hands(client: Any, *, flavor: str, timeout: float) -> int:
    """Let every worker that is there now import and tell its versions. Returns how many answered.

    :param timeout: seconds after which a worker that has not answered is left to do its imports with its first task.
    :raises EnvMismatch: when a worker runs other versions than this process.
    """
    mine = versions()
    addresses = list(client.scheduler_info(n_workers=-1)["workers"])
    futures = {
        address: client.submit(
            warm_up, flavor, workers=[address], allow_other_workers=False, key=f"handshake-{unique_name()}"
        )
        for address in addresses
    }
    answers = _gather(futures, deadline=time.monotonic() + timeout)
    for address, theirs in answers.items():
        _compare(mine, theirs, address)
    return len(answers)


def _gather(futures: Mapping[str, Any], *, deadline: float) -> dict[str, dict[str, str]]:
    answers: dict[str, dict[str, str]] = {}
    for address, future in futures.items():
        try:
            answers[address] = future.result(timeout=max(0.01, deadline - time.monotonic()))
        except (ImportError, RuntimeError) as error:
            # The scheduler, which takes a task in first, says so in other words than a worker.
            if isinstance(error, RuntimeError) and "deserialization" not in str(error):
                raise
            cause = error.__cause__ or error
            raise EnvMismatch(
                "scheduler or workers cannot import what this job needs",
                where=f"worker {address}",
                found=f"{type(cause).__name__}: {cause}",
                expected="this package and all that it imports, as the driver has them",
                next_step="install the same packages for all of them, then resume",
            ) from error
        except TimeoutError:
            logger.warning("worker %s has not answered in time; it imports with its first task", address)
    return answers


def _compare(mine: Mapping[str, str], theirs: Mapping[str, str], address: str) -> None:
    differing = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    if differing:
        raise EnvMismatch(
            "driver and workers run different versions",
            where=f"worker {address}",
            found=", ".join(f"{name} {theirs.get(name, 'missing')}" for name in differing),
            expected=", ".join(f"{name} {mine.get(name, 'missing')}" for name in differing),
            next_step="install the same versions for both, then resume",
        )


class SharedCluster:
    """Lends each of the jobs on it a client of its own, because a client hears the cluster's events for one of them."""

    def __init__(self, client: Any, *, timeout: float) -> None:
        self.shared_state = SharedClusterState()
        self._client = client
        self._timeout = timeout
        self._greeted: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def client(self, flavor: str) -> Iterator[Any]:
        """A client of the cluster, closed on leaving.

        :param flavor: what its workers must be able to import.
        :raises EnvMismatch: when they run other versions than this process.
        """
        with self._lock:
            if flavor not in self._greeted:
                shake_hands(self._client, flavor=flavor, timeout=self._timeout)
                self._greeted.add(flavor)
        address, security = self._client.scheduler.address, self._client.security
        with Client(address, security=security, set_as_default=False, timeout=self._timeout) as client:
            yield client
