"""What the errors of cupy, RMM, pylibcudf and xgboost mean: their types by name, their texts as they were recorded."""

from __future__ import annotations

import pytest
import xgboost

from pipeline.devices.failures import DeviceFailure, classify_device_error, first_line


class CUDARuntimeError(RuntimeError):
    """As `cupy_backends.cuda.api.runtime.CUDARuntimeError`: the status is an attribute."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class OutOfMemoryError(MemoryError):
    """As `cupy.cuda.memory.OutOfMemoryError`."""


class NVMLError_GpuIsLost(Exception):
    """As in pynvml."""


MEMORY = [
    MemoryError("std::bad_alloc: out_of_memory: CUDA error at: rmm/mr/device/cuda_memory_resource.hpp"),
    OutOfMemoryError("Out of memory allocating 1,073,741,824 bytes (allocated so far: 0 bytes)."),
    CUDARuntimeError(2, "cudaErrorMemoryAllocation: out of memory"),
    CUDARuntimeError(2, ""),
    xgboost.core.XGBoostError(
        "[12:00:00] /workspace/src/common/device_vector.cu:23: Memory allocation error on worker 0: std::bad_alloc\n"
        "- Free memory: 1KB\n- Requested memory: 8GB\n"
    ),
    xgboost.core.XGBoostError("after reduction step 1: cudaErrorMemoryAllocation: out of memory"),
    xgboost.core.XGBoostError("bad allocation: std::bad_alloc"),
]
LOST = [
    CUDARuntimeError(700, "cudaErrorIllegalAddress: an illegal memory access was encountered"),
    CUDARuntimeError(719, "cudaErrorLaunchFailure: unspecified launch failure"),
    CUDARuntimeError(214, "cudaErrorECCUncorrectable: uncorrectable ECC error encountered"),
    CUDARuntimeError(714, "cudaErrorHardwareStackError: hardware stack error"),
    CUDARuntimeError(716, "cudaErrorMisalignedAddress: misaligned address"),
    CUDARuntimeError(46, "cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable"),
    CUDARuntimeError(100, "cudaErrorNoDevice: no CUDA-capable device is detected"),
    CUDARuntimeError(35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"),
    CUDARuntimeError(999, "cudaErrorUnknown: unknown error"),
    xgboost.core.XGBoostError("parallel_for failed: cudaErrorIllegalAddress: an illegal memory access"),
    RuntimeError("GPU is lost"),
    NVMLError_GpuIsLost("GPU is lost"),
    NVMLError_GpuIsLost(),
]
OTHER = [
    ValueError("out of memory in a text of a row"),
    RuntimeError("bad_alloc is a word"),
    xgboost.core.XGBoostError("Check failed: feature names must match"),
    CUDARuntimeError(1, "cudaErrorInvalidValue: invalid argument"),
    CUDARuntimeError(801, "cudaErrorNoDeviceMemoryOfThisKind: not one of ours"),
    OSError("disk"),
]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((error, DeviceFailure.MEMORY) for error in MEMORY),
        *((error, DeviceFailure.LOST) for error in LOST),
        *((error, DeviceFailure.OTHER) for error in OTHER),
    ],
    ids=lambda value: f"{type(value).__name__}: {value}"[:60],
)
def test_kind(error: BaseException, kind: DeviceFailure) -> None:
    assert classify_device_error(error) is kind


class TestCauses:
    def raised_from(self, error: BaseException, cause: BaseException) -> BaseException:
        error.__cause__ = cause
        return error

    def test_cause_counts(self) -> None:
        assert classify_device_error(self.raised_from(ValueError("rows"), LOST[0])) is DeviceFailure.LOST

    def test_lost_device_counts_more_than_memory(self) -> None:
        """A retry with fewer rows on a dead context would fail for ever."""
        assert classify_device_error(self.raised_from(MemoryError(), LOST[0])) is DeviceFailure.LOST

    def test_circle_of_causes_ends(self) -> None:
        first, second = ValueError("a"), ValueError("b")
        first.__cause__, second.__cause__ = second, first
        assert classify_device_error(first) is DeviceFailure.OTHER


def test_first_line_has_type_and_text() -> None:
    assert first_line(MEMORY[2]) == "CUDARuntimeError: cudaErrorMemoryAllocation: out of memory"
    assert first_line(ValueError("\n  a\nb")) == "ValueError: a"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 999))) == 200
