"""Decide whether a GPU may evaluate a model: only where it computes the CPU's bits. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.errors import ModelError
from pipeline.models.flavors import find_flavor
from pipeline.models.model import ModelVersion
from pipeline.spec.model_ref import Device, Engine, OutputKind

DEVICE_KINDS = ("prediction", "label", "margin")
"""Kinds of output that a GPU may compute. Leaves and contributions stay on the CPU: contributions have other bits."""


@dataclass(frozen=True)
class DeviceOptions:
    """Devices that can evaluate a model in a job."""

    requested: Device
    """Device that was requested."""
    reasons: tuple[str, ...] = ()
    """Reasons, by name, why no GPU is used; empty where a worker's GPU may be used."""
    is_given: bool = True
    """True if somebody requested a device; False for the default."""
    expected: str = ""
    """GPUs that the cluster will have, and the batches for them; empty if that is not known."""

    @property
    def device(self) -> Device:
        """Device to request from the workers."""
        return "cpu" if self.reasons else self.requested

    def without_gpu(self, *reasons: str) -> DeviceOptions:
        """Return the options with further reasons against a GPU; ``cuda`` is a request that no reason changes."""
        return self if self.requested == "cuda" else replace(self, reasons=(*self.reasons, *filter(None, reasons)))

    def text(self) -> str:
        """Describe the options in a line; empty if nobody asked, and no GPU will be used."""
        if not self.reasons and self.expected:
            return f"{self.requested} expected: {self.expected}"
        if not self.reasons:
            return "cuda" if self.requested == "cuda" else "the GPU of a worker that has one, else the CPU"
        return f"cpu: {'; '.join(self.reasons)}" if self.is_given else ""


def device_options(
    device: Device,
    version: ModelVersion,
    *,
    kind: OutputKind,
    engine: Engine,
    is_given: bool = True,
    has_limits: bool = False,
) -> DeviceOptions:
    """Return the devices that can compute ``kind``; see `device_blockers`."""
    if device == "cpu":
        return DeviceOptions(device, ("cpu was requested",), is_given)
    reasons = device_blockers(version, kind=kind, engine=engine, has_limits=has_limits)
    return DeviceOptions(device, reasons, is_given)


def device_blockers(
    version: ModelVersion, *, kind: OutputKind, engine: Engine, has_limits: bool = False
) -> tuple[str, ...]:
    """Return the reasons, by name, why no GPU may compute ``kind``; empty where one may.

    :param has_limits: True if steps of the job have time limits: its rows are scored in processes that may be killed.
    """
    if has_limits:
        return ("steps with a timeout, which run in processes of their own",)
    flavor = find_flavor(version.flavor)
    if flavor.device_blockers is None:
        return (f"the flavor {version.flavor}",)
    if kind not in DEVICE_KINDS:
        return (f"the output {kind}",)
    return ("score.engine: trees, which run on CPUs",) if engine == "trees" else flavor.device_blockers(version, kind)


def check_device(
    device: Device, version: ModelVersion, *, kind: OutputKind, engine: Engine, has_limits: bool = False
) -> None:
    """Refuse a job that requests GPUs for what they cannot compute with the CPU's bits; see `device_blockers`.

    :raises ModelError: with every reason by name.
    """
    blockers = device_blockers(version, kind=kind, engine=engine, has_limits=has_limits)
    reasons = blockers if device == "cuda" else ()
    if reasons:
        raise ModelError(
            "the GPU cannot score this job with the bits of the CPU",
            where="device: cuda",
            found="; ".join(reasons),
            expected=f"a tree model without dart, and one of the outputs {', '.join(DEVICE_KINDS)}",
            next_step="say device: auto or cpu",
        )
