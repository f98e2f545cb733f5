"""A model that is loaded when rows need it, and not held between batches: the cache of the process decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.models.cache import is_cached
from pipeline.models.device_engine import DeviceEvaluator
from pipeline.models.engines import EngineUse, Evaluator
from pipeline.models.model import ModelVersion, Predictor
from pipeline.spec.model_ref import OutputKind


class LazyEvaluator:
    """A `Predictor` for one partition that opens its model at the first `encode`, and drops it at `release`."""

    def __init__(self, version: ModelVersion, open: Callable[[], tuple[Predictor, float]]) -> None:
        """:param open: returns the predictor, and the seconds it took to load."""
        self.version = version
        self.loads = 0
        """Times that the model was not in memory."""
        self.seconds = 0.0
        """Seconds for loading it."""
        self.device, self.device_peak = "", 0
        """See `DeviceEvaluator`."""
        self._open = open
        self._predictor: Predictor | None = None
        self._use = EngineUse()

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> np.ndarray:
        """See `pipeline.models.model.Predictor.encode`."""
        return self._opened().encode(table, order=order)

    def example(self) -> np.ndarray:
        """See `pipeline.models.model.Predictor.example`."""
        return self._opened().example()

    def predict(self, matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        """See `pipeline.models.model.Predictor.predict`."""
        return self._opened().predict(matrix, kind=kind)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.models.model.Predictor.is_out_of_memory`; False while the model is closed."""
        return self._predictor is not None and self._predictor.is_out_of_memory(error)

    def engine_use(self) -> EngineUse:
        """Return the engines that evaluated the model for this partition."""
        self.release()
        return self._use

    def release(self) -> None:
        """Hold the model no longer: the cache may drop it."""
        used, self._predictor = self._predictor, None
        if isinstance(used, (Evaluator, DeviceEvaluator)):
            self._use += used.engine_use()
        if isinstance(used, DeviceEvaluator):
            self.device, self.device_peak = used.device or self.device, max(self.device_peak, used.device_peak)

    def _opened(self) -> Predictor:
        if self._predictor is None:
            self.loads += not is_cached(self.version)
            self._predictor, seconds = self._open()
            self.seconds += seconds
        return self._predictor
