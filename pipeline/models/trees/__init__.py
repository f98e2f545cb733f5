"""Score tree ensembles from tables, with the same bits as the library that trained them.

``read_xgboost``, ``read_lightgbm``, ``read_sklearn`` and ``read_catboost`` convert models to ``TreeTables``;
``TreeEngine`` scores them. The design and its measurements are in ``docs/design/008-tree-engine.md``. The compiled
library is loaded on the first score.
"""

from __future__ import annotations

from pipeline.models.trees.catboost import catboost_output, read_catboost, unsupported_catboost
from pipeline.models.trees.engine import TreeEngine, kernel_name
from pipeline.models.trees.library import NEXT_STEP, unavailable
from pipeline.models.trees.lightgbm import lightgbm_output, read_lightgbm, unsupported_lightgbm
from pipeline.models.trees.sklearn import read_sklearn, sklearn_output, sklearn_rows, unsupported_sklearn
from pipeline.models.trees.tables import TreeTables, unsupported
from pipeline.models.trees.xgboost import read_xgboost, unsupported_xgboost

__all__ = [
    "NEXT_STEP",
    "TreeEngine",
    "TreeTables",
    "catboost_output",
    "kernel_name",
    "lightgbm_output",
    "read_catboost",
    "read_lightgbm",
    "read_sklearn",
    "read_xgboost",
    "sklearn_output",
    "sklearn_rows",
    "unavailable",
    "unsupported",
    "unsupported_catboost",
    "unsupported_lightgbm",
    "unsupported_sklearn",
    "unsupported_xgboost",
]
