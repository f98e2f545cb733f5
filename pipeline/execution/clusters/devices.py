"""Refuse a job that requests GPUs which the machine or the workers do not have.

An adapter may have two members for it: ``device_blocker``, the reason why ``device: auto`` uses no GPU of its workers,
and ``check_device()``, which raises `NoDevice` where ``device: cuda`` cannot work.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipeline.devices.inventory import EXTRA, VISIBLE, read_inventory, select_gpus
from pipeline.devices.report import DeviceProblem, DeviceReport
from pipeline.errors import ModelError, NoDevice
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
            _check(address, report)
    if options.device != "auto" or any(report.is_usable for report in known.values()):
        return options
    found = ", ".join(dict.fromkeys(report.found for report in known.values()))
    return options.without_gpu(f"no worker can use a GPU ({found})" if found else "no worker can use a GPU")


def _check(address: str, report: DeviceReport) -> None:
    where = f"worker {address}"
    if report.problem is DeviceProblem.NO_GPU:
        raise NoDevice(
            "a GPU was requested, and a worker has none",
            where=where,
            found=report.found,
            expected="an NVIDIA driver and at least one GPU",
            next_step="run it where there is one, or say device: auto",
        )
    if report.problem is DeviceProblem.BUILD:
        raise NoDevice(
            "xgboost on a worker was built without CUDA",
            where=where,
            found=report.found,
            expected="the package xgboost, which has CUDA",
            next_step=f"{EXTRA} there, after removing xgboost-cpu",
        )
    if report.problem is DeviceProblem.BITS:
        raise other_bits(where=where, found=report.found)
    if report.problem is DeviceProblem.PROOF:
        raise cannot_use(where=where, found=report.found)


def cannot_use(*, where: str, found: str) -> NoDevice:
    """Return the error for a GPU on which no row can be scored."""
    return NoDevice(
        "a worker cannot use its GPU",
        where=where,
        found=found,
        expected="one row scored on cuda:0",
        next_step="nvidia-smi on that host; a driver for CUDA 13 (580 or newer), or the package xgboost-cu12",
    )


def other_bits(*, where: str, found: str) -> ModelError:
    """Return the error for a GPU whose results differ from the CPU's."""
    return ModelError(
        "the GPU gives other results than the CPU for this model",
        where=where,
        found=found,
        expected="the same bits",
        next_step="set score.tolerance, or say device: cpu, and report it",
    )
