"""A worker process for each GPU of this machine, through dask-cuda, and worker processes on CPUs beside them.

Each argument of dask-cuda's cluster has a reason:

- ``CUDA_VISIBLE_DEVICES``: UUIDs. NVML and CUDA may number the same cards differently.
- ``preload``: dask-cuda replaces the list of the configuration by its own.
- ``data``: a dict. Results are receipts, and dask-cuda's own store counts none of them.
- ``device_memory_limit``: off. It would spill results of tasks, which never are on a card.
- ``resources``: one ``GPU`` for each thread, so that a partition asks for one and threads overlap on a card.
- no pool of RMM: xgboost is built without RMM and would starve beside it.

Workers are spawned, not forked: a fork server that had opened the driver would hand a broken context to its children.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from distributed import Client, Nanny

from pipeline.common.cores import core_count
from pipeline.common.forkserver import restored, thread_environment
from pipeline.common.units import format_seconds, plural
from pipeline.devices.failures import first_line
from pipeline.devices.inventory import EXTRA, VISIBLE, Gpu, read_inventory, select_gpus
from pipeline.devices.memory import DEVICE_MEMORY, allowed_device_memory
from pipeline.errors import InfrastructureError, NoDevice, SpecError
from pipeline.execution.clusters import workers_text
from pipeline.execution.clusters.devices import ExpectedGpus
from pipeline.execution.clusters.local import (
    WORKER_SETUP,
    certificates_for,
    connected,
    memory_of,
    process_config,
    server_options,
)
from pipeline.execution.clusters.security import LOOPBACK, Certificates, check_dashboard
from pipeline.execution.dask_config import override_config
from pipeline.execution.placement import GPU_RESOURCE
from pipeline.plan.plan import Limits
from pipeline.settings import Settings

LEAST_THREADS, MOST_THREADS = 2, 16
"""Tasks at a time on a GPU, unless the file says: with one, the card waits while its batch is read."""
PRELOAD = [WORKER_SETUP]
"""Modules that workers import before their first task."""
_WHERE = "type: local-cuda"


@dataclass(frozen=True)
class LocalGpus:
    """``type: local-cuda``."""

    owns_workers: ClassVar[bool] = True
    settings: Settings
    devices: str | int | Sequence[int | str] = "auto"
    """Numbers or UUIDs of GPUs, such as ``[0, 2]``; ``auto``: those in ``CUDA_VISIBLE_DEVICES``, else all."""
    threads: int | str = "auto"
    """Tasks at a time for each GPU; ``auto``: the cores, shared by the GPUs, from 2 to 16."""
    memory_limit: int | str = "auto"
    """Bytes of host memory of the worker of a GPU, such as ``32 GiB``. A worker on a CPU has the share of a thread."""
    device_memory: float | int | str = DEVICE_MEMORY
    """Share of a GPU's free memory that batches may use, or a size such as ``40 GiB``."""
    cpu_workers: int | str = 0
    """Workers on CPUs beside those of the GPUs, with a thread each; ``auto``: one for each core that is left."""
    host: str = LOOPBACK
    """Address to listen on; see `pipeline.execution.clusters.local.LocalProcesses.host`."""

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("cpu_workers", 0)):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if value != "auto" and not is_count:
                raise _invalid(name, value, f"auto, or a number from {least} on")
        allowed_device_memory(self.device_memory, free=0)

    @cached_property
    def gpus(self) -> tuple[Gpu, ...]:
        """GPUs that the job may use. NVML is asked, which makes no context on any of them.

        :raises NoDevice: when there is none, or one that is named is not there.
        """
        named = [self.devices] if isinstance(self.devices, int) else self.devices
        if isinstance(named, str) and named != "auto":
            raise _invalid("devices", named, "auto, or a list of numbers or UUIDs")
        shown = os.environ.get(VISIBLE)
        gpus = select_gpus(read_inventory(), named, shown=shown, where=_WHERE, otherwise="choose another cluster")
        wanted = self.settings.workers or len(gpus)
        if len(set(gpus)) != len(gpus) or wanted > len(gpus):
            found = f"{wanted} workers" if wanted > len(gpus) else f"one of {len(gpus)} GPUs twice"
            raise _invalid("devices", found, f"a worker for each GPU, {len(set(gpus))} at most")
        return gpus[:wanted]

    def expected_gpus(self) -> list[ExpectedGpus]:
        """Return the GPUs by their kinds."""
        kinds = Counter((gpu.name, gpu.memory) for gpu in self.gpus)
        return [ExpectedGpus(count, name, memory) for (name, memory), count in kinds.items()]

    def check_device(self) -> None:
        """Check that this machine has the GPUs, and dask-cuda is installed.

        :raises NoDevice: when it has not.
        """
        _ = self.gpus
        _cluster_class()

    def limits(self) -> Limits:
        """Return all workers, and threads and host memory of the worker of a GPU.

        :raises NoDevice: when this machine has no such GPU.
        """
        threads, cpu_workers = self._shape()
        slots = len(self.gpus) * threads + cpu_workers
        limit = self.settings.memory_limit or self.memory_limit
        memory = memory_of(limit, share=threads / slots)
        return Limits(workers=len(self.gpus) + cpu_workers, threads=threads, memory=memory)

    def describe_start(self) -> str:
        """Return the number of GPUs and workers, and the longest wait for one."""
        patience = format_seconds(self.settings.no_workers_timeout)
        return f"{workers_text(self.limits())} on {plural(len(self.gpus), 'GPU')}, at most {patience}"

    def _shape(self) -> tuple[int, int]:
        """Return the threads for each GPU, and the number of workers on CPUs."""
        cores, gpus = core_count(), len(self.gpus)
        named = self.settings.threads or self.threads
        kept = 0 if self.cpu_workers == "auto" else int(self.cpu_workers)
        usual = min(MOST_THREADS, max(LEAST_THREADS, (cores - kept) // gpus))
        threads = usual if named == "auto" else int(named)
        return threads, max(0, cores - gpus * threads) if self.cpu_workers == "auto" else kept

    def preload(self, *, has_steps: bool) -> None:
        """Do nothing: workers that open GPUs are not forked."""

    @contextmanager
    def open(self, *, directory: str = "") -> Iterator[Client]:
        """Start the workers and yield a client; stop all workers on leaving.

        :param directory: the job directory; certificates are stored there.
        :raises NoDevice: when this machine has no such GPU.
        :raises RefusedForSafety: when the dashboard would listen on an address other than loopback.
        """
        check_dashboard(self.settings.dashboard)
        # Before anything starts: dask-cuda finds out after its scheduler runs, which then stays.
        self.check_device()
        certificates = certificates_for(self.host, self.settings, directory=directory)
        with certificates as given, self._start(given) as client:
            yield client

    @contextmanager
    def _start(self, certificates: Certificates | None) -> Iterator[Client]:
        (threads, cpu_workers), limits = self._shape(), self.limits()
        environment = thread_environment(core_count(), len(self.gpus) * threads + cpu_workers)
        config = process_config(self.settings, environment, method="spawn")
        # dask-cuda sets it for good.
        before = {**environment, "RAPIDS_NO_INITIALIZE": ""}
        with restored(before), override_config(config):
            cluster = self._make(certificates, limits)
            cluster.worker_spec.update(_cpu_workers(cluster, cpu_workers, memory=limits.memory // threads))
            cluster.scale(len(cluster.worker_spec))
            with connected(cluster, workers=limits.workers, timeout=self.settings.no_workers_timeout) as client:
                yield client

    def _make(self, certificates: Certificates | None, limits: Limits) -> Any:
        try:
            return _cluster_class()(
                CUDA_VISIBLE_DEVICES=[gpu.uuid for gpu in self.gpus],
                threads_per_worker=limits.threads,
                memory_limit=limits.memory,
                device_memory_limit=None,
                data=dict,
                resources={GPU_RESOURCE: limits.threads},
                preload=list(PRELOAD),
                **server_options(self.host, self.settings, certificates),
            )
        except Exception as error:
            raise InfrastructureError(
                "the workers of the GPUs could not be started",
                where=_WHERE,
                found=first_line(error),
                expected=f"{len(self.gpus)} workers of dask-cuda",
                next_step="check nvidia-smi on this machine, then resume",
            ) from error


def _cpu_workers(cluster: Any, count: int, *, memory: int) -> dict[str, Any]:
    """Return what `SpecCluster` needs to start ``count`` workers that see no GPU, by their names."""
    options = {
        name: value
        for name, value in cluster.new_spec["options"].items()
        # Those of dask-cuda open a card.
        if name not in ("preload", "preload_argv", "plugins", "env")
    }
    options |= {"nthreads": 1, "memory_limit": memory, "preload": list(PRELOAD), "env": {VISIBLE: ""}}
    return {f"cpu-{number}": {"cls": Nanny, "options": {**options, "resources": {"CPU": 1}}} for number in range(count)}


def _cluster_class() -> Any:
    """Return dask-cuda's class.

    :raises NoDevice: when it is not installed.
    """
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise NoDevice(
            "the package dask-cuda is not installed",
            where=_WHERE,
            found=first_line(error),
            expected="the packages for GPUs",
            next_step=EXTRA,
        ) from error
    return LocalCUDACluster


def _invalid(name: str, found: object, expected: str) -> SpecError:
    return SpecError("invalid value in a cluster file", where=f"{_WHERE}, {name}", found=str(found), expected=expected)
