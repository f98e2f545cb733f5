"""Run this project on local processes, measured from the start of scoring.

    python -m benchmarks.ours DATA MODEL OUT [WORKERS] [THREADS]

BENCHMARK_ENGINE is the spec's ``score.engine``: auto (default), xgboost or trees. BENCHMARK_CLUSTER and
BENCHMARK_DEVICE are the settings ``cluster`` and ``device``.

Prints one JSON object. ``cpu`` and ``wall`` run from the start of scoring, when the workers are ready, to the end of
publishing. They include the start of the tree engine, and its compilation if no kernels are on disk.
``startup`` is the time before: imports, planning, starting workers.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.tree import ProcessTree
from pipeline.events import Callback, JobEnded, PartitionEnded, RoundStarted
from pipeline.runner import run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec


class Marks(Callback):
    """A callback that reads the figures of the process tree at the events."""

    def __init__(self, tree: ProcessTree) -> None:
        self.tree = tree
        self.first = 0.0

    def on_round(self, event: RoundStarted) -> None:
        self.started, self.cpu = time.perf_counter(), self.tree.sample()
        self.partitions = event.partitions

    def on_partition(self, event: PartitionEnded) -> None:
        self.first = self.first or time.perf_counter()
        self.tree.sample()

    def on_end(self, event: JobEnded) -> None:
        self.wall, self.cpu = time.perf_counter() - self.started, self.tree.sample() - self.cpu


def main() -> None:
    begin = time.perf_counter()
    data, model, out = sys.argv[1:4]
    shape: dict[str, Any] = {"workers": int(sys.argv[4]), "threads": int(sys.argv[5])} if len(sys.argv) > 4 else {}
    tree = ProcessTree()
    marks = Marks(tree)
    spec = JobSpec.model_validate(
        {
            "name": "benchmark",
            "source": {"path": data},
            "steps": [{"score": {"model": model, "engine": os.environ.get("BENCHMARK_ENGINE", "auto")}}],
            "sink": {"path": str(Path(out) / "published"), "mode": "overwrite"},
        }
    )
    with tempfile.TemporaryDirectory(dir=out) as jobs:
        fsync = os.environ.get("BENCHMARK_FSYNC", "1") == "1"
        for name in ("cluster", "device"):
            if (value := os.environ.get(f"BENCHMARK_{name.upper()}")) is not None:
                shape[name] = value
        report = run(spec, settings=Settings.load(directory=jobs, fsync=fsync, **shape), callbacks=[marks])
    tree.close()
    peaks = tree.peaks()
    workers = [peak for pid, peak in peaks.items() if pid != os.getpid()]
    record = {
        "rows": report.rows.output,
        "cpu": marks.cpu,
        "wall": marks.wall,
        "startup": marks.started - begin,
        "first": marks.first - begin,
        "total": time.perf_counter() - begin,
        "peak": max(workers),
        "peak_tree": sum(peaks.values()),
        "partitions": marks.partitions,
        "devices": [device.rows for device in report.devices],
        "engines": report.engines.to_dict() if report.engines else {},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
