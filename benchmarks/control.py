"""Measure the cost of a partition in driver and scheduler beside its work, against an empty task of distributed.

    python -m benchmarks.control [--partitions 1000,10000] [--fragments 1] [--workers 0]

Scheduler and worker are separate processes; the worker only answers a partition with a receipt
(`benchmarks.nothing`). The driver, which keeps the receipts, is a new process for each figure, so that its peak memory
can be measured. *Empty tasks* are `Client.submit` of a function that returns a text as long as a receipt, with as many
in flight. ``--workers`` sets a number of workers of one thread, all in one process (`benchmarks.many`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.tree import TICKS, peak_bytes

THREADS = 4
"""Threads of the worker, if there is only one worker."""


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[tuple[str, int]]:
    """Yield address and process id of a scheduler with one worker of four threads, or ``workers`` of one."""
    file, log = folder / "scheduler.json", (folder / "log.txt").open("ab")
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION": "1.0",
        "DASK_DISTRIBUTED__SCHEDULER__WORK_STEALING": "False",
    }

    def start(kind: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--scheduler-file", str(file), *options]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    started = [start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")]
    worker = ("--no-nanny", "--nthreads", str(THREADS), "--no-dashboard", "--preload", "benchmarks.nothing")
    if workers:
        many = [sys.executable, "-m", "benchmarks.many", str(file), str(workers)]
        started.append(subprocess.Popen(many, env=environment, cwd=folder, stdout=log, stderr=log))
    else:
        started.append(start("worker", *worker, "--local-directory", str(folder)))
    try:
        while not file.exists():
            time.sleep(0.05)
        yield json.loads(file.read_text())["address"], started[0].pid
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
        log.close()


def make_plan(count: int, fragments: int) -> Any:
    """Return a plan of ``count`` partitions over files that need not exist, since nothing reads them."""
    from dataclasses import replace

    from pipeline.common.rows import Fragment, InputFile, RowGroup
    from pipeline.plan.plan import Partition
    from pipeline.testing.jobs import small_job

    with tempfile.TemporaryDirectory() as folder:
        plan = small_job(Path(folder), sink=f"{folder}/out").plan
    group = RowGroup(1000, 100_000, 50_000)
    files = tuple(
        InputFile(f"/data/lake/part-{n:06d}.parquet", 50_000, f"mtime:{n}", (group,)) for n in range(count * fragments)
    )
    parts = [Fragment(file.path, 0, 1000, 0, 1, 100_000) for file in files]
    cut = [tuple(parts[n * fragments : (n + 1) * fragments]) for n in range(count)]
    partitions = tuple(Partition(f"{n:06d}", found) for n, found in enumerate(cut))
    return replace(plan, files=files, partitions=partitions)


class PlanTasks:
    """Tasks of a plan without a job directory; nothing is split or isolated."""

    round_folder = "/nowhere"

    def __init__(self, recipe: Any, versions: Any) -> None:
        self.recipe, self.versions = recipe, versions

    def submit(self, partitions: Any) -> list[Any]:
        from pipeline.execution.tasks import make_tasks

        return list(make_tasks(self.recipe, partitions, self.versions))

    submit_isolated = submit

    def split(self, partition: Any, receipt: Any, *, parts: int = 2) -> None:
        return None

    def read(self, result: Any) -> Any:
        from pipeline.execution.tasks import decode_receipt

        return decode_receipt(result)


class Ignore:
    """A listener without reactions."""

    def attempt_finished(self, result: Any) -> None: ...

    def mitigation(self, mitigation: Any) -> None: ...

    def step_message(self, line: Any, *, worker: str, partition: str) -> None: ...

    def poll(self) -> None: ...


def drive_ours(client: Any, count: int, fragments: int) -> float:
    """Run all partitions. Return the CPU seconds used before, for planning, which are not counted."""
    from pipeline.execution.dispatcher import Dispatcher
    from pipeline.jobs.receipts import SpooledReceipts

    plan = make_plan(count, fragments)
    source = PlanTasks(plan.recipe(job="benchmark", directory="/nowhere"), plan.versions)
    before = time.process_time()
    dispatcher = Dispatcher(client, source, Ignore())
    receipts = SpooledReceipts(dispatcher.run(plan.partitions))
    assert len(receipts) == count
    return before


def drive_empty(client: Any, count: int, window: int) -> float:
    from distributed import as_completed

    before = time.process_time()
    made = iter(range(count))
    text = "x" * 800

    def submit(number: int) -> Any:
        return client.submit(echo, text, number, key=f"empty-{number}", pure=False)

    done = as_completed([submit(number) for _, number in zip(range(window), made, strict=False)], loop=client.loop)
    for future in done:
        future.result()
        for number in made:
            done.add(submit(number))
            break
    return before


def echo(text: str, number: int) -> str:
    return text


def drive(kind: str, address: str, count: int, fragments: int, scheduler: int, workers: int) -> None:
    """Print one JSON object; run this in a separate process."""
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(workers or 1)
        first = cpu_seconds(scheduler)
        begin = time.perf_counter()
        before = (
            drive_empty(client, count, 2 * (workers or THREADS))
            if kind == "empty"
            else drive_ours(client, count, fragments)
        )
        used = {"driver": time.process_time() - before, "scheduler": cpu_seconds(scheduler) - first}
        record = {"wall": time.perf_counter() - begin, "driver_peak": peak_bytes(os.getpid())}
        print(json.dumps({**used, **record, "scheduler_peak": peak_bytes(scheduler)}))


def measure(kind: str, count: int, fragments: int, workers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder), workers) as (address, scheduler):
        arguments = ["--drive", kind, address, str(count), str(fragments), str(scheduler), str(workers)]
        command = [sys.executable, "-m", "benchmarks.control", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
        if done.returncode:
            sys.exit(f"{kind}, {count}: {done.stderr}")
        record: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partitions", default="1000,10000")
    parser.add_argument("--fragments", type=int, default=1, help="files a partition is made of")
    parser.add_argument("--workers", type=int, default=0, help="of one thread; default: one of four")
    parser.add_argument("--drive", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        kind, address, *numbers = options.drive
        drive(kind, address, *(int(number) for number in numbers))
        return
    print("| partitions | | driver ms | scheduler ms | both, beyond empty | driver peak MB | scheduler peak MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for count in (int(text) for text in options.partitions.split(",")):
        empty = measure("empty", count, options.fragments, options.workers)
        ours = measure("ours", count, options.fragments, options.workers)
        for name, run in (("empty tasks", empty), ("partitions", ours)):
            each = [1000 * run[part] / count for part in ("driver", "scheduler")]
            beyond = sum(each) - sum(1000 * empty[part] / count for part in ("driver", "scheduler"))
            peaks = " | ".join(f"{run[part] / 1e6:.0f}" for part in ("driver_peak", "scheduler_peak"))
            print(f"| {count:,} | {name} | {each[0]:.2f} | {each[1]:.2f} | {beyond:.2f} | {peaks} |", flush=True)


if __name__ == "__main__":
    main()
