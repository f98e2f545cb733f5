"""Measure the cost of skew: the same work on the same workers, spread evenly or not, as ratios of makespans.

    python -m benchmarks.skew [--workers 4] [--repeat 3] [--seconds 20]

Rows sleep instead of computing, so that other work on the machine counts little, and a row costs the same in any
batch. Every set has the same number of rows and the same sum of costs. Seconds are measured between the first task
and the last receipt; the rows of every run are checked.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.trouble import BATCH_ROWS, MEMORY, Bench, Measured
from pipeline.testing.oracle import Lake, make_lake, train_model
from pipeline.testing.processes import ProcessCluster

STEP = """
import time
import numpy as np

def step(frame):
    ids = frame["id"].to_numpy()
    time.sleep(float(np.where(ids % {rows} < {expensive}, {high}, {low}).sum()))
    return frame
"""
EXPENSIVE = 10
"""One row in this many is expensive; together the expensive rows cost as much as all other rows."""


def lakes(home: Path, rows: int, group: int) -> dict[str, Lake]:
    """Make the sets: the same rows in different files and row groups."""
    each = (rows // 16,) * 16
    third = rows // 3
    others = ((rows - third) // 15,) * 14
    return {
        "even": make_lake(home / "even", rows=each, row_group=group),
        "one file has half the rows": make_lake(
            home / "file",
            rows=(rows // 2, *((rows // 2) // 15,) * 14, rows // 2 - (rows // 2) // 15 * 14),
            row_group=group,
        ),
        "one row group has a third of the rows": make_lake(
            home / "group", rows=(third, *others, rows - third - sum(others)), row_group=rows
        ),
        "a tenth of the rows, side by side, costs as much as the rest": make_lake(
            home / "cost", rows=each, row_group=group
        ),
    }


class Skewed(Bench):
    """Bench with a step that sleeps row by row."""

    def run(self, lake: Lake, *, seconds: float, is_uneven: bool) -> Measured:
        """Run ``lake`` once, with ``seconds`` of sleep in total."""
        self.lake = lake
        expensive = lake.rows // EXPENSIVE if is_uneven else 0
        high = seconds / 2 / expensive if expensive else 0.0
        low = (seconds / 2 if expensive else seconds) / (lake.rows - expensive)
        return self.measure_step(STEP.format(rows=lake.rows, expensive=expensive, high=high, low=low))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of sleep for each worker")
    options = parser.parse_args()
    runs: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, rows = Path(scratch), 20_000 * options.workers
        (folder / "lakes").mkdir()
        sets, model = lakes(folder / "lakes", rows, 20 * BATCH_ROWS), train_model(folder / "churn.ubj")
        with ProcessCluster(folder / "cluster", workers=options.workers, memory=f"{MEMORY} B") as cluster:
            bench = Skewed(folder, cluster, sets["even"], model)
            bench.run(sets["even"], seconds=1.0, is_uneven=False)  # imports
            for _ in range(options.repeat):
                for name, lake in sets.items():
                    found = bench.run(lake, seconds=options.seconds * options.workers, is_uneven="costs" in name)
                    print(f"  {name}: {found.seconds:.1f} s, {found.report.stragglers}", file=sys.stderr, flush=True)
                    runs.setdefault(name, []).append(found)
    print("| set | makespan / even | partitions | cut while they ran | runs |")
    print("| --- | --- | --- | --- | --- |")
    even = statistics.median(one.seconds for one in runs["even"])
    for name, some in runs.items():
        cuts = statistics.mean(one.report.stragglers.split_slow for one in some)
        ratio = statistics.median(one.seconds for one in some) / even
        print(f"| {name} | {ratio:.2f} | {some[0].report.partitions.done} | {cuts:.1f} | {len(some)} |")


if __name__ == "__main__":
    main()
