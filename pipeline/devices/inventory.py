"""Find the GPUs of this machine with NVML, which makes no context on any of them.

``pynvml`` is imported when `read_inventory` is called, never before. A process that must not import it asks
`hidden_reason` first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from pipeline.common.units import format_bytes
from pipeline.errors import NoDevice

EXTRA = "pip install 'dask-batch-pipeline[gpu]'"
"""Command that installs what scoring on a GPU needs."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Variable that selects the GPUs of a process, by number or UUID; the first one is its device."""
NOT_INSTALLED = f"the packages for GPUs are not installed: {EXTRA}"


@dataclass(frozen=True)
class Gpu:
    """A GPU, or an instance of one that is divided (MIG)."""

    uuid: str
    """``GPU-…`` or ``MIG-…``."""
    name: str
    memory: int
    """Bytes of device memory."""
    index: int
    """NVML's number of the card; CUDA may number cards otherwise."""
    is_mig: bool = False
    """True for an instance of a divided card, which has the card's number."""

    def __str__(self) -> str:
        return f"{self.name}, {format_bytes(self.memory)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Inventory:
    """GPUs of a machine."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    """Version of the driver; empty without one."""
    reason: str = ""
    """Reason why there are no GPUs; empty if there are."""


def read_inventory() -> Inventory:
    """Return the GPUs of this machine, whatever this process may see of them."""
    try:
        import pynvml
    except ImportError:
        return Inventory(reason=NOT_INSTALLED)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Inventory(reason=str(error))
    try:
        return _read(pynvml)
    except pynvml.NVMLError as error:
        return Inventory(reason=str(error))
    finally:
        pynvml.nvmlShutdown()


def _read(nvml: Any) -> Inventory:
    driver, reason = _text(nvml.nvmlSystemGetDriverVersion()), ""
    gpus: list[Gpu] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus += _read_card(nvml, index)
        except nvml.NVMLError as error:
            # One card that this user may not use, or that is lost, does not hide the others.
            reason = reason or str(error)
    return Inventory(tuple(gpus), driver, "" if gpus else reason or "the driver shows no GPU")


def _read_card(nvml: Any, index: int) -> Iterator[Gpu]:
    card = nvml.nvmlDeviceGetHandleByIndex(index)
    instances = list(_instances(nvml, card))
    for handle in instances or [card]:
        yield Gpu(
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            name=_text(nvml.nvmlDeviceGetName(handle)),
            memory=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            index=index,
            is_mig=bool(instances),
        )


def _instances(nvml: Any, card: Any) -> Iterator[Any]:
    """Yield the instances of a divided card. Cards that cannot be divided say so by an error."""
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(card)
    except nvml.NVMLError:
        return
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card) if current else 0):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, number)
        except nvml.NVMLError:
            continue


def _text(value: str | bytes) -> str:
    """Return a text of NVML, which older versions of pynvml give as bytes."""
    return value.decode() if isinstance(value, bytes) else value


def hidden_reason(environ: Mapping[str, str] | None = None) -> str:
    """Return the reason why this process can use no GPU, as far as that is known without importing a package."""
    shown = (os.environ if environ is None else environ).get(VISIBLE)
    if shown is not None and not _entries(shown):
        return f"{VISIBLE} hides all GPUs"
    return "" if find_spec("cupy") is not None else NOT_INSTALLED


def visible_gpus(gpus: Sequence[Gpu], shown: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that a process sees, in its order.

    :param shown: value of ``CUDA_VISIBLE_DEVICES``; None: not set. As in CUDA, an unknown entry hides all after it.
    """
    if shown is None:
        return tuple(gpus)
    visible: list[Gpu] = []
    for entry in _entries(shown):
        gpu = _find(gpus, entry)
        if gpu is None:
            break
        visible.append(gpu)
    return tuple(visible)


def _entries(shown: str) -> list[str]:
    entries = [entry.strip() for entry in shown.split(",") if entry.strip()]
    return [] if entries[:1] == ["-1"] else entries


def _find(gpus: Sequence[Gpu], name: int | str) -> Gpu | None:
    """Return the GPU with a number or a UUID, or the only one with the beginning of a UUID."""
    text = str(name)
    if text.isdigit():
        return next((gpu for gpu in gpus if not gpu.is_mig and gpu.index == int(text)), None)
    found = [gpu for gpu in gpus if text.startswith(("GPU-", "MIG-")) and gpu.uuid.startswith(text)]
    return found[0] if len(found) == 1 else None


def select_gpus(
    inventory: Inventory,
    requested: str | Sequence[int | str] = "auto",
    *,
    shown: str | None = None,
    where: str = "device: cuda",
    otherwise: str = "say device: auto",
) -> tuple[Gpu, ...]:
    """Return the GPUs that a cluster of this machine may use.

    :param requested: numbers and UUIDs, or ``auto``: those in ``shown``, else all.
    :param shown: value of ``CUDA_VISIBLE_DEVICES`` of this process; None: not set.
    :param where: the field that requests GPUs, for errors.
    :param otherwise: how the job can run without GPUs, for errors.
    :raises NoDevice: when there is none, or one that is requested is not there.
    """
    is_auto = requested == "auto"
    gpus = visible_gpus(inventory.gpus, shown) if is_auto else inventory.gpus
    if not gpus:
        raise NoDevice(
            "a GPU was requested, and this machine shows none",
            where=where,
            found=inventory.reason or f"{VISIBLE}={shown}",
            expected="an NVIDIA driver and at least one GPU",
            next_step=f"run it where there is one, or {otherwise}",
        )
    selected: list[Gpu] = []
    for name in () if is_auto else requested:
        gpu = _find(gpus, name)
        if gpu is None:
            raise NoDevice(
                "unknown GPU",
                where="devices",
                found=str(name),
                expected=_listed(gpus),
                next_step="name GPUs of this machine in the cluster's file, or say devices: auto",
            )
        selected.append(gpu)
    return gpus if is_auto else tuple(selected)


def _listed(gpus: Sequence[Gpu]) -> str:
    numbers = ", ".join(gpu.uuid if gpu.is_mig else str(gpu.index) for gpu in gpus)
    return f"{numbers} ({', '.join(gpu.name for gpu in gpus)})"
