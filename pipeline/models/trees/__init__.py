"""Tree ensembles scored from tables, with the same bits as the library that trained them.

``from_xgboost`` turns a model's JSON into ``TreeTables``; ``TreeEngine`` scores them. Why it is built so and what it
brings is in ``docs/design/008-tree-engine.md``. numba (the extra ``fast``) is imported on the first score, not before.
"""

from __future__ import annotations

from pipeline.models.trees.engine import TreeEngine, available, kernel_name
from pipeline.models.trees.tables import TreeTables, unsupported
from pipeline.models.trees.xgboost import read_xgboost, unsupported_xgboost

__all__ = [
    "TreeEngine",
    "TreeTables",
    "available",
    "kernel_name",
    "read_xgboost",
    "unsupported",
    "unsupported_xgboost",
]
