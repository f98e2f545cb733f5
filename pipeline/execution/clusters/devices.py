"""Refuse a job that requests GPUs which the machine or the workers do not have.

An adapter may have two members for it: ``device_blocker``, the reason why ``device: auto`` uses no GPU of its workers,
and ``check_device()``, which raises `NoDevice` where ``device: cuda`` cannot work.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipeline.devices.inventory import VISIBLE, read_inventory, select_gpus
from pipeline.devices.report import DeviceReport
from pipeline.models.device_options import DeviceOptions

Reports = Mapping[str, DeviceReport | None]
"""Report of each worker by its address; None if no GPU was asked for."""


def options_on(cluster: Any, options: DeviceOptions) -> DeviceOptions:
    """Return ``options`` on a cluster.

    :param cluster: an adapter.
    :raises NoDevice: when a GPU is requested, and the cluster is known to have none.
    """
    if options.device == "cuda" and hasattr(cluster, "check_device"):
        cluster.check_device()
    return options.without_gpu(getattr(cluster, "device_blocker", "")) if options.device == "auto" else options


def check_this_machine() -> None:
    """Check that this machine has a GPU that this process may use.

    :raises NoDevice: when there is none.
    """
    select_gpus(read_inventory(), shown=os.environ.get(VISIBLE))


def options_with(reports: Reports, options: DeviceOptions) -> DeviceOptions:
    """Return ``options`` after the workers have reported: without a GPU if ``auto`` finds none that is usable.

    :raises NoDevice: when GPUs are requested, and a worker has none that is usable.
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
