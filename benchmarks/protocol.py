"""Measure the cost of the protocol: a clean job with and without fsync and checksums, as ratios.

    python -m benchmarks protocol [--rows 400000] [--repeat 5] [--sets large,small]

One process runs a job from its plan to its published output. Partitions run one after the other, without Dask,
whose noise would hide the difference. The variants take turns: everything, without fsync, without checksums (SHA-256
of every file and CRC-32 of every page), and without both. *Everything* is the default of jobs. ``large`` has 8
partitions; ``small`` has partitions of some 400 kB each, with the largest share of a receipt and its fsyncs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import IO, Any
from unittest.mock import patch

import pyarrow.parquet as pq

from benchmarks.data import make_data, make_model
from pipeline.driver.prepare import prepare
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.plan.packing import pack
from pipeline.plan.plan import Partition, Plan
from pipeline.scoring import checkpoint as part_file
from pipeline.scoring.partition import score_partition
from pipeline.settings import Settings
from pipeline.sinks import publish
from pipeline.spec.job_spec import JobSpec

SMALL_BYTES = 400_000
CONTENDERS = {
    "everything": (True, True),
    "no fsync": (False, True),
    "no checksums": (True, False),
    "neither": (False, False),
}
"""Use of fsync and of checksums by contender."""


@dataclass(frozen=True)
class Run:
    """Time of one job, in seconds."""

    wall: float
    cpu: float


class NoDigest:
    """A replacement for the checksum that computes nothing."""

    def update(self, data: bytes) -> None:
        """Do nothing."""

    def hexdigest(self) -> str:
        return "0" * 64


class Unchecked(part_file.ChecksumFile):
    """A file without a checksum of its bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._running = NoDigest()


@contextmanager
def without_checksums() -> Iterator[None]:
    writer = pq.ParquetWriter

    def plain(*arguments: Any, **options: Any) -> Any:
        return writer(*arguments, **{**options, "write_page_checksum": False})

    with ExitStack() as stack:
        stack.enter_context(patch.object(part_file.pq, "ParquetWriter", plain))
        stack.enter_context(patch.object(part_file, "ChecksumFile", Unchecked))
        yield


def make_plan(data: Path, model: Path, out: Path, kind: str) -> Plan:
    spec = JobSpec.build(
        name="protocol",
        source={"path": str(data)},
        steps=[{"score": {"model": str(model), "engine": "xgboost"}}],
        sink={"path": str(out), "mode": "overwrite"},
    )
    settings = Settings.load(directory=str(out.parent / "jobs"), workers=2, threads=1)
    plan = prepare(spec, settings=settings).plan
    if kind == "large":
        return plan
    parts = pack(plan.files, threads=2, target_bytes=SMALL_BYTES)
    return replace(plan, partitions=tuple(Partition(f"{number:05d}", one) for number, one in enumerate(parts)))


def run_once(plan: Plan, root: Path, *, fsync: bool, checksums: bool) -> Run:
    """Run a job from its directory to its output."""
    os.sync()
    with ExitStack() as stack:
        if not checksums:
            stack.enter_context(without_checksums())
        wall, cpu = time.perf_counter(), time.process_time()
        job = JobDirectory.create(root / "jobs", plan, job="protocol-1", options=JobOptions(fsync=fsync))
        receipts = [score_partition(job.recipe, partition, plan.versions) for partition in plan.partitions]
        committed = job.manifests.commit(job.manifests.prepare(job.ledger(receipts)))
        publish(committed.manifest, job)
        run = Run(time.perf_counter() - wall, time.process_time() - cpu)
    shutil.rmtree(root)
    return run


def measure(kind: str, *, rows: int, repeat: int, scratch: Path) -> tuple[Plan, dict[str, list[Run]]]:
    data, model = make_data("even", rows), make_model(100, 6)
    runs: dict[str, list[Run]] = {name: [] for name in CONTENDERS}
    plan = make_plan(data, model, scratch / "out", kind)
    # The first run loads the model and warms the page cache; it is not counted.
    run_once(plan, scratch / "warm", fsync=False, checksums=True)
    for number in range(repeat):
        order = list(CONTENDERS)
        # Each contender comes first equally often.
        for name in order[number % len(order) :] + order[: number % len(order)]:
            fsync, checksums = CONTENDERS[name]
            runs[name].append(run_once(plan, scratch / f"{name}-{number}", fsync=fsync, checksums=checksums))
            print(f"  {kind} {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
        shutil.rmtree(scratch / "out", ignore_errors=True)
    return plan, runs


def rows_of(kind: str, plan: Plan, runs: dict[str, list[Run]]) -> Iterator[str]:
    """Yield the ratios of each contender to the contender with neither: pairwise in each round, then the median."""
    floor = runs["neither"]
    for name, found in runs.items():
        wall = median(one.wall / base.wall for one, base in zip(found, floor, strict=True))
        cpu = median(one.cpu / base.cpu for one, base in zip(found, floor, strict=True))
        yield f"| {kind}: {len(plan.partitions)} partitions | {name} | {wall:.2f} | {cpu:.2f} | {len(found)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--sets", default="large,small")
    options = parser.parse_args(arguments)
    before = os.getloadavg()[0]
    lines = []
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent / "data") as scratch:
        for kind in options.sets.split(","):
            plan, runs = measure(kind, rows=options.rows, repeat=options.repeat, scratch=Path(scratch) / kind)
            lines += rows_of(kind, plan, runs)
    print(f"{options.rows:,} rows, {os.cpu_count()} cores, load {before:.1f} before and {os.getloadavg()[0]:.1f} after")
    print()
    print("| set | | wall / neither | CPU / neither | runs |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
