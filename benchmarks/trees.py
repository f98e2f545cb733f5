"""Compare the tree engine with ``xgboost.Booster.inplace_predict``: same model, same rows, same bits.

    python benchmarks/trees.py            # about two minutes, one core
    python benchmarks/trees.py --threads 2

Both run in turns, in pairs, and the medians are compared: ratios hold on another machine, times do not. The margins of
every pair of runs are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xgboost

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.models.trees import TreeEngine, kernel_name, read_xgboost

CASES: list[dict[str, Any]] = [
    {"trees": 300, "depth": 6, "rows": 100_000},
    {"trees": 300, "depth": 6, "rows": 100_000, "missing": 0.05},
    {"trees": 1000, "depth": 8, "rows": 20_000},
    {"trees": 1000, "depth": 8, "rows": 20_000, "missing": 0.05},
    {"trees": 300, "depth": 8, "rows": 20_000, "max_bin": 4096},
    {"trees": 100, "depth": 12, "rows": 20_000},
    {"trees": 100, "depth": 0, "leaves": 255, "rows": 20_000},
    {"trees": 300, "depth": 6, "rows": 100_000, "skewed": True},
    {"trees": 300, "depth": 6, "rows": 10_000, "columns": 2000},
    {"trees": 30, "depth": 6, "rows": 100_000},
    {"trees": 50, "depth": 6, "rows": 50_000, "classes": 10},
    {"trees": 300, "depth": 6, "rows": 100},
    {"trees": 300, "depth": 6, "rows": 100_000, "layout": "columns"},
]


def make_data(rows: int, case: dict[str, Any], *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, case.get("columns", 28)), dtype=np.float32)
    score = 2 * np.sin(3 * matrix[:, 0]) + matrix[:, :28] @ np.linspace(-1, 1, 28, dtype=np.float32)
    score += rng.standard_normal(rows, dtype=np.float32)
    if case.get("skewed"):
        matrix = np.exp(3 * matrix)
    if case.get("missing"):
        matrix[rng.random(matrix.shape) < case["missing"]] = np.nan
    classes = case.get("classes", 2)
    label = np.clip(np.floor((score + 6) / 12 * classes), 0, classes - 1) if classes > 2 else score > 0
    return matrix, label.astype(np.float32)


def train(case: dict[str, Any]) -> xgboost.Booster:
    matrix, label = make_data(3000 if case.get("columns") else 50_000, case, seed=0)
    parameters = {
        "objective": "multi:softprob" if case.get("classes") else "binary:logistic",
        "max_depth": case["depth"],
        "max_leaves": case.get("leaves", 0),
        "grow_policy": "lossguide" if case.get("leaves") else "depthwise",
        "max_bin": case.get("max_bin", 256),
        "eta": 0.05,
        "verbosity": 0,
    }
    parameters |= {"num_class": case["classes"]} if case.get("classes") else {}
    rounds = case["trees"]
    return xgboost.train(parameters, xgboost.DMatrix(matrix, label), rounds)


def timed(call: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    begin = time.perf_counter()
    found = call()
    return time.perf_counter() - begin, found


def compare(case: dict[str, Any], *, threads: int, repeats: int) -> dict[str, Any]:
    booster = train(case)
    booster.set_param({"nthread": threads})
    begin = time.perf_counter()
    engine = TreeEngine(read_xgboost(json.loads(bytes(booster.save_raw("json")))))
    engine.prepare()
    ready = time.perf_counter() - begin
    matrix, _ = make_data(case["rows"], case, seed=1)
    if case.get("layout") == "columns":
        matrix = np.asfortranarray(matrix)
    ratios, ours = [], []
    for _ in range(repeats):
        theirs, wanted = timed(lambda: booster.inplace_predict(matrix, predict_type="margin"))
        own, found = timed(lambda: engine.margin(matrix, threads=threads))
        if wanted.tobytes() != found.tobytes():
            raise SystemExit(f"{describe(case)}: margins differ")
        ratios.append(theirs / own)
        ours.append(own)
    return {
        "case": describe(case),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "ready_rows": int(ready / statistics.median(ours) * case["rows"]),
    }


def describe(case: dict[str, Any]) -> str:
    shape = f"{case['leaves']} leaves" if case.get("leaves") else f"depth {case['depth']}"
    more = [f"{name} {value}" for name, value in case.items() if name not in {"trees", "depth", "leaves", "rows"}]
    return ", ".join([f"{case['trees']} x {shape}", f"{case['rows']} rows", *more])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of both")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of runs of each case")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many cases")
    chosen = parser.parse_args()
    print(f"xgboost {xgboost.__version__}, {kernel_name()}, {chosen.threads} threads, all margins equal in every bit")
    print(f"{'times inplace_predict':>22}  {'(lowest - highest)':<18}  {'ready after, in rows':>20}  case")
    for case in CASES[: chosen.cases]:
        row = compare(case, threads=chosen.threads, repeats=chosen.repeats)
        span = f"({row['low']:.1f} - {row['high']:.1f})"
        print(f"{row['ratio']:>21.1f}x  {span:<18}  {row['ready_rows']:>20}  {row['case']}", flush=True)


if __name__ == "__main__":
    main()
