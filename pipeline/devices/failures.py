"""Tell the errors of a GPU apart: too little memory, a lost device, or neither. Pure.

The errors come from cupy, RMM, pylibcudf and xgboost. None of these packages is imported: a type is known by its name,
and xgboost has one type for everything, so that its text decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum

from pipeline.errors import DeviceLost


class DeviceFailure(StrEnum):
    """Kinds of errors of a device."""

    MEMORY = "memory"
    """Too little memory. The device is in order: fewer rows may fit."""
    LOST = "lost"
    """The device, or this process's context on it, cannot be used any more. The process must end."""
    OTHER = "other"
    """Neither: an error of rows, model or code."""


_MEMORY_TEXTS = re.compile(
    r"Memory allocation error on worker|cudaErrorMemoryAllocation|bad_alloc|out of memory", re.IGNORECASE
)
_LOST_TEXTS = re.compile(
    "cudaError(IllegalAddress|LaunchFailure|ECCUncorrectable|HardwareStackError|MisalignedAddress|DevicesUnavailable"
    "|NoDevice|InsufficientDriver|Unknown)\\b|GPU is lost|NVMLError_GpuIsLost"
)
_OUT_OF_MEMORY_STATUS = 2
"""``cudaErrorMemoryAllocation`` as a number."""


def classify_device_error(error: BaseException) -> DeviceFailure:
    """Return the kind of ``error``; the errors that caused it count, too.

    Classify before rows are blamed: xgboost's error type is a ValueError, which rows may cause, too.
    """
    kinds = {_classify_one(cause) for cause in _causes(error)}
    return next((kind for kind in (DeviceFailure.LOST, DeviceFailure.MEMORY) if kind in kinds), DeviceFailure.OTHER)


def _classify_one(error: BaseException) -> DeviceFailure:
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if _LOST_TEXTS.search(text) or "NVMLError_GpuIsLost" in names:
        return DeviceFailure.LOST
    is_cuda = "CUDARuntimeError" in names
    if isinstance(error, MemoryError) or (is_cuda and getattr(error, "status", None) == _OUT_OF_MEMORY_STATUS):
        return DeviceFailure.MEMORY
    if (is_cuda or "XGBoostError" in names) and _MEMORY_TEXTS.search(text):
        return DeviceFailure.MEMORY
    return DeviceFailure.OTHER


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def first_line(error: BaseException) -> str:
    """Return type and first line of an error, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def device_lost(found: str, *, where: str = "") -> DeviceLost:
    """Make the error for a GPU that this process cannot use any more.

    :param found: what the failing call raised.
    :param where: the GPU and its host.
    """
    return DeviceLost(
        "the GPU of a worker failed",
        where=where,
        found=found,
        next_step="look at the host's kernel log (Xid), then resume",
    )
