"""Compare this project with the floor: interleaved runs, as ratios of medians.

python -m benchmarks [--rows 5000000] [--trees 300] [--depth 6] [--repeat 3] [--sets even,skewed,tiny]
python -m benchmarks protocol     # see benchmarks/protocol.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.data import make_data, make_model

CONTENDERS = {
    "floor": ("benchmarks.floor", {}),
    "ours": ("benchmarks.ours", {"BENCHMARK_ENGINE": "auto"}),
    "ours (xgboost)": ("benchmarks.ours", {"BENCHMARK_ENGINE": "xgboost"}),
}
"""Module and environment of each contender."""


def run_once(contender: str, data: Path, model: Path, out: Path) -> dict[str, Any]:
    module, variables = CONTENDERS[contender]
    command, environment = [sys.executable, "-m", module, str(data), str(model), str(out)], {**os.environ, **variables}
    out.mkdir(parents=True)
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment, check=False
    )
    shutil.rmtree(out)
    if done.returncode:
        sys.exit(f"{module} failed on {data}:\n{done.stderr}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def measure(data: Path, model: Path, *, repeat: int, scratch: Path) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(repeat):
        for position, name in enumerate(CONTENDERS):
            runs[name].append(run_once(name, data, model, scratch / f"{position}-{number}"))
            print(f"  {data.name} {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    return runs


def middle(runs: list[dict[str, Any]], key: str) -> float:
    return median(run[key] for run in runs)


def row(name: str, contender: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    floor, ours = runs["floor"], runs[contender]
    cells = [middle(ours, key) / middle(floor, key) for key in ("cpu", "wall", "peak")]
    start, total = middle(ours, "startup"), middle(ours, "total")
    faster = median(run["engines"].get("speedup", 0.0) for run in ours)
    trees = sum(run["engines"].get("rows", {}).get("trees", 0) for run in ours) / sum(run["rows"] for run in ours)
    engine = f"{trees:.0%} of the rows by trees" + (f", {faster:.1f} × xgboost where both were timed" if faster else "")
    numbers = " | ".join(f"{cell:.2f}" for cell in (*cells, start / total))
    return f"| {name} | {contender} | {numbers} | {engine} | {len(ours)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--tiny-rows", type=int, default=1_000_000)
    parser.add_argument("--trees", type=int, default=300)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sets", default="even,skewed,tiny")
    options = parser.parse_args()
    model = make_model(options.trees, options.depth)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in options.sets.split(","):
            rows = options.tiny_rows if kind == "tiny" else options.rows
            data = make_data(kind, rows)
            results[kind] = measure(data, model, repeat=options.repeat, scratch=Path(scratch) / kind)
    show(results, options)


def show(results: dict[str, dict[str, list[dict[str, Any]]]], options: argparse.Namespace) -> None:
    names = ("dask", "distributed", "pandas", "pyarrow", "numpy", "xgboost-cpu")
    print(f"{options.trees} trees of depth {options.depth}; {os.cpu_count()} cores, {platform.machine()}, Python")
    print(platform.python_version() + ", " + ", ".join(f"{name} {version(name)}" for name in names))
    print()
    print("| set | | CPU / floor | wall / floor | peak of a worker / floor | start-up / whole run | engine | runs |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind, runs in results.items():
        for contender in CONTENDERS:
            if contender != "floor":
                print(row(kind, contender, runs))
    if "even" in results:
        print()
        for kind, runs in results.items():
            for contender in CONTENDERS:
                each = [middle(some[contender], "cpu") / some[contender][0]["rows"] for some in (runs, results["even"])]
                if kind != "even":
                    print(f"{contender}: CPU a row on {kind} / on even: {each[0] / each[1]:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["protocol"]:
        from benchmarks import protocol

        protocol.main(sys.argv[2:])
    else:
        main()
