"""Score tree ensembles from tables, with the same bits as the library that trained them.

``read_xgboost`` converts a model's JSON to ``TreeTables``; ``TreeEngine`` scores them. The design and its measurements
are in ``docs/design/008-tree-engine.md``. The compiled library is loaded on the first score.

Readers of other libraries are the modules ``lightgbm``, ``sklearn`` and ``catboost``. This file does not import them:
they would cost every worker some 10 ms.
"""

from __future__ import annotations

from pipeline.models.trees.engine import TreeEngine, apply_transform, kernel_name
from pipeline.models.trees.library import NEXT_STEP, unavailable
from pipeline.models.trees.tables import TreeTables, unsupported
from pipeline.models.trees.xgboost import read_xgboost, unsupported_xgboost

__all__ = [
    "NEXT_STEP",
    "TreeEngine",
    "TreeTables",
    "apply_transform",
    "kernel_name",
    "read_xgboost",
    "unavailable",
    "unsupported",
    "unsupported_xgboost",
]
