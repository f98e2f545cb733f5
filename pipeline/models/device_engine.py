"""Evaluate a model on the GPU of this process: with the CPU's bits, or not at all.

xgboost on the CPU is the reference, as for the tree engine: the first batch and a sample of later ones are compared.
With ``device: auto`` everything that goes wrong ends on the CPU, with the reason in the report. With ``cuda`` it is an
error.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.devices.failures import device_lost, first_line
from pipeline.devices.inventory import Gpu
from pipeline.devices.memory import DEVICE_MEMORY
from pipeline.devices.report import DeviceProblem, DeviceReport, own_gpu
from pipeline.errors import DeviceLost, DeviceOutOfMemory, ModelError
from pipeline.models.cache import ModelKey, on_drop
from pipeline.models.device_options import DEVICE_KINDS
from pipeline.models.engines import (
    DEVICE_ENGINE,
    MARGIN_ROWS,
    SAMPLE_EVERY,
    SAMPLE_ROWS,
    EngineUse,
    Evaluation,
    Evaluator,
    get_evaluator,
    rows_beyond,
    unequal_bits,
)
from pipeline.models.flavors import find_flavor
from pipeline.models.model import DevicePredictor, DeviceUnusable, Predictor
from pipeline.models.process import process_facts
from pipeline.spec.model_ref import Device, OutputKind

MODEL_SHARE = 0.25
"""Share of a device's memory that models may take; the least recently used one is dropped first."""


@dataclass
class DeviceEngine:
    """A model on the GPU of this process. All threads share it."""

    predictor: DevicePredictor
    reference: Predictor
    tolerance: float = 0.0
    """Largest difference of margins that counts as equal; 0: every bit is compared."""
    disabled: tuple[str, ...] = ()
    """Reasons why this process stopped using its GPU for the model."""
    lost: str = field(default="", init=False)
    """Error that ended the use of the device in this process; empty while it works."""
    _calls: count[int] = field(default_factory=count, init=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, init=False)

    def is_sample(self) -> bool:
        """Count a call, and return True if it must be compared."""
        return next(self._calls) % SAMPLE_EVERY == 0

    def disable(self, reason: str) -> None:
        """Let the CPU score from now on."""
        with self._guard:
            self.disabled = (*self.disabled, reason)

    def compare(self, matrix: np.ndarray, scores: np.ndarray, *, kind: OutputKind) -> tuple[int, int, float]:
        """Compare the first `SAMPLE_ROWS` rows with the CPU.

        :returns: compared rows, those that differ, and the largest difference of a margin among `MARGIN_ROWS` rows.
        """
        head = matrix[:SAMPLE_ROWS]
        ours, theirs = scores[: len(head)], self.reference.predict(head, kind=kind)
        first = head[:MARGIN_ROWS]
        margins = self.predictor.predict(first, kind="margin"), self.reference.predict(first, kind="margin")
        with np.errstate(invalid="ignore"):
            distance = float(np.nanmax(np.abs(margins[0] - margins[1]), initial=0.0))
        if self.tolerance:
            return len(head), rows_beyond(*margins, self.tolerance), distance
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return len(head), len(head), distance
        return len(head), unequal_bits(ours, theirs) or unequal_bits(*margins), distance


class DeviceEvaluator:
    """A `Predictor` for one partition on the GPU of this process. Only one thread may use it at a time."""

    def __init__(self, engine: DeviceEngine, cpu: Evaluator, *, device: Device) -> None:
        self.engine = engine
        self.cpu = cpu
        """Evaluator for what the GPU does not score."""
        self.version = cpu.version
        self.use = EngineUse()
        self._is_required = device == "cuda"
        self._is_off = False

    @property
    def device(self) -> str:
        """UUID of the GPU, if it scored rows of this partition; else empty."""
        return self.engine.predictor.gpu.uuid if self.use.device_rows else ""

    @property
    def batch_rows(self) -> int:
        """Rows of the largest batch that is expected to fit on the device."""
        return self.engine.predictor.batch_rows

    @property
    def device_peak(self) -> int:
        """Most bytes of the device that were in use after a batch."""
        return self.engine.predictor.peak

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> np.ndarray:
        """See `pipeline.models.model.Predictor.encode`; in F order, in which a GPU reads columns.

        :raises DeviceLost: when the device cannot be used any more: this process must end.
        """
        if self._is_off or self.engine.disabled:
            return self.cpu.encode(table, order="F")
        with self._lost_recorded():
            return self.engine.predictor.encode(table)

    def may_have_infinite(self, matrix: np.ndarray, columns: Sequence[int]) -> bool:
        """See `pipeline.models.model.DevicePredictor.may_have_infinite`."""
        if self._is_off or self.engine.disabled:
            return True
        with self._lost_recorded():
            return self.engine.predictor.may_have_infinite(matrix, columns)

    @contextmanager
    def _lost_recorded(self) -> Iterator[None]:
        """Let other partitions of this process know when the device is lost."""
        try:
            yield
        except DeviceLost as error:
            self.engine.lost = error.found
            raise

    def example(self) -> np.ndarray:
        """See `pipeline.models.model.Predictor.example`."""
        return self.cpu.example()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.models.model.Predictor.is_out_of_memory`."""
        return self.cpu.is_out_of_memory(error)

    def engine_use(self) -> EngineUse:
        """Return the engines that evaluated the model for this partition, and why not the GPU."""
        use = self.use + EngineUse(device_reasons=self.engine.disabled)
        return use + self.cpu.engine_use() if self.cpu.use.rows or not use.rows else use

    def predict(self, matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        """See `pipeline.models.model.Predictor.predict`.

        :raises DeviceLost: when the device cannot be used any more: this process must end.
        :raises DeviceOutOfMemory: with ``cuda``: when the smallest batch does not fit.
        :raises ModelError: with ``cuda``: when the GPU gives other results than the CPU.
        """
        scores = self._try_device(matrix, kind=kind) if self._is_used(matrix, kind=kind) else None
        if scores is None:
            return self.cpu.predict(matrix, kind=kind)
        self.use += EngineUse(rows={DEVICE_ENGINE: len(matrix)})
        return scores

    def _is_used(self, matrix: np.ndarray, *, kind: OutputKind) -> bool:
        return bool(len(matrix)) and kind in DEVICE_KINDS and not (self._is_off or self.engine.disabled)

    def _try_device(self, matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray | None:
        """Return the GPU's scores; None if the CPU must score the rows."""
        try:
            with self._lost_recorded():
                scores = self.engine.predictor.predict(matrix, kind=kind)
                is_equal = not self.engine.is_sample() or self._agrees(matrix, scores, kind=kind)
        except DeviceLost:
            raise
        except DeviceOutOfMemory as error:
            if self._is_required:
                raise
            # Only for this partition: something else may use the card now.
            self._is_off = True
            self.use += EngineUse(device_reasons=(f"memory ran short: {error.found}",))
            return None
        except Exception as error:
            if self._is_required or isinstance(error, MemoryError):
                raise
            self.engine.disable(f"call failed: {first_line(error)}")
            return None
        return scores if is_equal else None

    def _agrees(self, matrix: np.ndarray, scores: np.ndarray, *, kind: OutputKind) -> bool:
        """Return True if the results for the first rows are those of the CPU; else disable the GPU."""
        rows, wrong, distance = self.engine.compare(matrix, scores, kind=kind)
        self.use += EngineUse(compared_rows=rows, mismatches=wrong)
        if not wrong:
            return True
        found = f"{wrong:,} of {rows:,} rows, margins up to {distance:.2g} apart"
        if self._is_required:
            report = DeviceReport(self.engine.predictor.gpu, problem=DeviceProblem.BITS, found=found)
            raise report.error(where=self.version.uri)
        self.engine.disable(f"its results differ from the CPU's: {found} (model {self.version.digest[:12]})")
        return False


_engines: OrderedDict[tuple[object, ...], DeviceEngine | DeviceReport] = OrderedDict()
_lock = threading.Lock()


def open_evaluator(
    score: Evaluation, *, device: Device = "cpu", memory: float | int | str = DEVICE_MEMORY, rows: int = 0
) -> tuple[Evaluator | DeviceEvaluator, float]:
    """Return an evaluator for a partition, and the seconds this call took to load the model and start its engine.

    :param device: ``cpu``, or what the workers are asked for; ``auto``: the CPU if this process has no usable GPU.
    :param memory: share of the free device memory, or a size, that batches may use.
    :param rows: rows of the largest batch to begin with on the device; 0: as many as fit.
    :raises NoDevice: with ``cuda``: when this process has no GPU that it can use.
    :raises DeviceLost: when the GPU was lost in this process.
    :raises ModelError: when the file cannot be read; with ``cuda``: when the GPU cannot give the CPU's bits.
    """
    cpu, seconds = get_evaluator(score)
    if device == "cpu":
        return cpu, seconds
    started = perf_counter()
    engine = _find_engine(score, cpu.choice.reference, memory=memory, rows=rows)
    seconds += perf_counter() - started
    if isinstance(engine, DeviceReport):
        if device == "cuda":
            raise engine.error(where=f"{score.model.uri}, on a worker")
        if engine.problem is not DeviceProblem.NO_GPU:
            cpu.use += EngineUse(device_reasons=(engine.found,))
        return cpu, seconds
    if engine.lost:
        raise device_lost(engine.lost)
    return DeviceEvaluator(engine, cpu, device=device), seconds


def _find_engine(
    score: Evaluation, reference: Predictor, *, memory: float | int | str, rows: int
) -> DeviceEngine | DeviceReport:
    """Return the engine of this process for a model, or the report that says why there is none.

    Threads wait for the first of them: a model goes to the device once.
    """
    key = (score.model.key, score.tolerance, memory)
    with _lock:
        if key not in _engines:
            _engines[key] = _start_engine(score, reference, memory=memory, rows=rows)
            _evict(key)
        _engines.move_to_end(key)
        return _engines[key]


def _start_engine(
    score: Evaluation, reference: Predictor, *, memory: float | int | str, rows: int
) -> DeviceEngine | DeviceReport:
    report, flavor = own_gpu(), find_flavor(score.model.flavor)
    if report.gpu is None or flavor.on_device is None:
        return report if report.gpu is None else report.with_problem(DeviceProblem.PROOF, f"the flavor {flavor.name}")
    threads = process_facts().threads
    try:
        predictor = flavor.on_device(reference, gpu=report.gpu, memory=memory, threads=threads, rows=rows)
    except DeviceUnusable as error:
        return report.with_problem(error.problem, error.found)
    except DeviceLost:
        raise
    except ModelError as error:
        return report.with_problem(DeviceProblem.BITS, error.found)
    except Exception as error:
        return report.with_problem(DeviceProblem.PROOF, first_line(error))
    return DeviceEngine(predictor, reference, score.tolerance)


def _evict(newest: tuple[object, ...]) -> None:
    """Drop the engines used longest ago while they take too much of the device."""
    while len(_engines) > 1 and _device_bytes() > MODEL_SHARE * _device_memory(newest):
        oldest = next(iter(_engines))
        if oldest == newest:
            return
        del _engines[oldest]


def _device_bytes() -> int:
    return sum(engine.predictor.nbytes for engine in _engines.values() if isinstance(engine, DeviceEngine))


def _device_memory(key: tuple[object, ...]) -> float:
    engine = _engines[key]
    gpu: Gpu | None = engine.predictor.gpu if isinstance(engine, DeviceEngine) else None
    return gpu.memory if gpu else float("inf")


def _forget_engines_of(model: ModelKey) -> None:
    """Drop a model that this process has dropped from its device, too."""
    with _lock:
        for key in [key for key in _engines if key[0] == model]:
            del _engines[key]


on_drop(_forget_engines_of)


def forget_engines() -> None:
    """Drop every model of this process from its device."""
    with _lock:
        _engines.clear()
