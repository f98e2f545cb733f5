"""What xgboost's objectives do to a margin: the link of ``base_score`` and the transformation of the output.

Sources: ``src/objective/*`` and ``src/common/math.h`` of xgboost 3.2. All of it is float32 arithmetic with the C
library's ``expf`` and ``logf``. numpy has vectorised versions of its own, which differ in the last bit, so the C
library's are called here: ``logf`` through ctypes for the few base scores, ``expf`` by the compiled kernels. One
objective, survival:aft, calls ``exp`` of double precision and rounds: ``exp64``.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ModelError

_RT_EPS = np.float32(1e-6)

OBJECTIVES: dict[str, tuple[str, str]] = {
    "reg:squarederror": ("identity", "identity"),
    "reg:linear": ("identity", "identity"),
    "reg:squaredlogerror": ("identity", "identity"),
    "reg:pseudohubererror": ("identity", "identity"),
    "reg:absoluteerror": ("identity", "identity"),
    "reg:quantileerror": ("identity", "identity"),
    "reg:logistic": ("logit", "sigmoid"),
    "reg:gamma": ("log", "exp"),
    "reg:tweedie": ("log", "exp"),
    "binary:logistic": ("logit", "sigmoid"),
    "binary:logitraw": ("identity", "identity"),
    "binary:hinge": ("identity", "hinge"),
    "multi:softmax": ("identity", "argmax"),
    "multi:softprob": ("identity", "softmax"),
    "count:poisson": ("log", "exp"),
    "survival:cox": ("log", "exp"),
    "survival:aft": ("log", "exp64"),
    "rank:pairwise": ("identity", "identity"),
    "rank:ndcg": ("identity", "identity"),
    "rank:map": ("identity", "identity"),
}
"""Name of the objective: (link from ``base_score`` to margin, transformation from margin to output)."""

LIBM_TRANSFORMS = frozenset({"sigmoid", "exp", "exp64", "softmax"})
"""Transformations that need the C library's ``expf`` or ``exp``."""


def transform_name(objective: str) -> str:
    """Return the transformation of an objective's output: identity, sigmoid, exp, exp64, softmax, argmax or hinge."""
    return OBJECTIVES[objective][1]


def unsupported_transform(objective: str) -> tuple[str, ...]:
    """Say by name why the output of an objective cannot be had with xgboost's bits; empty where it can."""
    if objective not in OBJECTIVES:
        return (f"the objective {objective}",)
    if transform_name(objective) in LIBM_TRANSFORMS and not sys.platform.startswith("linux"):
        return (f"the output of {objective} on {sys.platform}: checked with glibc's expf and exp only",)
    return ()


def base_margin(base_score: npt.NDArray[np.float32], *, objective: str) -> npt.NDArray[np.float32]:
    """Apply the objective's link to [outputs] base scores, rounded as xgboost does it (``ProbToMargin``)."""
    link = OBJECTIVES[objective][0]
    one = np.float32(1)
    if link == "logit":
        bounded: npt.NDArray[np.float32] = np.minimum(np.maximum(base_score, _RT_EPS), one - _RT_EPS)
        return -_logf(one / bounded - one)
    return _logf(base_score) if link == "log" else np.array(base_score, dtype=np.float32)


@functools.cache
def _c_logf() -> Any:
    name = {"linux": "libm.so.6", "darwin": "libSystem.dylib"}.get(sys.platform)
    if name is None:
        raise ModelError(
            "The tree engine cannot score this model.",
            found=f"an objective with a logarithm in its link, on {sys.platform}",
            expected="Linux or macOS, whose C library's logf is known to be xgboost's",
            next_step="Score it with xgboost itself.",
        )
    function = ctypes.CDLL(name).logf
    function.argtypes = [ctypes.c_float]
    function.restype = ctypes.c_float
    return function


def _logf(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    logf = _c_logf()
    return np.array([logf(float(value)) for value in values], dtype=np.float32)
