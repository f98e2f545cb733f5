"""The parts of ``benchmarks/gpu.py`` that look at the device itself; cupy is imported where it is used."""

from __future__ import annotations

import argparse
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import xgboost

from benchmarks.data import FEATURES, make_model, names, table
from pipeline.devices.failures import classify_device_error
from pipeline.devices.inventory import Gpu
from pipeline.models import device_engine
from pipeline.models.flavors import xgboost_cuda
from pipeline.models.flavors.matrix import fill_columns
from pipeline.models.flavors.xgboost_device import DeviceMemory, Upload, open_device, replace_device, score
from pipeline.models.flavors.xgboost_fold import fold_base
from pipeline.models.model import Feature
from pipeline.models.trees.xgboost import OBJECTIVES

SINGLE = [name for name in OBJECTIVES if not name.startswith(("multi:", "rank:", "survival:aft", "reg:quantile"))]
LABELS = {"logit": (0.0, 1.0), "log": (0.5, 4.0), "identity": (0.0, 1.0)}
SIZES = [1 << power for power in range(14, 21)]
MODELS = {"light": (300, 6), "heavy": (1000, 8)}


def build_info() -> dict[str, Any]:
    """Return what xgboost was built with."""
    return {key: value for key, value in xgboost.build_info().items() if key in ("USE_CUDA", "CUDA_VERSION", "USE_RMM")}


def device_facts() -> dict[str, Any]:
    """Return what the opened device says of itself, or the error."""
    try:
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(0)
        keys = ("name", "multiProcessorCount", "clockRate", "l2CacheSize", "sharedMemPerBlock", "pciBusID")
        return {"device": {key: properties[key] for key in keys}, "memory": open_device().memory()}
    except Exception as error:
        return {"device": None, "error": f"{type(error).__name__}: {error}"[:500]}


def margins_of(booster: Any, *, result: Callable[[Any], Any] = lambda found: found) -> Callable[[Any], Any]:
    """Return the function that computes margins of a matrix on the device."""

    def predict(data: Any) -> Any:
        return result(
            booster.inplace_predict(
                data, iteration_range=(0, 0), predict_type="margin", missing=np.nan, validate_features=False
            )
        )

    return predict


def make_matrix(rows: int, *, seed: int = 0) -> np.ndarray:
    """Numbers of all sizes, missing values, infinities and denormals; float32 [rows, 28] in F order."""
    rng = np.random.default_rng(seed)
    matrix = (rng.standard_normal((rows, FEATURES)) * 10.0 ** rng.integers(-3, 4, (rows, 1))).astype(np.float32)
    matrix[rng.random(matrix.shape) < 0.05] = np.nan
    matrix[::97, 1], matrix[::101, 2], matrix[::103, 3] = np.float32(1e-42), np.inf, -np.inf
    return np.asfortranarray(matrix)


def bits(record: Any, options: argparse.Namespace) -> None:
    """Count the rows whose margins differ from the CPU's, folded and as they are; show ten of them."""
    device = open_device()
    matrix = make_matrix(min(options.rows, 1_000_000))
    finite = np.nan_to_num(matrix[:20_000], posinf=0.0, neginf=0.0)
    for objective in [*SINGLE, "multi:softprob"]:
        low, high = LABELS[OBJECTIVES[objective][0]] if objective in SINGLE else (0.0, 1.0)
        label = np.where(np.random.default_rng(1).random(len(finite)) < 0.3, high, low)
        parameters = {"objective": objective, "max_depth": 6, "nthread": 8, "verbosity": 0, "eta": 0.1}
        if objective == "multi:softprob":
            label, parameters["num_class"] = np.arange(len(finite)) % 5, 5
        booster = xgboost.train(parameters, xgboost.DMatrix(finite, label), 100)
        data = bytes(booster.save_raw("ubj"))
        wanted = booster.inplace_predict(matrix, predict_type="margin").reshape(len(matrix), -1)
        found = {}
        for name, model in (("folded", fold_base(data)), ("as it is", data)):
            margins = score(device, margins_of(device.booster(model)), matrix).reshape(wanted.shape)
            differing = np.flatnonzero((margins.view(np.uint32) != wanted.view(np.uint32)).any(axis=1))
            found[name] = len(differing)
            if name == "folded" and len(differing):
                leaves = booster.predict(xgboost.DMatrix(finite[:1]), pred_leaf=True).shape
                for row in differing[:10]:
                    pair = {"gpu": margins[row].tolist(), "cpu": wanted[row].tolist()}
                    record.add(objective=objective, row=matrix[row].tolist(), leaves=leaves, **pair)
        record.add(objective=objective, rows=len(matrix), differing=found)


def messages(record: Any, options: argparse.Namespace) -> None:
    """Record the types and texts of what goes wrong on a card, and what this project takes each for."""
    import cupy

    pool, device = cupy.get_default_memory_pool(), open_device()
    data = bytes(xgboost.Booster(model_file=str(make_model(*MODELS["light"]))).save_raw("ubj"))
    on_gpu, on_cpu = device.booster(data), xgboost.Booster(model_file=bytearray(data))
    rows = np.nan_to_num(make_matrix(1000), posinf=0.0, neginf=0.0)
    there = cupy.asarray(rows, order="F")

    def attempt(name: str, call: Callable[[], Any]) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result: Any = call()
                found = {"result": f"{type(result).__module__}.{type(result).__name__}"}
                found |= {"value": str(getattr(result, "dtype", result))[:300]}
            except Exception as error:
                found = {"error": f"{type(error).__module__}.{type(error).__name__}", "text": str(error)[:1500]}
                found |= {"mro": str([kind.__name__ for kind in type(error).__mro__])}
                found |= {"taken_for": str(classify_device_error(error))}
        record.add(attempt=name, warnings=[str(warning.message)[:500] for warning in caught], **found)

    attempt("margins of a batch", lambda: margins_of(on_gpu)(there))
    attempt("device of the booster", lambda: json.loads(on_gpu.save_config())["learner"]["generic_param"]["device"])
    attempt("host matrix, booster on the GPU", lambda: on_gpu.inplace_predict(rows))
    attempt("matrix on the GPU, booster on the CPU", lambda: on_cpu.inplace_predict(there))
    attempt("another card", lambda: _on_card(7, data).inplace_predict(there))
    attempt("pinned memory without end", lambda: cupy.cuda.alloc_pinned_memory(1 << 50))
    attempt("an array without end", lambda: cupy.empty(1 << 50, np.uint8))
    pool.set_limit(size=1 << 20)
    attempt("cupy's pool is full", lambda: cupy.empty(1 << 24, np.uint8))
    pool.set_limit(size=0)
    large = cupy.zeros((1 << 20, FEATURES), np.float32, order="F")
    held = []
    for size in (1 << 30, 1 << 26, 1 << 22, 1 << 20):
        while device.memory().free > size:
            try:
                held.append(cupy.cuda.alloc(size))
            except MemoryError:
                break
    attempt("the card is full", lambda: [margins_of(on_gpu)(large) for _ in range(64)][-1])
    del held
    device.release()
    attempt("after that", lambda: margins_of(on_gpu)(there))
    # Last: it breaks the context of this process.
    broken = cupy.RawKernel('extern "C" __global__ void f(float* x) { x[1ll << 44] = 1; }', "f")
    attempt("an illegal access", lambda: (broken((1,), (1,), (there,)), cupy.cuda.Device().synchronize()))
    attempt("after the illegal access", lambda: margins_of(on_gpu)(there))


def _on_card(number: int, data: bytes) -> Any:
    return xgboost.Booster({"device": f"cuda:{number}"}, model_file=bytearray(data))


def device(record: Any, options: argparse.Namespace) -> None:
    """Time copies and the predictor alone, with events of the device; medians."""
    import cupy

    _copies(record, cupy, options.repeat)
    for name, shape in MODELS.items():
        data = bytes(xgboost.Booster(model_file=str(make_model(*shape))).save_raw("ubj"))
        boosters = {"folded": open_device().booster(fold_base(data)), "as it is": open_device().booster(data)}
        for use_pool in (False, True):
            xgboost.set_config(use_cuda_async_pool=use_pool)
            for rows in SIZES:
                for order in ("F", "C") if rows == SIZES[-3] else ("F",):
                    batch = cupy.random.standard_normal((rows, FEATURES)).astype(np.float32)
                    batch = cupy.asarray(batch, order=order)
                    for kind, booster in boosters.items() if rows == SIZES[-3] else [("folded", boosters["folded"])]:
                        seconds = _seconds(cupy, lambda: margins_of(booster)(batch), options.repeat)  # noqa: B023
                        figure = {"model": name, "kind": kind, "order": order, "async_pool": use_pool, "rows": rows}
                        record.add(**figure, rows_a_second=round(rows / seconds))
        _threads(record, name, boosters["folded"], options)
    _uploads(record, options)


def _seconds(cupy: Any, call: Callable[[], Any], repeat: int) -> float:
    """Return the median seconds of a call on the stream of this thread, after two to warm up."""
    stream = cupy.cuda.Stream.ptds
    with stream:
        found = []
        for _ in range(repeat + 2):
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record(stream)
            call()
            end.record(stream)
            end.synchronize()
            found.append(cupy.cuda.get_elapsed_time(begin, end) / 1000)
        return median(found[2:])


def _copies(record: Any, cupy: Any, repeat: int) -> None:
    size = 1 << 28
    there, other = cupy.empty(size, np.uint8), cupy.empty(size, np.uint8)
    pageable = np.ones(size, np.uint8)
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(size), np.uint8, size)
    stream = cupy.cuda.Stream.ptds
    copies = {
        "pageable": lambda: there.set(pageable, stream=stream),
        "pinned": lambda: there.set(pinned, stream=stream),
        "back, pinned": lambda: there.get(stream=stream, out=pinned, blocking=False),
        "on the device": lambda: cupy.copyto(other, there),
    }
    for name, copy in copies.items():
        record.add(copy=name, bytes_a_second=round(size / _seconds(cupy, copy, repeat)))


def _threads(record: Any, name: str, booster: Any, options: argparse.Namespace) -> None:
    """Time several threads that upload, score and download at a time, by the clock."""
    matrix, calls = np.nan_to_num(make_matrix(SIZES[-3]), posinf=0.0, neginf=0.0), 20
    for threads in (1, 4, *options.threads):
        barrier = threading.Barrier(threads + 1)

        def work() -> None:
            score(open_device(), margins_of(booster), matrix)
            barrier.wait()  # noqa: B023
            for _ in range(calls):
                score(open_device(), margins_of(booster), matrix)

        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(work) for _ in range(threads)]
            barrier.wait()
            begin = time.perf_counter()
            for future in futures:
                future.result()
            seconds = time.perf_counter() - begin
        figure = {"model": name, "threads": threads, "rows": len(matrix)}
        record.add(
            part="copy, score, copy back", **figure, rows_a_second=round(threads * calls * len(matrix) / seconds)
        )


def _uploads(record: Any, options: argparse.Namespace) -> None:
    """Time making and sending a batch with other numbers of columns at a time, and the look for infinite values."""
    batch, features = table(SIZES[-3], seed=1), tuple(Feature(name) for name in names())
    for columns in (1, 2, 4, 8, FEATURES):
        found, looks = [], []
        for _ in range(options.repeat + 2):
            begin = time.perf_counter()
            upload = _encoded(batch, features, columns)
            sent = time.perf_counter()
            upload.has_infinite(range(FEATURES))
            found.append(sent - begin)
            looks.append(time.perf_counter() - sent)
        figure = {"columns_at_a_time": columns, "rows": batch.num_rows}
        record.add(part="make and send", **figure, seconds=median(found[2:]), rest_and_look=median(looks[2:]))


def _encoded(batch: pa.Table, features: tuple[Feature, ...], columns: int) -> Upload:
    upload = open_device().upload(batch.num_rows, len(features))
    for first in range(0, len(features), columns):
        last = min(first + columns, len(features))
        fill_columns(upload.host[:, first:last], batch.select(range(first, last)), features[first:last])
        upload.send(first, last)
    return upload


class _NoUpload:
    """A matrix that goes nowhere."""

    def __init__(self, rows: int, features: int) -> None:
        self.host = np.empty((rows, features), np.float32, order="F")

    def send(self, first: int, last: int) -> None:
        """Do nothing."""

    def has_infinite(self, columns: Any) -> bool:
        """Find nothing."""
        return False

    def score(self, predict: Any) -> np.ndarray:
        """Return zeros."""
        return np.zeros(len(self.host), np.float32)


class _NoDevice:
    """A device that takes no time."""

    def booster(self, data: bytes) -> Any:
        """Return nothing."""

    def upload(self, rows: int, features: int) -> _NoUpload:
        """Return a matrix that goes nowhere."""
        return _NoUpload(rows, features)

    def memory(self) -> DeviceMemory:
        """Return the memory of a large card."""
        return DeviceMemory(128 << 30, 128 << 30)

    def release(self) -> None:
        """Do nothing."""


@contextmanager
def without_model() -> Iterator[None]:
    """Let models of this process take no time and give zeros: what is left is the host's work."""
    gpu = Gpu("GPU-none", "none", 128 << 30, 0)
    before = xgboost_cuda.prove, device_engine.own_gpu, device_engine.DeviceEngine.is_sample
    xgboost_cuda.prove = lambda *_, **__: None
    device_engine.own_gpu = lambda: device_engine.DeviceReport(gpu)
    device_engine.DeviceEngine.is_sample = lambda self: False  # type: ignore[method-assign]
    device_engine.forget_engines()
    replace_device(_NoDevice)
    try:
        yield
    finally:
        xgboost_cuda.prove, device_engine.own_gpu, device_engine.DeviceEngine.is_sample = before  # type: ignore[method-assign]
        device_engine.forget_engines()
        replace_device()
