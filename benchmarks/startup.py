"""Measure the time to the first scored partition, against a ``LocalCluster`` with one task of the same imports.

    python -m benchmarks.startup [--repeat 5]

Both start as users start them, with two workers of one thread each, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import yaml

from benchmarks.data import make_data, make_model
from benchmarks.tree import ProcessTree

ROOT = Path(__file__).parents[1]
BARE = """
from distributed import Client, LocalCluster

def work():
    import dask.dataframe, numpy, pandas, pyarrow.parquet, xgboost
    return 1

if __name__ == "__main__":
    place = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0")
    with place as cluster, Client(cluster) as client:
        assert client.submit(work).result() == 1
        print("done", flush=True)
"""


@dataclass(frozen=True)
class Run:
    first: float
    """Seconds until the first result is there."""
    cpu: float
    """CPU seconds of the process tree until then."""


def watch(command: list[str], folder: Path, sign: str) -> Run:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(folder / "log.txt", "wb") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        tree = ProcessTree(root=process.pid)
        while not any(folder.glob(sign)) and b"done" not in (folder / "log.txt").read_bytes():
            if process.poll() is not None:
                sys.exit((folder / "log.txt").read_text())
            time.sleep(0.005)
        run = Run(time.perf_counter() - begin, tree.sample())
        process.wait()
        tree.close()
    return run


def ours(scratch: Path) -> Run:
    spec = {
        "name": "startup",
        "source": {"path": str(make_data("even", 100_000))},
        "steps": [{"score": {"model": str(make_model(30, 6))}}],
        "sink": {"path": "out"},
    }
    (scratch / "job.yaml").write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "pipeline", "run", "job.yaml", "--job", "one", "--workers", "2", "--threads", "1"]
    return watch([*command, "--quiet"], scratch, ".pipeline/jobs/one/rounds/0/receipts/*.json")


def bare(scratch: Path) -> Run:
    (scratch / "bare.py").write_text(BARE)
    return watch([sys.executable, "bare.py"], scratch, "never")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    make_data("even", 100_000)
    make_model(30, 6)
    runs: dict[str, list[Run]] = {"bare": [], "ours": []}
    for _ in range(options.repeat):
        for name, go in (("bare", bare), ("ours", ours)):
            with tempfile.TemporaryDirectory() as scratch:
                runs[name].append(go(Path(scratch)))
            print(name, json.dumps(runs[name][-1].__dict__), file=sys.stderr, flush=True)
    for field in ("first", "cpu"):
        ratios = [getattr(a, field) / getattr(b, field) for a, b in zip(runs["ours"], runs["bare"], strict=True)]
        print(f"{field}: ours / bare {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
