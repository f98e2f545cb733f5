"""Refuse a job that requests GPUs which the machine or the workers do not have, and say which ones are expected.

An adapter may have members for it: ``device_blocker``, the reason why ``device: auto`` uses no GPU of its workers;
``check_device()``, which raises `NoDevice` where ``device: cuda`` cannot work; ``device_memory``, the share of a GPU's
free memory, or a size, that batches may use; and ``expected_gpus()``, the GPUs that the cluster will have.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from pipeline.common.units import format_bytes, plural
from pipeline.devices.inventory import VISIBLE, read_inventory, select_gpus
from pipeline.devices.memory import allowed_device_memory, device_batch_rows, device_row_bytes
from pipeline.execution.placement import Reports
from pipeline.models.device_options import DeviceOptions
from pipeline.plan.plan import Plan


def options_on(cluster: Any, options: DeviceOptions) -> DeviceOptions:
    """Return ``options`` on a cluster.

    :param cluster: an adapter.
    :raises NoDevice: when a GPU is requested, and the cluster is known to have none.
    """
    if options.device == "cuda" and hasattr(cluster, "check_device"):
        cluster.check_device()
    return options.without_gpu(getattr(cluster, "device_blocker", "")) if options.device == "auto" else options


def with_expected(options: DeviceOptions, cluster: Any, plan: Plan, *, threads: int) -> DeviceOptions:
    """Return ``options`` with a text about the GPUs that the cluster will have, and the rows of a batch on them.

    :param cluster: an adapter.
    :param threads: tasks at a time on a GPU.
    """
    groups: list[ExpectedGpus] = cluster.expected_gpus() if hasattr(cluster, "expected_gpus") else []
    if options.reasons or not groups:
        return options
    known = [group.memory for group in groups if group.memory]
    rows = plan.device_batch_rows or plan.batch_rows
    if known:
        free = allowed_device_memory(cluster.device_memory, free=min(known))
        row = max(device_row_bytes(features=len(one.features), outputs=one.model.margins) for one in plan.scores)
        rows = min(rows, device_batch_rows(allowed=free, row_bytes=row, threads=threads))
    text = "; ".join(map(str, groups))
    return replace(options, expected=f"{text}, batches of {plural(rows, 'row')}")


@dataclass(frozen=True)
class ExpectedGpus:
    """GPUs of one kind that a cluster will have."""

    count: int
    name: str = "GPU"
    memory: int = 0
    """Bytes of device memory of each; 0: unknown."""

    def __str__(self) -> str:
        memory = f", {format_bytes(self.memory)}" if self.memory else ""
        return f"{self.count} × {self.name}{memory}"


def check_this_machine() -> None:
    """Check that this machine has a GPU that this process may use.

    :raises NoDevice: when there is none.
    """
    select_gpus(read_inventory(), shown=os.environ.get(VISIBLE))


def options_with(reports: Reports, options: DeviceOptions) -> DeviceOptions:
    """Return ``options`` after the workers have reported: without a GPU if ``auto`` finds none that is usable.

    :param reports: of the workers that were asked (see `pipeline.execution.placement.workers_asked`).
    :raises NoDevice: when GPUs are requested, and a worker that may take partitions has none that is usable.
    :raises ModelError: when the GPU of a worker computes other bits than the CPU.
    """
    known = {address: report for address, report in reports.items() if report is not None}
    if options.device == "cuda":
        for address, report in known.items():
            if not report.is_usable:
                raise report.error(where=f"worker {address}")
    if options.device != "auto" or any(report.is_usable for report in known.values()):
        return options
    found = ", ".join(dict.fromkeys(report.found for report in known.values()))
    return options.without_gpu(f"no worker can use a GPU ({found})" if found else "no worker can use a GPU")
