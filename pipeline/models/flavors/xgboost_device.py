"""The GPU of this process, as xgboost's predictor uses it. All of cupy is behind `Device` and `Upload`.

A batch travels while it is made: columns are sent from pinned memory as soon as some are complete, on the stream of the
thread, and the host makes the next ones meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np

from pipeline.common.imports import import_library
from pipeline.models.flavors.xgboost_probe import UNNEEDED


class DeviceMemory(NamedTuple):
    """Memory of a device, in bytes, as all processes that use it see it."""

    free: int
    total: int


class Upload(Protocol):
    """A matrix on its way to a device. Only the thread that made it may use it."""

    host: np.ndarray
    """float32 [rows, features] in F order, in which the device reads columns. Not initialized."""

    def send(self, first: int, last: int) -> None:
        """Begin to copy the columns from ``first`` to ``last``, exclusive. They must not change any more."""

    def has_infinite(self, columns: Sequence[int]) -> bool:
        """Return True if a value of ``columns`` is infinite. All columns must have been sent."""

    def score(self, predict: Callable[[Any], Any]) -> np.ndarray:
        """Call ``predict`` with the matrix on the device, and return its result on the host."""


class Device(Protocol):
    """A GPU. Threads share it."""

    def booster(self, data: bytes) -> Any:
        """Load a model that ``save_raw("ubj")`` returned, and put it on the device."""

    def upload(self, rows: int, features: int) -> Upload:
        """Reserve room for a matrix on the host and on the device."""

    def memory(self) -> DeviceMemory:
        """Return the memory of the device."""

    def release(self) -> None:
        """Give cached memory back to the device."""


def score(device: Device, predict: Callable[[Any], Any], matrix: np.ndarray) -> np.ndarray:
    """Copy ``matrix`` to the device, call ``predict`` with the copy, and return its result on the host.

    :param matrix: [rows, features].
    """
    upload = device.upload(*matrix.shape)
    upload.host[:] = matrix
    upload.send(0, matrix.shape[1])
    return upload.score(predict)


class WithoutCudaError(Exception):
    """The library was built without CUDA; the message has its version."""


class CupyDevice:
    """The first device of ``CUDA_VISIBLE_DEVICES``.

    Every thread works on its own stream: xgboost uses it, too, and the copy back waits for it only there.

    :raises WithoutCudaError: when xgboost cannot use a GPU.
    """

    def __init__(self) -> None:
        self._xgboost: Any = import_library("xgboost", without=UNNEEDED)
        if not self._xgboost.build_info().get("USE_CUDA"):
            raise WithoutCudaError(f"xgboost {self._xgboost.__version__}, built without CUDA")
        # Else CUDA numbers the fastest card 0, and NVML the first one on the bus.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        import cupy

        self.cupy = cupy
        self._thread = threading.local()
        self.any_infinite: Any = cupy.ReductionKernel(
            "float32 x", "bool y", "isinf(x)", "a || b", "y = a", "false", "any_infinite"
        )
        """Finds infinite values without a mask of the matrix."""

    def booster(self, data: bytes) -> Any:
        """See `Device.booster`."""
        booster = self._xgboost.Booster(model_file=bytearray(data))
        booster.set_param({"device": "cuda:0", "nthread": 1})
        return booster

    def upload(self, rows: int, features: int) -> CupyUpload:
        """See `Device.upload`."""
        return CupyUpload(self, rows, features)

    def use_async_pool(self) -> None:
        """Let xgboost take memory from a pool: the option holds for one thread. Without it each call stalls the card.

        The option needs a device, which the first copy has opened.
        """
        if getattr(self._thread, "has_pool", False):
            return
        self._thread.has_pool = True
        if "use_cuda_async_pool" in self._xgboost.get_config():
            self._xgboost.set_config(use_cuda_async_pool=True)

    def memory(self) -> DeviceMemory:
        """See `Device.memory`."""
        return DeviceMemory(*map(int, self.cupy.cuda.runtime.memGetInfo()))

    def release(self) -> None:
        """See `Device.release`."""
        self.cupy.get_default_memory_pool().free_all_blocks()
        self.cupy.get_default_pinned_memory_pool().free_all_blocks()


class CupyUpload:
    """An `Upload` in pinned memory of the host: only from there do copies run beside other work."""

    def __init__(self, device: CupyDevice, rows: int, features: int) -> None:
        cupy = device.cupy
        self._device, self._stream = device, cupy.cuda.Stream.ptds
        self._sent: Any = None
        with self._stream:
            self._data = cupy.empty((rows, features), np.float32, order="F")
            pinned = cupy.cuda.alloc_pinned_memory(4 * rows * features)
        # The array keeps the memory: it goes back to cupy's pool with the last view of it.
        self.host = np.frombuffer(pinned, np.float32, rows * features).reshape((rows, features), order="F")

    def send(self, first: int, last: int) -> None:
        """See `Upload.send`."""
        with self._stream:
            self._data[:, first:last].set(self.host[:, first:last], stream=self._stream)
            self._sent = self._sent or self._device.cupy.cuda.Event(disable_timing=True)
            self._sent.record(self._stream)

    def has_infinite(self, columns: Sequence[int]) -> bool:
        """See `Upload.has_infinite`."""
        with self._stream:
            found = [self._device.any_infinite(self._data[:, first:last]) for first, last in runs(columns)]
            # One wait for all.
            return bool(self._device.cupy.stack(found).any()) if found else False

    def score(self, predict: Callable[[Any], Any]) -> np.ndarray:
        """See `Upload.score`."""
        with self._stream:
            self._device.use_async_pool()
            scores: np.ndarray = self._device.cupy.asnumpy(predict(self._data))
            return scores

    def __del__(self) -> None:
        # Else another thread may fill the memory while the device still reads it.
        with suppress(Exception):
            if self._sent is not None:
                self._sent.synchronize()


def runs(columns: Sequence[int]) -> list[tuple[int, int]]:
    """Return first and last column, exclusive, of each run of adjacent columns.

    :param columns: ascending.
    """
    edges = [number for number, (left, right) in enumerate(pairwise(columns), 1) if right != left + 1]
    return [(columns[first], columns[last - 1] + 1) for first, last in pairwise([0, *edges, len(columns)]) if columns]


_lock = threading.Lock()
_opened: dict[str, Device] = {}
_opener: dict[str, Callable[[], Device]] = {"open": CupyDevice}


def open_device() -> Device:
    """Return the device of this process; the first call opens it.

    :raises WithoutCudaError: when xgboost was built without CUDA.
    """
    with _lock:
        if "device" not in _opened:
            _opened["device"] = _opener["open"]()
        return _opened["device"]


def replace_device(opener: Callable[[], Device] = CupyDevice) -> None:
    """Let this process open another kind of device from now on: for tests."""
    with _lock:
        _opened.clear()
        _opener["open"] = opener
