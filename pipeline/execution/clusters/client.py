"""Check the versions of all workers before the first partition, and share one cluster among several jobs."""

from __future__ import annotations

import logging
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distributed import Client

from pipeline.common.imports import import_library
from pipeline.common.secrets import mask_logs
from pipeline.devices.report import DeviceReport
from pipeline.errors import EnvMismatch
from pipeline.events import ClusterReady
from pipeline.execution import step_messages
from pipeline.execution.placement import workers_asked
from pipeline.execution.worker_events import SharedClusterState, WorkerSupply
from pipeline.models.flavors import find_flavor
from pipeline.spec.model_ref import Device
from pipeline.storage.urls import unique_name

logger = logging.getLogger(__name__)
PACKAGES = ("dask-batch-pipeline", "dask", "distributed", "pyarrow", "pandas", "numpy")
"""Distributions whose versions must match on driver and workers: this package, and packages that process rows."""
LIBRARIES = ("xgboost",)
"""Modules whose versions must match. Several distributions hold one module: xgboost is in xgboost-cpu, too."""


@dataclass(frozen=True)
class Answer:
    """Answer of a worker to the handshake."""

    versions: dict[str, str]
    """Versions of packages and modules that process rows, by name."""
    device: DeviceReport | None = None
    """Its GPU; None if no GPU was asked for."""


def warm_up(flavor: str, device: Device = "cpu", *, has_steps: bool = True) -> Answer:
    """Import the modules of a task with a model of ``flavor``, mask secrets in logs from now on; return the answer.

    :param flavor: "" for a job without a model.
    :param device: ``cpu``: the GPU of this process is not looked at, and no package for GPUs is imported.
    :param has_steps: False: the task runs no map step, so the flavor's libraries are imported as far as it needs them.
    """
    mask_logs()
    step_messages.install()
    if not flavor:
        return Answer(versions())
    found = find_flavor(flavor)
    for library in found.libraries:
        with suppress(ImportError):
            # Ignore the error: loading the model reports a missing package and how to install the package.
            import_library(library, without=() if has_steps else found.unneeded)
    is_asked = device != "cpu" and found.device_report is not None
    return Answer(versions(flavor), found.device_report() if is_asked and found.device_report else None)


def versions(flavor: str = "") -> dict[str, str]:
    """Return the versions of installed packages in this process, by package.

    :param flavor: flavor whose distributions count, too.
    """
    installed = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in (*PACKAGES, *(find_flavor(flavor).distributions if flavor else ())):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed | {name: found for name in LIBRARIES if (found := module_version(name))}


def module_version(name: str) -> str:
    """Return ``__version__`` of a module; read from its file VERSION, where it is not imported. Empty if not found."""
    if name in sys.modules:
        return str(getattr(sys.modules[name], "__version__", ""))
    spec = find_spec(name)
    try:
        return Path(str(spec and spec.origin)).with_name("VERSION").read_text("utf-8").strip()
    except OSError:
        return ""


def cluster_ready(client: Any, *, job: str, page: str) -> ClusterReady:
    """Return the event about the workers that are connected now.

    :param page: URL of the page of jobs on the dashboard; empty without it.
    """
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    threads = sum(int(worker["nthreads"]) for worker in workers)
    return ClusterReady(job, len(workers), threads, page or dashboard_url(client))


def dashboard_url(client: Any) -> str:
    """Return the URL of the scheduler's dashboard; empty without one."""
    # The link is made from a template of the site, with any variables.
    with suppress(Exception):
        return str(client.dashboard_link or "")
    return ""


def shake_hands(
    client: Any, *, flavor: str, timeout: float, device: Device = "cpu", has_steps: bool = True
) -> dict[str, DeviceReport | None]:
    """Let all current workers import and compare their versions. Return the GPU of each worker that answered.

    :param timeout: seconds to wait for an answer; a slower worker imports with its first task.
    :param device: device that the job requests from its workers; ``cpu``: workers do not look for GPUs.
    :param has_steps: False: the job has no map steps; see `warm_up`.
    :raises EnvMismatch: when a worker runs other versions than this process.
    """
    own, warm = versions(flavor), partial(warm_up, has_steps=has_steps)
    workers = client.scheduler_info(n_workers=-1)["workers"]
    asked = set(workers_asked(workers, device))
    futures = {
        address: client.submit(
            warm,
            flavor,
            device if address in asked else "cpu",
            workers=[address],
            allow_other_workers=False,
            key=f"handshake-{unique_name()}",
        )
        for address in workers
    }
    answers = _gather(futures, deadline=time.monotonic() + timeout)
    for address, answer in answers.items():
        _compare(own, answer.versions, address)
    return {address: answer.device for address, answer in answers.items()}


def _gather(futures: Mapping[str, Any], *, deadline: float) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
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


def supply_of(client: Any) -> WorkerSupply | None:
    """Return the source of the workers of a client's cluster; None if lost workers are not replaced."""
    return getattr(client, "supply", None)


class SharedCluster:
    """A cluster shared by several jobs. Each job has its own client: a client has only one subscriber per topic."""

    def __init__(self, client: Any, *, timeout: float, is_exclusive: bool = False) -> None:
        self.is_exclusive = is_exclusive
        """True if its jobs run one after the other: an idle worker has nothing to do for another of them."""
        self.shared_state = SharedClusterState(supply_of(client))
        self._client = client
        self._timeout = timeout
        self._reports: dict[tuple[str, Device, bool], dict[str, DeviceReport | None]] = {}
        self._lock = threading.Lock()

    def shake_hands(
        self, flavor: str, *, device: Device = "cpu", has_steps: bool = True
    ) -> dict[str, DeviceReport | None]:
        """Return the result of `shake_hands`, once for each flavor and device, and for jobs with and without steps.

        :param flavor: model flavor that workers must be able to import.
        :raises EnvMismatch: when workers run other versions than this process.
        """
        with self._lock:
            key = flavor, device, has_steps
            if key not in self._reports:
                self._reports[key] = shake_hands(
                    self._client, flavor=flavor, timeout=self._timeout, device=device, has_steps=has_steps
                )
            return self._reports[key]

    @contextmanager
    def client(self) -> Iterator[Any]:
        """Yield a client of the cluster, and close it on leaving."""
        address, security = self._client.scheduler.address, self._client.security
        with Client(address, security=security, set_as_default=False, timeout=self._timeout) as client:
            yield client
