"""`Placement`: the workers that may take the partitions of a job, and the class of each worker.

A worker with a GPU has the resource ``GPU``, one for each of its threads, if its cluster was started for GPUs. On a
running scheduler without such resources the handshake tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.devices.inventory import Gpu
from pipeline.devices.report import DeviceReport
from pipeline.spec.model_ref import Device

GPU_RESOURCE = "GPU"
"""Name of the resource of workers with a GPU."""
CPU = "cpu"
"""Class of the workers without a GPU."""
Reports = Mapping[str, DeviceReport | None]
"""Report of each worker by its address; None if no GPU was asked for."""
Workers = Mapping[str, Mapping[str, Any]]
"""Description of each worker from the scheduler, by its address."""


def has_gpu_resource(worker: Mapping[str, Any]) -> bool:
    """Return True if a worker offers a GPU."""
    return bool((worker.get("resources") or {}).get(GPU_RESOURCE))


@dataclass(frozen=True)
class Placement:
    """The workers that may take partitions. The default: all, and all are alike."""

    resources: Mapping[str, float] = field(default_factory=dict)
    """Resources that each partition asks for; isolated partitions ask for none, since they are scored on CPUs."""
    gpus: Mapping[str, Gpu] = field(default_factory=dict)
    """GPU of each worker that may use one, by its address. Workers that come later are not in it."""

    @property
    def smallest_gpu(self) -> Gpu | None:
        """GPU with the least memory; None without GPUs."""
        return min(self.gpus.values(), key=lambda gpu: (gpu.memory, gpu.name), default=None)

    @property
    def needs_gpu(self) -> bool:
        """True if partitions ask for the resource ``GPU``."""
        return GPU_RESOURCE in self.resources

    def may_take(self, worker: Mapping[str, Any]) -> bool:
        """Return True if a worker may take partitions.

        :param worker: its description from the scheduler.
        """
        offered = worker.get("resources") or {}
        return all(offered.get(name, 0) >= amount for name, amount in self.resources.items())

    def class_of(self, address: str, worker: Mapping[str, Any]) -> str:
        """Return the class of a worker: workers of one class are about as fast as each other.

        :param worker: its description from the scheduler.
        """
        if address in self.gpus:
            return self.gpus[address].name
        if not (self.gpus and has_gpu_resource(worker)):
            return CPU
        # A worker that came after the handshake: of GPUs with several names it may be any.
        names = {gpu.name for gpu in self.gpus.values()}
        return names.pop() if len(names) == 1 else GPU_RESOURCE


def workers_asked(workers: Workers, device: Device) -> tuple[str, ...]:
    """Return the workers that must report their GPU before the job starts.

    With ``cuda`` those that have the resource ``GPU``, since the others get no partition; without any, all.
    """
    if device == "cpu":
        return ()
    offering = tuple(address for address, worker in workers.items() if has_gpu_resource(worker))
    return offering if device == "cuda" and offering else tuple(workers)


def place(device: Device, *, workers: Iterable[Mapping[str, Any]], reports: Reports) -> Placement:
    """Return the placement of a job.

    :param device: device of the job, after the workers have reported.
    :param workers: descriptions of the workers from the scheduler.
    """
    if device == "cpu":
        return Placement()
    gpus = {
        address: report.gpu
        for address, report in reports.items()
        if report is not None and report.is_usable and report.gpu is not None
    }
    if device == "cuda" and any(map(has_gpu_resource, workers)):
        return Placement({GPU_RESOURCE: 1}, gpus)
    return Placement(gpus=gpus)
