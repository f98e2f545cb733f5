"""`FeatureFrame`: some rows of features for a model that takes a pandas frame, with the operations of a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class FeatureFrame:
    """Rows that `pipeline.models.model.Predictor.encode` made for a model that takes a frame."""

    frame: Any
    """pandas frame [rows, features]."""

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, rows: slice | np.ndarray) -> FeatureFrame:
        return FeatureFrame(self.frame.iloc[rows])
