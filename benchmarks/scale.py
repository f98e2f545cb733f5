"""Measure the cost of a very large job before and after its partitions run: planning, the stored plan, resuming.

    python -m benchmarks.scale [--files 10000] [--groups 100] [--partitions 100000]

Reading receipts is compared with reading and parsing the same JSON; the other figures show orders of magnitude.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.nothing import do_nothing
from benchmarks.tree import peak_bytes
from pipeline.common.rows import InputFile, RowGroup
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.receipts import Receipt, SpooledReceipts, Timings
from pipeline.models.model import Feature, ModelVersion
from pipeline.plan.plan import Limits, Partition, Plan
from pipeline.plan.planner import dispatch_order, make_plan
from pipeline.plan.table import plan_bytes, read_plan
from pipeline.report.build import make_report
from pipeline.report.html.page import report_page
from pipeline.sources import Discovery
from pipeline.spec.job_spec import JobSpec

SCHEMA = pa.schema([(f"f{number:02d}", pa.float32()) for number in range(28)])


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = call()
    return time.perf_counter() - begin, found


def discovered(files: int, groups: int) -> Discovery:
    group = RowGroup(50_000, 50_000 * 28 * 4, 50_000 * 28 * 3)
    found = tuple(InputFile(f"/lake/{n:06d}.parquet", 1 << 28, f"mtime:{n}", (group,) * groups) for n in range(files))
    return Discovery(found, SCHEMA, (), tuple(SCHEMA.names))


def plan(found: Discovery, *, target_bytes: int) -> Plan:
    features = tuple(Feature(name) for name in SCHEMA.names)
    model = ModelVersion("churn", "3", "m.ubj", "d" * 64, "xgboost", 10_000, features, "binary", 1)
    fields = {"name": "scale", "source": {"path": "/lake"}, "sink": {"path": "/out"}}
    spec = JobSpec.model_validate({**fields, "steps": [{"score": {"model": "m.ubj"}}]})
    return make_plan(
        spec,
        model=model,
        discovery=found,
        predictions=pa.schema([("prediction", pa.float32())]),
        limits=Limits(1000, 1, 4 << 30),
        target_bytes=target_bytes,
    )


def write_receipts(job: JobDirectory) -> None:
    """Write the receipts of all partitions but the last."""
    folder = Path(job.root, "rounds/0/receipts")
    folder.mkdir(parents=True, exist_ok=True)
    for partition in job.plan.partitions[:-1]:
        (folder / f"{partition.id}.json").write_bytes(receipt_of(job, partition).to_json_bytes())


def receipt_of(job: JobDirectory, partition: Partition) -> Receipt:
    number = int(partition.id)
    # 64 workers, each at one partition after the other, of one to two seconds.
    seconds = 1 + number * 7919 % 1000 / 1000
    ended = 1_800_000_000 + number // 64 * 2.1 + seconds
    return replace(
        do_nothing(job.recipe, partition),
        worker=f"node-{number % 64:04}:4242",
        seconds=Timings(read=0.2, score=seconds - 0.3, write=0.1, total=seconds),
        ended=ended,
        peak_memory=400_000_000 + number % 64 * 1_000_000,
    )


def read_raw(folder: Path) -> int:
    return sum(len(json.loads(Path(entry.path).read_bytes())) for entry in os.scandir(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--groups", type=int, default=100, help="row groups of a file")
    parser.add_argument("--partitions", type=int, default=100_000, help="of the job that is resumed")
    options = parser.parse_args()
    count = options.files * options.groups
    found = discovered(options.files, options.groups)
    seconds, made = timed(lambda: plan(found, target_bytes=256 << 20))
    planned = f"{seconds:.2f} s, {len(made.partitions):,} partitions"
    print(f"planning {count:,} row groups of {options.files:,} files: {planned}")
    seconds, data = timed(lambda: plan_bytes(made))
    print(f"storing that plan: {seconds:.2f} s, {len(data):,} bytes ({len(data) / count:.1f} a row group)")

    found = discovered(options.partitions, 1)
    made = plan(found, target_bytes=5_600_000)
    with tempfile.TemporaryDirectory() as root:
        job = JobDirectory.create(root, made, job="scale-1", options=JobOptions(fsync=False))
        write_receipts(job)
        raw, _ = timed(lambda: read_raw(Path(job.root, "rounds/0/receipts")))
        again = JobDirectory.open(job.root, fsync=False)
        opened, stored = timed(lambda: read_plan(again.store))
        # The same calls as in a driver.
        read, receipts = timed(lambda: SpooledReceipts(again.receipts.each()))
        left, todo = timed(lambda: dispatch_order(again.ledger(receipts).todo))
        assert len(stored.partitions) == len(receipts) + 1 == options.partitions
        assert [partition.id for partition in todo] == [stored.partitions[-1].id]
        times = f"plan {opened:.2f} s, receipts {read:.2f} s, what is left {left:.2f} s"
        print(f"resuming {options.partitions:,} receipts: {times}; peak {peak_bytes(os.getpid()) / 1e6:.0f} MB")
        print(f"  receipts / the same JSON, read and parsed: {read / raw:.1f}")
        receipts.add(receipt_of(job, stored.partitions[-1]))
        seconds, data = timed(lambda: again.manifests.prepare(again.ledger(receipts)).to_json_bytes())
        print(f"the manifest: {seconds:.2f} s, {len(data):,} bytes; peak {peak_bytes(os.getpid()) / 1e6:.0f} MB")
        ledger = again.ledger(receipts)
        report = make_report(again, ledger=ledger)
        seconds, page = timed(lambda: report_page(again, report, ledger=ledger))
        print(f"report.html: {seconds:.2f} s, {len(page.encode()):,} bytes")


if __name__ == "__main__":
    main()
