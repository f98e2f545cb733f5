"""A GPU made of numpy arrays: it adds leaves in the GPU's order, runs out of memory, and gets lost, as you choose.

For this process, `installed` is a context manager. For workers, name this module as a preload and put a `FakeGpu` as
JSON into the variable ``PIPELINE_TESTING_GPU``.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xgboost

from pipeline.models.device_engine import forget_engines
from pipeline.models.flavors.xgboost_device import DeviceMemory, WithoutCudaError, replace_device
from pipeline.testing.fake_nvml import Card, FakeNvml, nvml
from pipeline.testing.gpu_order import gpu_order_margins

VARIABLE = "PIPELINE_TESTING_GPU"
LOST = "cudaErrorIllegalAddress: an illegal memory access was encountered"
NO_MEMORY = "Memory allocation error on worker 0: std::bad_alloc\n- Free memory: 1KB\n- Requested memory: 8GB"


class CUDARuntimeError(RuntimeError):
    """As cupy's: the status is an attribute."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class FakeGpu:
    """Behaviour of a fake GPU."""

    uuid: str = "GPU-fake-1"
    memory: int = 1 << 30
    """Bytes of device memory; 0: the worker has no GPU."""
    others: int = 0
    """Bytes that other processes use."""
    order: Literal["gpu", "cpu"] = "gpu"
    """Order in which leaves are added. With ``gpu`` a model that is not folded has other bits."""
    out_of_memory: Literal["python", "cupy", "xgboost"] = "python"
    """Form of the error when memory runs short."""
    tokens: str = ""
    """Folder of files: each call that finds one takes it, and the device is lost. Empty: the device is never lost."""
    placement: str = "cuda:0"
    """Device that the booster reports."""
    has_cuda: bool = True
    wrong_after: int | None = None
    """Number of calls after which margins are wrong in the last bit."""
    error: str = ""
    """Text of an error of xgboost that every call raises; empty: none."""

    def to_json(self) -> str:
        """Return the fields as JSON, for the variable."""
        return json.dumps(asdict(self))


class DeviceArray:
    """An array on a fake device: nothing of numpy works on it."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self._values.nbytes


@dataclass
class FakeDevice:
    """A fake `pipeline.models.flavors.xgboost_device.Device`."""

    gpu: FakeGpu
    calls: int = 0
    """Batches that were scored, those that failed included."""
    released: int = 0
    """Calls of `release`."""
    largest: int = 0
    """Rows of the largest batch that was scored."""
    threads: set[int] = field(default_factory=set)
    """Threads that scored."""
    uploads: int = 0
    """Matrices that were sent."""
    sends: list[tuple[int, int]] = field(default_factory=list)
    """First and last column, exclusive, of each copy to the device."""
    looks: int = 0
    """Matrices in which infinite values were looked for."""
    _used: int = 0
    _cached: int = 0
    """Bytes that the device has handed out; a call may use them again, and `release` gives them back."""
    _is_lost: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def booster(self, data: bytes) -> FakeBooster:
        """See `Device.booster`."""
        return FakeBooster(self, data)

    def upload(self, rows: int, features: int) -> FakeUpload:
        """See `Device.upload`. The room on the device is free again with the last reference to it."""
        upload = FakeUpload(self, rows, features)
        self._allocate(upload.host.nbytes)
        weakref.finalize(upload, self._free, upload.host.nbytes)
        self.uploads += 1
        return upload

    def score(self, predict: Callable[[Any], Any], matrix: np.ndarray) -> np.ndarray:
        """Score a matrix that is on the device."""
        with self._lock:
            self.calls += 1
            self.threads.add(threading.get_ident())
        self._fail()
        scores: DeviceArray = predict(DeviceArray(matrix))
        with self._allocated(2 * scores.nbytes):
            self.largest = max(self.largest, len(matrix))
            return scores._values.copy()

    def _fail(self) -> None:
        if self.gpu.error:
            raise xgboost.core.XGBoostError(self.gpu.error)
        if self._is_lost or self._take_token():
            self._is_lost = True
            raise CUDARuntimeError(700, LOST)

    def _take_token(self) -> bool:
        """Return True if a file of the folder was there to be removed; each is for one loss of one process."""
        for path in sorted(Path(self.gpu.tokens).iterdir()) if self.gpu.tokens else ():
            with suppress(FileNotFoundError):
                path.unlink()
                return True
        return False

    @contextmanager
    def _allocated(self, nbytes: int) -> Iterator[None]:
        self._allocate(nbytes)
        try:
            yield
        finally:
            self._free(nbytes)

    def _allocate(self, nbytes: int) -> None:
        with self._lock:
            if self.gpu.others + self._used + nbytes > self.gpu.memory:
                raise self._memory_error()
            self._used += nbytes
            self._cached = max(self._cached, self._used)

    def _free(self, nbytes: int) -> None:
        with self._lock:
            self._used -= nbytes

    def _memory_error(self) -> Exception:
        return {
            "python": MemoryError("std::bad_alloc: out_of_memory"),
            "cupy": CUDARuntimeError(2, "cudaErrorMemoryAllocation: out of memory"),
            "xgboost": xgboost.core.XGBoostError(NO_MEMORY),
        }[self.gpu.out_of_memory]

    def memory(self) -> DeviceMemory:
        """See `Device.memory`."""
        return DeviceMemory(max(0, self.gpu.memory - self.gpu.others - self._cached), self.gpu.memory)

    def release(self) -> None:
        """See `Device.release`."""
        self.released += 1
        self._cached = self._used


class FakeUpload:
    """A fake `pipeline.models.flavors.xgboost_device.Upload`: only columns that were sent are on the device."""

    def __init__(self, device: FakeDevice, rows: int, features: int) -> None:
        self.host = np.full((rows, features), np.nan, np.float32, order="F")
        self._device = device
        self._data = self.host.copy(order="F")
        self._missing = set(range(features))
        self._thread = threading.get_ident()

    def send(self, first: int, last: int) -> None:
        """See `Upload.send`."""
        self._check()
        self._data[:, first:last] = self.host[:, first:last]
        self._missing -= set(range(first, last))
        self._device.sends.append((first, last))

    def has_infinite(self, columns: Sequence[int]) -> bool:
        """See `Upload.has_infinite`."""
        self._check(is_complete=True)
        self._device.looks += 1
        self._device._fail()
        return bool(np.isinf(self._data[:, list(columns)]).any())

    def score(self, predict: Callable[[Any], Any]) -> np.ndarray:
        """See `Upload.score`."""
        self._check(is_complete=True)
        return self._device.score(predict, self._data)

    def _check(self, *, is_complete: bool = False) -> None:
        assert threading.get_ident() == self._thread
        assert not (is_complete and self._missing), f"columns {sorted(self._missing)} were not sent"


@dataclass
class FakeBooster:
    """A booster on a fake device. It accepts only the calls that xgboost's GPU predictor does well."""

    device: FakeDevice
    data: bytes

    def __post_init__(self) -> None:
        self._library = xgboost.Booster({"nthread": 1, "verbosity": 0}, model_file=bytearray(self.data))

    def save_config(self) -> str:
        """Return the configuration, as far as it is read."""
        return json.dumps({"learner": {"generic_param": {"device": self.device.gpu.placement}}})

    def inplace_predict(
        self,
        data: DeviceArray,
        *,
        iteration_range: tuple[int, int],
        predict_type: Literal["margin"],
        missing: float,
        validate_features: Literal[False],
    ) -> DeviceArray:
        """Return the margins of ``data``, which must be on the device."""
        assert isinstance(data, DeviceArray)
        assert predict_type == "margin"
        assert not validate_features
        assert np.isnan(missing)
        gpu, matrix = self.device.gpu, np.ascontiguousarray(data._values)
        if gpu.order == "gpu":
            margins = gpu_order_margins(self.data, matrix, iteration_range=iteration_range)
        else:
            margins = self._library.inplace_predict(
                matrix, iteration_range=iteration_range, predict_type="margin", validate_features=False
            )
        if gpu.wrong_after is not None and self.device.calls > gpu.wrong_after:
            margins = np.nextafter(margins, np.float32(np.inf))
        return DeviceArray(np.asarray(margins, np.float32))


@contextmanager
def installed(gpu: FakeGpu | None = None) -> Iterator[list[FakeDevice]]:
    """Let this process have a fake GPU inside the block.

    :returns: the devices that were opened: none, or one.
    """
    gpu = gpu or FakeGpu()
    opened: list[FakeDevice] = []

    def open_fake() -> FakeDevice:
        if not gpu.has_cuda:
            raise WithoutCudaError(f"xgboost {xgboost.__version__}, built without CUDA")
        opened.append(FakeDevice(gpu))
        return opened[-1]

    forget_engines()
    replace_device(open_fake)
    try:
        with nvml(FakeNvml([Card(gpu.uuid, memory=gpu.memory)] if gpu.memory else [])):
            yield opened
    finally:
        replace_device()
        forget_engines()


def dask_setup(worker: Any) -> None:
    """Install the fake GPU that the variable names in this worker process; a preload of Dask.

    In a worker that was started for a GPU it has that one's UUID.
    """
    if VARIABLE in os.environ:
        gpu = FakeGpu(**json.loads(os.environ[VARIABLE]))
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        held = installed(replace(gpu, uuid=first) if first.startswith("GPU-") else gpu)
        held.__enter__()
        worker.fake_gpu = held
