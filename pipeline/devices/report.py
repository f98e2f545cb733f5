"""`DeviceReport`: what a worker answers about its GPU before it gets a partition."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from pipeline.devices.inventory import EXTRA, VISIBLE, Gpu, hidden_reason, read_inventory, visible_gpus
from pipeline.errors import ModelError, NoDevice, PipelineError


class DeviceProblem(StrEnum):
    """Reasons why a worker cannot use a GPU."""

    NO_GPU = "no gpu"
    """It has none, or none is visible to it."""
    BUILD = "build"
    """The library of the model was built without CUDA."""
    PROOF = "proof"
    """It has a GPU, but a row could not be scored on it."""
    BITS = "bits"
    """A row scored on the GPU has other bits than on the CPU."""


@dataclass(frozen=True)
class DeviceReport:
    """The GPU of one worker process."""

    gpu: Gpu | None = None
    """The first GPU that the process sees; None if it sees none."""
    driver: str = ""
    problem: DeviceProblem | None = None
    """None if the worker can use its GPU."""
    found: str = ""
    """Details of the problem."""

    @property
    def is_usable(self) -> bool:
        """True if the worker scores on its GPU."""
        return self.gpu is not None and self.problem is None

    def with_problem(self, problem: DeviceProblem, found: str) -> DeviceReport:
        """Return the report with a problem."""
        return replace(self, problem=problem, found=found)

    def error(self, *, where: str) -> PipelineError:
        """Return the error for a job that requests the GPU of this process, which cannot be used.

        :param where: the worker.
        """
        texts = {"where": where, "found": self.found}
        if self.problem is DeviceProblem.BITS:
            return ModelError(
                "the GPU gives other results than the CPU for this model",
                **texts,
                expected="the same bits",
                next_step="set score.tolerance, or say device: cpu, and report it",
            )
        message, expected, next_step = _TEXTS[self.problem or DeviceProblem.NO_GPU]
        return NoDevice(message, **texts, expected=expected, next_step=next_step)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, those of the GPU among them."""
        gpu = {"uuid": self.gpu.uuid, "name": self.gpu.name, "memory": self.gpu.memory} if self.gpu else {}
        problem = {"problem": str(self.problem), "found": self.found} if self.problem else {}
        return {**gpu, "driver": self.driver, **problem}


_TEXTS = {
    DeviceProblem.NO_GPU: (
        "a GPU was requested, and a worker has none",
        "an NVIDIA driver and at least one GPU",
        "run it where there is one, or say device: auto",
    ),
    DeviceProblem.BUILD: (
        "xgboost on a worker was built without CUDA",
        "the package xgboost, which has CUDA",
        f"{EXTRA} there, after removing xgboost-cpu",
    ),
    DeviceProblem.PROOF: (
        "a worker cannot use its GPU",
        "one row scored on cuda:0",
        "nvidia-smi on that host; a driver for CUDA 13 (580 or newer), or the package xgboost-cu12",
    ),
}
"""Message, expected and next step of the error for each problem."""


def own_gpu() -> DeviceReport:
    """Return the report of this process, as far as NVML knows. Where a GPU is ruled out, no package is imported."""
    reason = hidden_reason()
    if reason:
        return DeviceReport(problem=DeviceProblem.NO_GPU, found=reason)
    inventory = read_inventory()
    gpus = visible_gpus(inventory.gpus, os.environ.get(VISIBLE))
    if not gpus:
        found = inventory.reason or f"{VISIBLE}={os.environ.get(VISIBLE)}"
        return DeviceReport(driver=inventory.driver, problem=DeviceProblem.NO_GPU, found=found)
    return DeviceReport(gpus[0], inventory.driver)
