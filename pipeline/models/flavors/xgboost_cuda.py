"""xgboost on the GPU of this process, with the bits of the CPU.

The copy of the model that goes to the device has its base in the first tree (`xgboost_fold`). The device returns
margins; outputs are computed from them on the host, because the device has another ``exp``. All of cupy is behind
`pipeline.models.flavors.xgboost_device`, so that everything else runs without a GPU.

Nobody changes a parameter of a loaded booster: threads share it.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.common.imports import import_library
from pipeline.common.units import format_bytes
from pipeline.devices.failures import DeviceFailure, classify_device_error, device_lost, first_line
from pipeline.devices.inventory import Gpu
from pipeline.devices.memory import (
    MIN_BATCH_ROWS,
    DeviceBatchLimit,
    allowed_device_memory,
    device_batch_rows,
    device_model_bytes,
    device_row_bytes,
)
from pipeline.devices.report import DeviceProblem, DeviceReport, own_gpu
from pipeline.errors import DeviceOutOfMemory, PipelineError
from pipeline.models.flavors.matrix import encode, fill_columns
from pipeline.models.flavors.xgboost_device import Device, Upload, WithoutCudaError, open_device, score
from pipeline.models.flavors.xgboost_fold import fold_base
from pipeline.models.flavors.xgboost_outputs import outputs_of_margins
from pipeline.models.flavors.xgboost_probe import UNNEEDED
from pipeline.models.model import DeviceUnusable
from pipeline.models.trees.xgboost import booster_part, read_ubj
from pipeline.spec.model_ref import OutputKind

PROOF_ROWS = 256
"""Rows that a model scores on the device before it is used."""
SENT_COLUMNS = 8
"""Columns that are sent at a time, while the next ones are made."""
PROVEN = ("cuda", "cuda:0")
"""Devices of a booster that count as the GPU of this process."""


def device_report() -> DeviceReport:
    """Report the GPU of this process, after a row of a small model was scored on it with the CPU's bits."""
    report = own_gpu()
    if report.problem is not None:
        return report
    try:
        xgboost: Any = import_library("xgboost", without=UNNEEDED)
        rows = np.array([[0.0], [1.0], [2.0], [np.nan]], np.float32)
        data = xgboost.DMatrix(rows, [0.0, 1.0, 1.0, 0.0], nthread=1)
        options = {"objective": "binary:logistic", "base_score": 0.3, "max_depth": 1, "nthread": 1}
        model = xgboost.train({**options, "min_child_weight": 0, "verbosity": 0}, data, 2)
        device = open_device()
        folded = device.booster(fold_base(bytes(model.save_raw("ubj"))))
        prove(folded, device, rows, model.inplace_predict(rows, predict_type="margin"))
    except DeviceUnusable as error:
        return report.with_problem(error.problem, error.found)
    except WithoutCudaError as error:
        return report.with_problem(DeviceProblem.BUILD, str(error))
    except Exception as error:
        return report.with_problem(DeviceProblem.PROOF, first_line(error))
    return report


def prove(booster: Any, device: Device, rows: np.ndarray, wanted: np.ndarray, **options: Any) -> None:
    """Prove that ``booster`` is on the device, and gives the margins ``wanted`` for ``rows``, in every bit.

    xgboost falls back to the CPU with a warning only; its configuration tells.

    :param options: further arguments of ``inplace_predict``.
    :raises DeviceUnusable: when it is not.
    """
    margins = score(device, _predictor(booster, **options), rows)
    found = str(json.loads(booster.save_config())["learner"]["generic_param"]["device"])
    if found not in PROVEN:
        raise DeviceUnusable(DeviceProblem.PROOF, f"xgboost scored on {found}")
    differing = np.ascontiguousarray(margins).view(np.uint32).ravel() != wanted.view(np.uint32).ravel()
    if differing.any():
        raise DeviceUnusable(DeviceProblem.BITS, f"{differing.sum()} of {len(differing)} values of the proof")


def _predictor(booster: Any, *, rounds: tuple[int, int] = (0, 0)) -> Callable[[Any], Any]:
    """Return the function that computes margins from a matrix on the device."""

    def predict(data: Any) -> Any:
        return booster.inplace_predict(
            data, iteration_range=rounds, predict_type="margin", missing=np.nan, validate_features=False
        )

    return predict


class XGBoostDevicePredictor:
    """A model on the device: a `pipeline.models.model.DevicePredictor`. Threads share it.

    :param reference: the model on the CPU, a `pipeline.models.flavors.xgboost.XGBoostPredictor`.
    :param memory: share of the free memory, or a size, that batches may use.
    :param threads: threads of this process that score at the same time.
    :param rows: rows of the largest batch to begin with; 0: as many as fit.
    :raises DeviceUnusable: when it does not give the CPU's bits for a few rows.
    :raises ModelError: when the model cannot have the CPU's bits on a GPU.
    """

    def __init__(
        self, reference: Any, device: Device, gpu: Gpu, *, memory: float | int | str, threads: int, rows: int = 0
    ) -> None:
        self.version, self.gpu = reference.version, gpu
        self._device = device
        self._lock = threading.Lock()
        self._turns = _Turns()
        self._peak = 0
        self._uploads: dict[int, Upload] = {}
        """Batch of each thread that was made and not scored yet."""
        rounds = self.version.iteration_range or (0, 0)
        folded = fold_base(bytes(reference.booster.save_raw("ubj")), iteration_range=rounds)
        trees = booster_part(read_ubj(folded)["learner"])[0]["trees"]
        self.nbytes = device_model_bytes(nodes=sum(len(tree["left_children"]) for tree in trees), trees=len(trees))
        self._row_bytes = device_row_bytes(features=len(self.version.features), outputs=self.version.margins)
        try:
            booster = device.booster(folded)
            self._predict = _predictor(booster, rounds=rounds)
            proof = _proof_rows(len(self.version.features))
            prove(booster, device, proof, reference.predict(proof, kind="margin"), rounds=rounds)
            allowed = allowed_device_memory(memory, free=device.memory().free)
        except Exception as error:
            self._raise_if_lost(error)
            raise
        fitting = device_batch_rows(allowed=allowed, row_bytes=self._row_bytes, threads=threads)
        # Fewer rows than now seem to fit are what an earlier job learned.
        self.limit = DeviceBatchLimit(max(MIN_BATCH_ROWS, min(fitting, rows or fitting)), fitting)

    @property
    def batch_rows(self) -> int:
        """See `pipeline.models.model.DevicePredictor`."""
        return self.limit.rows

    @property
    def peak(self) -> int:
        """Most bytes of the device that were in use after a batch, by whatever process."""
        return self._peak

    def encode(self, table: pa.Table) -> np.ndarray:
        """See `pipeline.models.model.Predictor.encode`; in F order, and on its way to the device.

        :raises DeviceLost: when the device cannot be used any more.
        """
        features = self.version.features
        self._take_upload()
        if 0 < table.num_rows <= self.limit.rows:
            try:
                with self._turns.take(alone=False):
                    upload = self._device.upload(table.num_rows, len(features))
                    for first in range(0, len(features), SENT_COLUMNS):
                        last = min(first + SENT_COLUMNS, len(features))
                        fill_columns(upload.host[:, first:last], table.select(range(first, last)), features[first:last])
                        upload.send(first, last)
            except PipelineError:
                raise
            except Exception as error:
                # Anything else than a lost device is found again, and handled, when the batch is scored.
                self._raise_if_lost(error)
            else:
                with self._lock:
                    self._uploads[threading.get_ident()] = upload
                return upload.host
        return encode(table, features, order="F")

    def may_have_infinite(self, matrix: np.ndarray, columns: Sequence[int]) -> bool:
        """Return False if no value of ``columns`` is infinite; True if one is, or if the device cannot tell.

        :param matrix: result of the last `encode` in this thread.
        :param columns: ascending.
        :raises DeviceLost: when the device cannot be used any more.
        """
        upload = self._uploads.get(threading.get_ident())
        if upload is None or not _is_same(upload.host, matrix):
            return True
        try:
            with self._turns.take(alone=False):
                found = upload.has_infinite(columns)
        except Exception as error:
            self._raise_if_lost(error)
            found = True
        if found:
            # Without these rows it is another matrix.
            self._take_upload()
        return found

    def _take_upload(self, matrix: np.ndarray | None = None) -> Upload | None:
        """Forget the batch of this thread, and return it if it is ``matrix``."""
        with self._lock:
            upload = self._uploads.pop(threading.get_ident(), None)
        return upload if upload is not None and matrix is not None and _is_same(upload.host, matrix) else None

    def predict(self, matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        """See `pipeline.models.model.Predictor.predict`; for the kinds prediction, label and margin.

        :raises DeviceLost: when the device, or this process's context on it, cannot be used any more.
        :raises DeviceOutOfMemory: when the smallest batch does not fit.
        """
        return outputs_of_margins(self.version, self._margins(matrix), kind=kind)

    def _margins(self, matrix: np.ndarray) -> np.ndarray:
        outputs, start, alone = self.version.margins, 0, False
        upload = self._take_upload(matrix)
        margins = np.empty((len(matrix), outputs), np.float32)
        while start < len(matrix):
            # A batch that is there already fits, whatever other threads have found since.
            stop = min(len(matrix), start + (self.limit.rows if upload is None else len(matrix)))
            try:
                with self._turns.take(alone=alone):
                    part = self._score_part(upload, matrix[start:stop])
            except Exception as error:
                self._raise_if_lost(error)
                if classify_device_error(error) is not DeviceFailure.MEMORY:
                    raise
                failed = error
            else:
                margins[start:stop] = part.reshape(stop - start, outputs)
                self._record_fit(stop - start)
                start, alone = stop, False
                continue
            # After the handler: the traceback of the error holds the arrays of the failed call.
            upload = None
            self._shrink(stop - start, failed.with_traceback(None), alone=alone)
            # The batches of other threads take memory, too: wait for their end, or this one is halved for nothing.
            alone = True
        return margins[:, 0].copy() if outputs == 1 else margins

    def _score_part(self, upload: Upload | None, rows: np.ndarray) -> np.ndarray:
        return score(self._device, self._predict, rows) if upload is None else upload.score(self._predict)

    def _record_fit(self, rows: int) -> None:
        free, total = self._device.memory()
        with self._lock:
            self._peak = max(self._peak, total - free)
            self.limit = self.limit.after_fit(rows)

    def _shrink(self, rows: int, error: BaseException, *, alone: bool) -> None:
        with self._lock:
            # Batches of other threads that wait take memory, too: they are sent again.
            self._uploads.clear()
        self._device.release()
        with self._lock:
            was_smallest = alone and rows <= self.limit.floor
            self.limit = self.limit.after_out_of_memory(rows)
        if was_smallest:
            needed, free = rows * self._row_bytes, self._device.memory().free
            raise DeviceOutOfMemory(
                "a batch does not fit on the GPU, however small it is cut",
                where=f"{self.gpu.name} of {socket.gethostname()}",
                found=f"{rows:,} rows need {format_bytes(needed)}, {format_bytes(free)} are free",
                expected=f"room for {self.limit.floor:,} rows",
                next_step="lower what else uses the card, or say device: cpu",
            ) from error

    def _raise_if_lost(self, error: BaseException) -> None:
        if classify_device_error(error) is DeviceFailure.LOST:
            where = f"{self.gpu.name} ({self.gpu.uuid}) of {socket.gethostname()}"
            raise device_lost(first_line(error), where=where) from error


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Return True if two arrays are the same values in the same memory."""
    keys = ("data", "shape", "strides", "typestr")
    left, right = one.__array_interface__, other.__array_interface__
    return all(left[key] == right[key] for key in keys)


def _proof_rows(features: int) -> np.ndarray:
    """Return rows that reach many leaves: zeros, missing values, and numbers of all sizes."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((PROOF_ROWS, features)) * 10.0 ** random.integers(-3, 5, (PROOF_ROWS, 1))
    rows[0], rows[1] = 0.0, np.nan
    return rows.astype(np.float32)


class _Turns:
    """Lets threads score at the same time, or one of them alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._active = self._waiting = 0
        self._is_alone = False

    @contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        """Wait for a turn; if ``alone``, until no other thread has one, and before threads that come later."""
        with self._changed:
            self._waiting += alone
            if alone:
                self._changed.wait_for(lambda: not self._active)
            else:
                self._changed.wait_for(lambda: not (self._waiting or self._is_alone))
            self._waiting -= alone
            self._active += 1
            self._is_alone = alone
        try:
            yield
        finally:
            with self._changed:
                self._active -= 1
                self._is_alone = False
                self._changed.notify_all()


def on_device(
    reference: Any, *, gpu: Gpu, memory: float | int | str, threads: int, rows: int = 0
) -> XGBoostDevicePredictor:
    """Put the model of ``reference`` on the GPU of this process; see `XGBoostDevicePredictor`.

    :raises DeviceUnusable: when the GPU cannot be used.
    :raises ModelError: when the model cannot have the CPU's bits on a GPU.
    """
    try:
        return XGBoostDevicePredictor(reference, open_device(), gpu, memory=memory, threads=threads, rows=rows)
    except WithoutCudaError as error:
        raise DeviceUnusable(DeviceProblem.BUILD, str(error)) from error
